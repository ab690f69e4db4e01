// Conversions between the stored types and the types of arithmetic, of single numbers and of 16 bytes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../types.h"
#include "ptx.cuh"

namespace tlk {

using bf16 = __nv_bfloat16;
using f16 = __half;

// The type of arithmetic on numbers stored as T.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

TLK_DEVICE double widen(double v) { return v; }
TLK_DEVICE float widen(float v) { return v; }
TLK_DEVICE float widen(bf16 v) { return __bfloat162float(v); }
TLK_DEVICE float widen(f16 v) { return __half2float(v); }

template <class T>
TLK_DEVICE T narrow(Compute<T> v);
template <>
TLK_DEVICE double narrow<double>(double v) {
  return v;
}
template <>
TLK_DEVICE float narrow<float>(float v) {
  return v;
}
template <>
TLK_DEVICE bf16 narrow<bf16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
TLK_DEVICE f16 narrow<f16>(float v) {
  return __float2half_rn(v);
}

template <class T>
constexpr int kLanes = int(16 / sizeof(T));  // numbers in 16 bytes

// 16 bytes of numbers of type T.
template <class T>
union alignas(16) Pack {
  uint4 bits;
  T lane[kLanes<T>];
  TLK_DEVICE Pack() {}
  TLK_DEVICE explicit Pack(uint4 v) : bits(v) {}
};

// Widens 16 bytes. A bfloat16 is the upper half of a float: one instruction each, where `widen` of a lane takes two.
template <class T>
TLK_DEVICE void widen_pack(Pack<T> pack, Compute<T> (&v)[kLanes<T>]) {
  if constexpr (std::is_same_v<T, bf16>) {
    const unsigned words[4] = {pack.bits.x, pack.bits.y, pack.bits.z, pack.bits.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const unsigned bits = i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16;
      memcpy(&v[i], &bits, sizeof bits);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) v[i] = widen(pack.lane[i]);
  }
}

// The larger of two packs' numbers, lane by lane; NaN only where both are.
template <class T>
TLK_DEVICE Pack<T> larger(Pack<T> a, Pack<T> b) {
  Pack<T> c;
  if constexpr (sizeof(T) == 2) {
    c.bits = make_uint4(larger_pair<T>(a.bits.x, b.bits.x), larger_pair<T>(a.bits.y, b.bits.y),
                        larger_pair<T>(a.bits.z, b.bits.z), larger_pair<T>(a.bits.w, b.bits.w));
  } else {
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) c.lane[i] = fmax(a.lane[i], b.lane[i]);
  }
  return c;
}

// Rounds two numbers to 16 bits: one instruction, on a faster pipe than the one that converts a single number.
template <class T>
TLK_DEVICE unsigned narrow_pair(float low, float high);
template <>
TLK_DEVICE unsigned narrow_pair<bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  unsigned bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
template <>
TLK_DEVICE unsigned narrow_pair<f16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  unsigned bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

template <class T>
TLK_DEVICE Pack<T> narrow_pack(const Compute<T> (&v)[kLanes<T>]) {
  Pack<T> pack;
  if constexpr (sizeof(T) == 2) {
    pack.bits = make_uint4(narrow_pair<T>(v[0], v[1]), narrow_pair<T>(v[2], v[3]), narrow_pair<T>(v[4], v[5]),
                           narrow_pair<T>(v[6], v[7]));
  } else {
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) pack.lane[i] = narrow<T>(v[i]);
  }
  return pack;
}

// How many of the n numbers at p come before the first multiple of 16 bytes.
template <class T>
TLK_DEVICE int64_t head_of(const T* p, int64_t n) {
  const int64_t head = int64_t((16 - reinterpret_cast<uintptr_t>(p) % 16) % 16 / sizeof(T));
  return head < n ? head : n;
}

}  // namespace tlk
