// What the kernels of cross entropy share. They compute loss, normaliser, statistics and gradient, in any combination.
// With f(x) = tanh(x / softcap), or x, z = f(x) * softcap / T and p = softmax(z):
//
//   q_c   = w_c * ((1 - smoothing) * t_c + smoothing / C)      t: probabilities; for a class index y, its term has the
//                                                              factor w_y and the smoothing's terms w_c
//   loss  = sum_c q_c * (lse - z_c) + z_loss * lse^2
//   dx_c  = (a * p_c - g * q_c - h * p_c * (log p_c + entropy)) * f'(x_c) / T
//                                                              a = g * (sum_c q_c + 2 * z_loss * lse) + g_lse
//                                                              h: upstream of entropy = -sum_c p_c * log p_c
//
// A row is read from memory once: its later sweeps read it from cache.
#pragma once
#include "kernel.h"
#include "../core/cpu/sweep.h"

namespace tlk {
namespace TLK_ISA {

// A call's options in the compute type, and the formulas' terms. P: type of probabilities; kCap: with softcap.
template <class T, class P, bool kCap>
struct Terms {
  using A = typename Compute<T>::type;
  using V = Vec<A>;
  static constexpr int L = lanes<A>;

  const CrossEntropy& c;
  const A* weight;
  const A inv_t, softcap;
  const A to_z, to_exp2;  // z = f * to_z, exp(z) = 2^(f * to_exp2)
  const A keep, spread;   // 1 - smoothing; smoothing / C, with C of the whole vocabulary
  const bool dense;       // q_c is not 0 for every class
  const int inner;        // the last axis
  A* const peak_;
  A* const log_sum_;

  explicit Terms(const CrossEntropy& call)
      : c(call),
        weight(static_cast<const A*>(call.weight)),
        inv_t(A(call.inv_temperature)),
        softcap(A(call.softcap)),
        to_z(A(call.inv_temperature * (kCap ? call.softcap : 1))),
        to_exp2(A(call.inv_temperature * (kCap ? call.softcap : 1) * kLog2E)),
        keep(A(1 - call.smoothing)),
        spread(A(call.smoothing / call.spread_over)),
        dense(!call.indices || call.smoothing != 0),
        inner(call.axes - 1),
        peak_(static_cast<A*>(call.peak)),
        log_sum_(static_cast<A*>(call.log_sum)) {}

  template <class Pointer>
  int64_t offset(const Strided<Pointer>& tensor, int64_t row) const {
    int64_t result = 0;
    for (int axis = inner; axis > 0; --axis) {
      result += row % c.size[axis] * tensor.stride[axis];
      row /= c.size[axis];
    }
    return result + row * tensor.stride[0];
  }

  static A per_position(const PerPosition& value, int64_t row) {
    return value.data ? static_cast<const A*>(value.data)[row * value.stride] : A(0);
  }

  TLK_INLINE V cap(V x) const {
    if constexpr (kCap)
      return tanh(x / softcap);
    else
      return x;
  }
  TLK_INLINE A cap1(A x) const { return cap(set1(x))[0]; }

  // T * dz / dx. It is small near the cap, so it is computed from f, not from z, which is rounded again.
  static TLK_INLINE V slope(V f) { return (A(1) - f) * (A(1) + f); }

  // Whether a row takes part. Another is not read, and its results and gradient are 0.
  bool counted(int64_t row) const {
    if (c.indices && c.indices[row] == c.ignore_index) return false;
    return !c.row_weight.data || per_position(c.row_weight, row) != 0;
  }
  // The target's class; -1 if there is none, since the target is probabilities or in another part of the vocabulary.
  int64_t target_of(int64_t row) const { return c.indices ? c.indices[row] : -1; }
  A row_weight(int64_t row) const { return c.row_weight.data ? per_position(c.row_weight, row) : A(1); }
  TLK_INLINE A weight_at(int64_t k) const { return weight ? weight[k] : A(1); }

  // q_c of n contiguous classes from k on, without the target's term of a class index.
  TLK_INLINE V q_at(const P* q, int64_t k, int n) const {
    V v = q ? load_some(q + k, n, A(0)) * keep + spread : set1(spread);
    return weight ? v * load_some(weight + k, n, A(0)) : v;
  }

  // A row's sum of q_c, and of q_c * (peak - f_c).
  struct Target {
    A q = 0, q_distance = 0;
  };

