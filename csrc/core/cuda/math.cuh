// Constants, and functions of float and double under one name.
#pragma once
#include "vector.cuh"

namespace tlk {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.693147180559945309417;

template <class A>
TLK_DEVICE A infinity() {
  return A(INFINITY);
}

// 2^x; that of a float is in ptx.cuh.
TLK_DEVICE double fast_exp2(double x) { return exp2(x); }

// A product that the compiler does not fuse with a sum.
TLK_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
TLK_DEVICE double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// A logit in base 2 is a similarity times this factor.
template <class A>
TLK_DEVICE A logit_factor(const double* scale) {
  return A(*scale) * A(kLog2E);
}
// What exponentials subtract from logits up to `peak`: 0 if they are all -inf, so that exp(-inf - 0) is 0 and not NaN.
template <class A>
TLK_DEVICE A finite_or_zero(A peak) {
  return peak == -infinity<A>() ? A(0) : peak;
}

}  // namespace tlk
