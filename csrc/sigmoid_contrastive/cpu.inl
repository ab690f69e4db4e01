// SigLIP's loss on a tile of similarities, for one instruction set (see isa.cpp). With z = scale * similarity + bias a
// negative's loss is log(1 + exp(z)), its gradient sigmoid(z); a positive's are those of -z, with the sign turned.
#include "kernel.h"

#include "../core/cpu/exponential.h"
#include "../core/cpu/sweep.h"

namespace tlk {
namespace TLK_ISA {

template <class A>
struct Terms {
  Vec<A> loss, slope;
};

template <class A>
TLK_INLINE Terms<A> softplus(Vec<A> z) {
  using V = Vec<A>;
  const V e = exponential<A>(z < A(0) ? z : -z), u = e + A(1);
  // log(1 + e), with what the rounding of 1 + e took away
  const V log = log_from_one(u) + (e - (u - A(1))) / u;
  return {(z < A(0) ? V{} : z) + log, (z < A(0) ? e : set1(A(1))) / u};
}

template <class A, bool kStep>
void sigmoid_rows(const SigmoidContrastive& p, const Tile& t, int64_t begin, int64_t end) {
  using V = Vec<A>;
  const A scale = A(p.scale), bias = A(p.bias), factor = A(p.factor);
  for (int64_t r = begin; r < end; ++r) {
    A* c = static_cast<A*>(t.c) + r * t.stride;
    const int64_t i = t.row + r, own = p.own + i - t.column;
    const bool here = own >= 0 && own < t.columns;
    const A x = here ? c[own] : A(0);
    Chains<A> loss, by_scale, by_bias;
    sweep<A>(0, t.columns, [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
      const V similarity = load_some(c + k, n, A(0));
      const Terms<A> terms = softplus<A>(similarity * scale + bias);
      // The positive is not one of these, nor are the lanes beyond the row.
      const auto counts = (iota<A>() != int(own - k)) & (iota<A>() < n);
      loss.part[slot] += counts ? terms.loss : V{};
      if constexpr (kStep) {
        const V d = counts ? terms.slope * factor : V{};
        by_scale.part[slot] += counts ? d * similarity : V{};
        by_bias.part[slot] += d;
        store_some(c + k, n, d);
      }
    });
    double losses = double(loss.sum()), scales = double(by_scale.sum()), biases = double(by_bias.sum());
    if (here) {
      const Terms<A> terms = softplus<A>(-set1(x * scale + bias));
      losses += double(terms.loss[0]);
      if constexpr (kStep) {
        const A d = -terms.slope[0] * factor;
        scales += double(d) * double(x);
        biases += double(d);
        c[own] = d;
      }
    }
    p.loss[i] += losses;
    if constexpr (kStep) {
      p.scale_grad[i] += scales;
      p.bias_grad[i] += biases;
    }
  }
}

SigmoidContrastiveKernels sigmoid_contrastive(bool wide) {
  if (wide) return {sigmoid_rows<double, false>, sigmoid_rows<double, true>};
  return {sigmoid_rows<float, false>, sigmoid_rows<float, true>};
}

}  // namespace TLK_ISA
}  // namespace tlk
