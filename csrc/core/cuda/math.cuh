// What float and double have in common under one name, for kernels of both.
#pragma once
#include "vector.cuh"

namespace tlk {

template <class A>
TLK_DEVICE A infinity() {
  return A(INFINITY);
}
// The other one where one is NaN.
TLK_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
TLK_DEVICE double larger(double a, double b) { return fmax(a, b); }

TLK_DEVICE float exp2_of(float x) { return exp2_approximate(x); }
TLK_DEVICE double exp2_of(double x) { return exp2(x); }

// A product that is not fused with a sum.
TLK_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
TLK_DEVICE double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// What similarities are multiplied by to be logits in base 2.
template <class A>
TLK_DEVICE A logit_factor(const double* scale) {
  return A(*scale) * A(1.44269504088896340736);
}
// What to subtract from logits of which none is above `peak`.
template <class A>
TLK_DEVICE A finite_or_zero(A peak) {
  return peak == -infinity<A>() ? A(0) : peak;
}

}  // namespace tlk
