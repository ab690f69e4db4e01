// SIMD arithmetic for any instruction set. The only file with intrinsics.
//
// Each translation unit defines TLK_ISA, which is the namespace of everything below. Two units compiled with different
// -m flags must never share an inline function: the linker might keep the AVX-512 copy and crash an older CPU. For the
// same reason nothing here includes the C++ standard library or ATen.
#pragma once
#include <stdint.h>

#if defined(__AVX512F__)
#define TLK_VEC_BYTES 64
#include <immintrin.h>
#elif defined(__AVX2__)
#define TLK_VEC_BYTES 32
#include <immintrin.h>
#else
#define TLK_VEC_BYTES 16
#endif

// Always inlined: in a translation unit as large as these the compiler's limit would leave out even short functions.
#define TLK_INLINE inline __attribute__((always_inline))

extern "C" double tanh(double) noexcept;
extern "C" double log(double) noexcept;

namespace tlk {
namespace TLK_ISA {

typedef float f32v __attribute__((vector_size(TLK_VEC_BYTES)));
typedef double f64v __attribute__((vector_size(TLK_VEC_BYTES)));
typedef uint32_t u32v __attribute__((vector_size(TLK_VEC_BYTES)));
typedef int32_t i32v __attribute__((vector_size(TLK_VEC_BYTES)));
typedef uint64_t u64v __attribute__((vector_size(TLK_VEC_BYTES)));
typedef int64_t i64v __attribute__((vector_size(TLK_VEC_BYTES)));
typedef uint16_t u16h __attribute__((vector_size(TLK_VEC_BYTES / 2)));

constexpr double kLog2E = 1.4426950408889634074;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Compute<T>::type is the type of arithmetic on numbers stored as T; Simd<type> has its vectors.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

template <class A>
struct Simd;
template <>
struct Simd<float> {
  using V = f32v;
  using U = u32v;
  using I = i32v;
  using Index = int32_t;
  static constexpr int mantissa_bits = 23, exponent_bias = 127;
};
template <>
struct Simd<double> {
  using V = f64v;
  using U = u64v;
  using I = i64v;
  using Index = int64_t;
  static constexpr int mantissa_bits = 52, exponent_bias = 1023;
};
template <class A>
using Vec = typename Simd<A>::V;
template <class A>
constexpr int lanes = TLK_VEC_BYTES / int(sizeof(A));

template <class To, class From>
TLK_INLINE To bitcast(From x) {
  static_assert(sizeof(To) == sizeof(From), "bitcast keeps the size");
  To y;
  __builtin_memcpy(&y, &x, sizeof(To));
  return y;
}

template <class A>
TLK_INLINE Vec<A> set1(A x) {
  return x - Vec<A>{};
}

template <class A>
TLK_INLINE typename Simd<A>::I iota() {
  typename Simd<A>::I v{};
  for (int i = 0; i < lanes<A>; ++i) v[i] = i;
  return v;
}

// Returns b if either is NaN, as the x86 instruction does.
template <class V>
TLK_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}

template <class A, class F>
TLK_INLINE A reduce(Vec<A> v, F combine) {
  for (int step = lanes<A> / 2; step > 0; step /= 2) {
    auto other = iota<A>() ^ step;
    v = combine(v, __builtin_shuffle(v, other));
  }
  return v[0];
}
template <class A>
TLK_INLINE A reduce_max(Vec<A> v) {
  return reduce<A>(v, [](Vec<A> a, Vec<A> b) { return vmax(a, b); });
}
template <class A>
TLK_INLINE A reduce_sum(Vec<A> v) {
  return reduce<A>(v, [](Vec<A> a, Vec<A> b) { return a + b; });
}

// ---- loads and stores of a whole vector, and with `_n` of its first n lanes, 0 < n < lanes ----

TLK_INLINE f32v load(const float* p) {
  f32v v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
TLK_INLINE f64v load(const double* p) {
  f64v v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
TLK_INLINE void store(float* p, f32v v) { __builtin_memcpy(p, &v, sizeof v); }
TLK_INLINE void store(double* p, f64v v) { __builtin_memcpy(p, &v, sizeof v); }

TLK_INLINE u32v widen(u16h half) {
#if defined(__AVX512F__)
  return bitcast<u32v>(_mm512_cvtepu16_epi32(bitcast<__m256i>(half)));
#elif defined(__AVX2__)
  return bitcast<u32v>(_mm256_cvtepu16_epi32(bitcast<__m128i>(half)));
#else
  return __builtin_convertvector(half, u32v);
#endif
}
// The upper 16 bits of each element.
TLK_INLINE u16h upper(u32v v) {
#if defined(__AVX512BW__)
  typedef uint16_t u16v __attribute__((vector_size(64)));
  constexpr u16v odd = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  return bitcast<u16h>(_mm512_castsi512_si256(_mm512_permutexvar_epi16(bitcast<__m512i>(odd), bitcast<__m512i>(v))));
#else
  return __builtin_convertvector(v >> 16, u16h);
#endif
}

TLK_INLINE f32v widen_bf16(u16h half) { return bitcast<f32v>(widen(half) << 16); }
TLK_INLINE u16h narrow_bf16(f32v v) {
  const u32v bits = bitcast<u32v>(v);
  const u32v nearest_even = bits + (0x7fffu + ((bits >> 16) & 1u));
  return upper((v == v) ? nearest_even : bits);  // the upper half of a computed NaN is NaN too
}

TLK_INLINE f32v widen_f16(u16h half) {
#if defined(__AVX512F__)
  return bitcast<f32v>(_mm512_cvtph_ps(bitcast<__m256i>(half)));
#elif defined(__F16C__)
  return bitcast<f32v>(_mm256_cvtph_ps(bitcast<__m128i>(half)));
#else
  f32v v{};
  for (int i = 0; i < lanes<float>; ++i) v[i] = float(bitcast<_Float16>(uint16_t(half[i])));
  return v;
#endif
}
TLK_INLINE u16h narrow_f16(f32v v) {
#if defined(__AVX512F__)
  return bitcast<u16h>(_mm512_cvtps_ph(bitcast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bitcast<u16h>(_mm256_cvtps_ph(bitcast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  u16h half{};
  for (int i = 0; i < lanes<float>; ++i) half[i] = bitcast<uint16_t>(_Float16(v[i]));
  return half;
#endif
}

TLK_INLINE u16h load_bits(const void* p) {
  u16h half;
  __builtin_memcpy(&half, p, sizeof half);
  return half;
}
TLK_INLINE f32v load(const bf16* p) { return widen_bf16(load_bits(p)); }
TLK_INLINE f32v load(const f16* p) { return widen_f16(load_bits(p)); }
TLK_INLINE void store(bf16* p, f32v v) {
  u16h half = narrow_bf16(v);
  __builtin_memcpy(p, &half, sizeof half);
}
TLK_INLINE void store(f16* p, f32v v) {
  u16h half = narrow_f16(v);
  __builtin_memcpy(p, &half, sizeof half);
}

// Lanes from n on are `fill`.
template <class T, class V>
TLK_INLINE V load_n(const T* p, int n, V fill) {
  constexpr int L = int(sizeof(V) / sizeof(fill[0]));
  T buffer[L] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  using A = typename Compute<T>::type;
  return iota<A>() < n ? load(buffer) : fill;
}
template <class T, class V>
TLK_INLINE void store_n(T* p, int n, V v) {
  T buffer[sizeof(V) / sizeof(v[0])];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

#if defined(__AVX512F__)
// A masked move does not touch the memory of lanes that are off, and is many times faster than the buffer.
TLK_INLINE uint32_t first_lanes(int n) { return (1u << n) - 1u; }
TLK_INLINE f32v load_n(const float* p, int n, f32v fill) {
  return bitcast<f32v>(_mm512_mask_loadu_ps(bitcast<__m512>(fill), __mmask16(first_lanes(n)), p));
}
TLK_INLINE f64v load_n(const double* p, int n, f64v fill) {
  return bitcast<f64v>(_mm512_mask_loadu_pd(bitcast<__m512d>(fill), __mmask8(first_lanes(n)), p));
}
TLK_INLINE u16h load_bits_n(const void* p, int n) {
  return bitcast<u16h>(_mm256_maskz_loadu_epi16(__mmask16(first_lanes(n)), p));
}
TLK_INLINE f32v load_n(const bf16* p, int n, f32v fill) {
  return iota<float>() < n ? widen_bf16(load_bits_n(p, n)) : fill;
}
TLK_INLINE f32v load_n(const f16* p, int n, f32v fill) {
  return iota<float>() < n ? widen_f16(load_bits_n(p, n)) : fill;
}
TLK_INLINE void store_n(float* p, int n, f32v v) {
  _mm512_mask_storeu_ps(p, __mmask16(first_lanes(n)), bitcast<__m512>(v));
}
TLK_INLINE void store_n(double* p, int n, f64v v) {
  _mm512_mask_storeu_pd(p, __mmask8(first_lanes(n)), bitcast<__m512d>(v));
}
TLK_INLINE void store_n(bf16* p, int n, f32v v) {
  _mm256_mask_storeu_epi16(p, __mmask16(first_lanes(n)), bitcast<__m256i>(narrow_bf16(v)));
}
TLK_INLINE void store_n(f16* p, int n, f32v v) {
  _mm256_mask_storeu_epi16(p, __mmask16(first_lanes(n)), bitcast<__m256i>(narrow_f16(v)));
}
#endif

template <class T>
TLK_INLINE typename Compute<T>::type load1(const T* p) {
  using A = typename Compute<T>::type;
  return load_n(p, 1, Vec<A>{})[0];
}
template <class T>
TLK_INLINE void store1(T* p, typename Compute<T>::type x) {
  store_n(p, 1, set1(x));
}

// ---- functions: accurate to 2 units in the last place over the stated range; NaN gives NaN ----

TLK_INLINE f32v polynomial_exp2(f32v r) {
  f32v p = r * 0.000154614446986f + 0.00134004281776f;
  p = p * r + 0.00961805667852f;
  p = p * r + 0.0555032722667f;
  p = p * r + 0.240226509223f;
  p = p * r + 0.693147206703f;
  return p * r + 1.0f;
}
TLK_INLINE f64v polynomial_exp2(f64v r) {
  f64v p = r * 4.455817908336064493e-10 + 7.0741942972885210056e-9;
  p = p * r + 1.0178057087733941105e-7;
  p = p * r + 1.3215432535912376166e-6;
  p = p * r + 0.000015252733841556772589;
  p = p * r + 0.00015403530463724354209;
  p = p * r + 0.0013333558146406470697;
  p = p * r + 0.0096181291075872566681;
  p = p * r + 0.055504108664821627039;
  p = p * r + 0.24022650695910159567;
  p = p * r + 0.69314718055994530925;
  return p * r + 1.0;
}

// 2^t for t up to the largest exponent; results below the smallest normal number are 0. Adding 1.5 * 2^mantissa_bits
// rounds t to an integer in the low bits of the sum; the bias, added too, makes those bits an exponent field.
template <class A>
TLK_INLINE Vec<A> exp2(Vec<A> t) {
  using S = Simd<A>;
  constexpr A magic = A(3ull << (S::mantissa_bits - 1)) + S::exponent_bias;
  Vec<A> lowest = Vec<A>{} - A(S::exponent_bias);
  t = vmax(lowest, t);  // in this order NaN stays NaN
  Vec<A> shifted = t + magic;
  Vec<A> r = t - (shifted - magic);
  Vec<A> scale = bitcast<Vec<A>>(bitcast<typename S::U>(shifted) << S::mantissa_bits);
  return polynomial_exp2(r) * scale;
}

// 2^(d * factor) for d up to 0; results below the smallest normal number are 0. With a fused multiply-add, the product
// is not rounded before its integer part is subtracted.
template <class A>
struct ScaledExp2 {
  A factor, rest, lowest;
  explicit ScaledExp2(double exact)
      : factor(A(exact)), rest(A(exact - double(factor))), lowest(A(-Simd<A>::exponent_bias / exact)) {}

  TLK_INLINE Vec<A> operator()(Vec<A> d) const {
    using S = Simd<A>;
    constexpr A magic = A(3ull << (S::mantissa_bits - 1)) + S::exponent_bias;  // as in exp2
    d = vmax(set1(lowest), d);                                                 // in this order NaN stays NaN
    Vec<A> shifted = d * factor + magic;
    Vec<A> r = d * factor - (shifted - magic) + d * rest;
    Vec<A> scale = bitcast<Vec<A>>(bitcast<typename S::U>(shifted) << S::mantissa_bits);
    return polynomial_exp2(r) * scale;
  }
};

// Natural logarithm of numbers from 1 on.
TLK_INLINE f32v log_from_one(f32v x) {
  u32v bits = bitcast<u32v>(x);
  u32v shifted = bits - 0x3f3504f3u;  // of sqrt(1/2): the mantissa is in [sqrt(1/2), sqrt(2))
  i32v exponent = bitcast<i32v>(shifted) >> 23;
  f32v m = bitcast<f32v>((shifted & 0x007fffffu) + 0x3f3504f3u);
  f32v s = (m - 1.0f) / (m + 1.0f), t = s * s;
  f32v p = t * 0.233309640518f + 0.285508025533f;
  p = p * t + 0.400001220008f;
  p = p * t + 0.666666665543f;
  f32v e = __builtin_convertvector(exponent, f32v);
  f32v y = e * 0.693359375f + (s * t * p + (s * 2.0f + e * -2.12194440e-4f));
  return (x == x) ? y : x;
}
TLK_INLINE f64v log_from_one(f64v x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = ::log(x[i]);
  return x;
}

// Natural logarithm of positive normal numbers, without a division: for every element, where log_from_one is for every
// row. 0 and subnormal numbers give a negative number, NaN may give any.
TLK_INLINE f32v log_normal(f32v x) {
  u32v shifted = bitcast<u32v>(x) - 0x3f3504f3u;  // as in log_from_one
  f32v e = __builtin_convertvector(bitcast<i32v>(shifted) >> 23, f32v);
  f32v r = bitcast<f32v>((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f, t = r * r;
  f32v p = r * 0.08700359612703323f - 0.1426747590303421f;
  p = p * r + 0.1491478681564331f;
  p = p * r - 0.165775865316391f;
  p = p * r + 0.19963061809539795f;
  p = p * r - 0.2500133812427521f;
  p = p * r + 0.3333390951156616f;
  f32v low = p * r * t + e * -2.12194440e-4f;
  return r + (low - t * 0.5f) + e * 0.693359375f;
}
TLK_INLINE f64v log_normal(f64v x) { return log_from_one(x); }

TLK_INLINE f32v tanh(f32v u) {
  f32v a = u < 0.0f ? -u : u, t = u * u;
  f32v p = t * 0.00229274481618f - 0.00834394551584f;
  p = p * t + 0.021768918651f;
  p = p * t - 0.0539592595772f;
  p = p * t + 0.133333035569f;
  p = p * t - 0.333333331721f;
  f32v small = u + u * t * p;
  f32v twenty = f32v{} + 20.0f;
  f32v e = exp2<float>((a > twenty ? twenty : a) * 2.88539008f);
  f32v large = 1.0f - 2.0f / (e + 1.0f);
  return a < 0.625f ? small : (u < 0.0f ? -large : large);
}
TLK_INLINE f64v tanh(f64v u) {
  for (int i = 0; i < lanes<double>; ++i) u[i] = ::tanh(u[i]);
  return u;
}

}  // namespace TLK_ISA
}  // namespace tlk
