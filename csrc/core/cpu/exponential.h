// The exponential function for arguments that may be far from 0, like a difference of logits.
#pragma once
#include "vec.h"

namespace tlk {
namespace TLK_ISA {

template <class A>
struct Ln2;  // ln 2 = high + low; high ends in zero bits, so that small integers times it are exact
template <>
struct Ln2<float> {
  static constexpr float high = 0.693359375f, low = -2.12194440e-4f;
};
template <>
struct Ln2<double> {
  static constexpr double high = 0.693147180369123816490, low = 1.90821492927058770002e-10;
};

// e^x for x up to the logarithm of the largest number; results below the smallest normal number are 0. In
// exp2(x * log2(e)) the product's rounding error, which is relative to x, would be an absolute error of the exponent.
template <class A>
TLK_INLINE Vec<A> exponential(Vec<A> x) {
  using S = Simd<A>;
  constexpr A log2e = A(kLog2E), lowest = A(-S::exponent_bias * 0.69314718055994531);
  constexpr A magic = A(3ull << (S::mantissa_bits - 1)) + S::exponent_bias;  // see exp2 in vec.h
  x = vmax(set1(lowest), x);                                                 // in this order NaN stays NaN
  const Vec<A> shifted = x * log2e + magic, n = shifted - magic;
  const Vec<A> rest = (x - n * Ln2<A>::high) - n * Ln2<A>::low;
  const Vec<A> power = bitcast<Vec<A>>(bitcast<typename S::U>(shifted) << S::mantissa_bits);
  return polynomial_exp2(rest * log2e) * power;
}

}  // namespace TLK_ISA
}  // namespace tlk
