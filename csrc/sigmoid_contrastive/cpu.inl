// SigLIP's loss on a tile of similarities, compiled once for each instruction set (see isa.cpp). With
// z = scale * similarity + bias, the loss of a negative is softplus(z) = log(1 + exp(z)) with the gradient sigmoid(z),
// and that of a positive is softplus(-z) with the gradient -sigmoid(-z).
#include "kernel.h"

#include "../core/cpu/exponential.h"
#include "../core/cpu/sweep.h"

namespace tlk {
namespace TLK_ISA {

template <class A>
struct Softplus {
  Vec<A> value, slope;
};

template <class A>
TLK_INLINE Softplus<A> softplus(Vec<A> z) {
  using V = Vec<A>;
  const V e = exponential<A>(z < A(0) ? z : -z), u = e + A(1);
  // log(1 + e), corrected for the rounding of 1 + e
  const V log = log_from_one(u) + (e - (u - A(1))) / u;
  return {(z < A(0) ? V{} : z) + log, (z < A(0) ? e : set1(A(1))) / u};
}

template <class A, bool kStep>
void sigmoid_rows(const SigmoidContrastive& p, const Tile& t, int64_t begin, int64_t end) {
  using V = Vec<A>;
  const A scale = A(p.scale), bias = A(p.bias), factor = A(p.factor);
  for (int64_t r = begin; r < end; ++r) {
    A* c = static_cast<A*>(t.c) + r * t.stride;
    const int64_t i = t.row + r, positive = p.positive_offset + i - t.column;  // the positive's column of the tile
    const bool has_positive = positive >= 0 && positive < t.columns;
    const A x = has_positive ? c[positive] : A(0);
    Chains<A> loss, by_scale, by_bias;
    sweep<A>(0, t.columns, [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
      const V similarity = load_some(c + k, n, A(0));
      const Softplus<A> negative = softplus<A>(similarity * scale + bias);
      // Without the positive and the lanes past the row's end.
      const auto counts = (iota<A>() != int(positive - k)) & (iota<A>() < n);
      loss.part[slot] += counts ? negative.value : V{};
      if constexpr (kStep) {
        const V d = counts ? negative.slope * factor : V{};
        by_scale.part[slot] += counts ? d * similarity : V{};
        by_bias.part[slot] += d;
        store_some(c + k, n, d);
      }
    });
    double losses = double(loss.sum()), scales = double(by_scale.sum()), biases = double(by_bias.sum());
    if (has_positive) {
      const Softplus<A> s = softplus<A>(-set1(x * scale + bias));
      losses += double(s.value[0]);
      if constexpr (kStep) {
        const A d = -s.slope[0] * factor;
        scales += double(d) * double(x);
        biases += double(d);
        c[positive] = d;
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
