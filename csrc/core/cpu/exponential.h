// The exponential function where its argument may be far from 0, as the difference of two logits.
#pragma once
#include "vec.h"

namespace tlk {
namespace TLK_ISA {

template <class A>
struct Ln2;  // in two parts, of which the first has zeros in its last bits
template <>
struct Ln2<float> {
  static constexpr float high = 0.693359375f, low = -2.12194440e-4f;
};
template <>
struct Ln2<double> {
  static constexpr double high = 0.693147180369123816490, low = 1.90821492927058770002e-10;
};

// e^x for x up to the logarithm of the largest number; results below the smallest normal number are 0. exp2(x *
// log2(e)) would have the rounding of that product, relative to x, as an absolute error in the exponent.
template <class A>
TLK_INLINE Vec<A> exponential(Vec<A> x) {
  using S = Simd<A>;
  constexpr A log2e = A(1.4426950408889634), lowest = A(-S::exponent_bias * 0.69314718055994531);
  constexpr A magic = A(3ull << (S::mantissa_bits - 1)) + S::exponent_bias;  // see exp2 in vec.h
  x = vmax(set1(lowest), x);                                                 // in this order a NaN stays
  const Vec<A> shifted = x * log2e + magic, n = shifted - magic;
  const Vec<A> rest = (x - n * Ln2<A>::high) - n * Ln2<A>::low;
  const Vec<A> power = bitcast<Vec<A>>(bitcast<typename S::U>(shifted) << S::mantissa_bits);
  return polynomial_exp2(rest * log2e) * power;
}

}  // namespace TLK_ISA
}  // namespace tlk
