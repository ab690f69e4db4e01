// Replaces the toolkit's header.
#pragma once
#include <cuda_runtime.h>

struct __half {
  unsigned short bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
inline float __half2float(__half v) {
  const unsigned sign = unsigned(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff;
  if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  // Its bits, shifted into those of a float, are 2^-112 of its value; also if it is subnormal.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));
}
inline __half __float2half_rn(float v) {
  const unsigned bits = __float_as_uint(v), size = bits & 0x7fffffff;
  const unsigned short sign = static_cast<unsigned short>(bits >> 16 & 0x8000);
  const auto with = [&](unsigned rest) { return __half{static_cast<unsigned short>(sign | rest)}; };
  if (size > 0x7f800000u) return with(0x7fff);   // NaN
  if (size >= 0x477ff000u) return with(0x7c00);  // infinite from 65520 on
  if (size < 0x38800000u)                        // subnormal: the last bit of the sum is the type's smallest number
    return with(__float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u);
  return with((size - 0x38000000u + 0xfff + (size >> 13 & 1)) >> 13);
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