  void write_loss(int64_t row, A peak, A log_sum, Target t) const {
    if (!c.loss) return;
    A value = t.q_distance * to_z + t.q * log_sum;
    if (c.z_loss != 0) {
      A lse = peak * to_z + log_sum;
      value += A(c.z_loss) * lse * lse;
    }
    static_cast<A*>(c.loss)[row] = value * row_weight(row);
  }
  // `expectation`: the sum of e_c * (f_c - peak), with 0 * -inf = 0.
  void write_entropy(int64_t row, A log_sum, A expectation, A inv_sum) const {
    if (computes_entropy()) static_cast<A*>(c.entropy)[row] = log_sum - expectation * to_z * inv_sum;
  }
  bool computes_entropy() const { return c.entropy && !c.normaliser_given; }

  // The results of a row that does not take part.
  void write_absent(int64_t row) const {
    if (c.loss) static_cast<A*>(c.loss)[row] = 0;
    if (c.correct) c.correct[row] = false;
    if (peak_ && !c.normaliser_given) peak_[row] = log_sum_[row] = 0;
    if (computes_entropy()) static_cast<A*>(c.entropy)[row] = 0;
  }

  // dx_c = (g * (e_c * p - q_c) + e_c * rest) * T * dz / dx, with e_c = 2^((f_c - peak) * to_exp2). e_c * p - q_c has
  // one product, so that it is exactly 0 where p_c is 1, however the compiler fuses; the part of z-loss and lse is
  // rounded apart from it. The entropy's gradient adds h * (f_c - peak - mean) to `rest`, where `mean` is the
  // expectation of f_c - peak.
  struct Coefficients {
    A p, g, rest, h = 0, mean = 0;
  };
  static TLK_INLINE V join(V e, V q, V p, V g, V rest) { return (e * p - q) * g + e * rest; }
  static TLK_INLINE V with_entropy(V e, V distance, V rest, V h, V mean) {
    return e == A(0) ? V{} : rest + (distance - mean) * h;  // also where distance is -inf
  }
  Coefficients coefficients(int64_t row, A peak, A log_sum, A inv_sum, A q) const {
    const A g = per_position(c.grad_loss, row) * row_weight(row) * inv_t;
    A rest = per_position(c.grad_lse, row) * inv_t;
    if (c.z_loss != 0) rest += g * A(2 * c.z_loss) * (peak * to_z + log_sum);
    Coefficients co{q * inv_sum, g, rest * inv_sum};
    if (c.grad_entropy.data) {
      co.h = -per_position(c.grad_entropy, row) * inv_t * to_z * inv_sum;
      co.mean = (log_sum - static_cast<const A*>(c.entropy)[row]) / to_z;
    }
    return co;
  }

  // The first largest element; NaN counts as the largest, as in torch.argmax. Of contiguous elements only the blocks
  // with a larger one are searched one by one.
  template <class E>
  static int64_t argmax(const E* p, int64_t stride, int64_t n) {
    constexpr int64_t kSearched = 256;
    int64_t best = 0;
    A largest = load1(p);
    for (int64_t begin = 0; begin < n && largest == largest; begin += kSearched) {
      const int64_t end = begin + kSearched < n ? begin + kSearched : n;
      if (stride == 1 && !exceeds(p, begin, end, largest)) continue;
      for (int64_t k = begin; k < end && largest == largest; ++k) {
        const A value = load1(p + k * stride);
        if (value > largest || value != value) best = k, largest = value;
      }
    }
    return best;
  }
  // Whether one of the contiguous elements is larger than `limit`, or NaN.
  template <class E>
  static bool exceeds(const E* p, int64_t begin, int64_t end, A limit) {
    V larger[kSlots] = {};
    sweep<A>(begin, end, [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
      larger[slot] = load_some(p + k, n, limit) <= limit ? larger[slot] : set1(A(1));
    });
    return reduce_max<A>(max_of_slots(larger)) != A(0);
  }
  void write_correct(int64_t row, const T* x, const P* q) const {
    int64_t truth = c.indices ? c.indices[row] : argmax(q, c.probabilities.class_stride, c.classes);
    c.correct[row] = argmax(x, c.x.class_stride, c.classes) == truth;
  }
};

}  // namespace TLK_ISA
}  // namespace tlk
