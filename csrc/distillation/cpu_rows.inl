// Distillation on a CPU: loss and gradients of a row. With u_k the logits of side k divided by the temperature,
// p_k = softmax(u_k), D the divergence and slope_k = dD / dp_k, in which constants drop out:
//
//   dD / du_k = p_k * (slope_k - sum of p_k * slope_k)
//
//   kl: slope_0 = log(p_0 / p_1), with sum of p_0 * slope_0 = D;   slope_1 = -p_0 / p_1, so dD / du_1 = p_1 - p_0
//   js: slope_k = share_k * log(p_k / m),     m = share_0 * p_0 + share_1 * p_1
//   tv: slope_k = +-1/2, the sign of p_k - p_other
//
// The student's gradient has the term hard * (softmax(x) - smoothed target) too. A common offset of the logits costs no
// accuracy, since log p_k = (x_k - peak_k) / T - log_sum_k. A row is read from memory once: its later sweeps read it,
// or what was kept of it, from cache.
//
// With a softcap x = softcap * f, f = tanh(logit / softcap). The first sweep keeps f. Differences of x are computed as
// softcap * (difference of f). The gradient by the logit has the factor (1 - f) * (1 + f): small near the cap, so it is
// computed from f, not from x, which is rounded again.
#include "kernel.h"
#include "../core/cpu/sweep.h"

namespace tlk {
namespace TLK_ISA {

// The type of f: of the logits, or with kCap the compute type.
template <bool kCap, class A, class T>
struct Kept {
  using type = T;
};
template <class A, class T>
struct Kept<true, A, T> {
  using type = A;
};

// kCap: a side has a softcap. One without has f = x and a cap of 1.
template <class T, Divergence kD, bool kHard, bool kCap>
struct DistillationKernel {
  using A = typename Compute<T>::type;
  using V = Vec<A>;
  using F = typename Kept<kCap, A, T>::type;
  static constexpr A kLowest = -A(__builtin_inf());
  // Classes per block, which has sums of its own so that rounding errors stay small: in float 4 vectors of sums with 32
  // terms each. A block of both sides takes at most half the first-level cache.
  static constexpr int64_t kBlock = 32 * TLK_VEC_BYTES;
  static_assert(kBlock >= kLeastBlock, "room for the peaks");
  static constexpr int64_t kAhead = 2048 / int64_t(sizeof(T));  // a gradient's sweep fetches half a page ahead

  const Distillation& c;
  const A inv_t;
  const ScaledExp2<A> exp_t, exp;  // exp(x / T) and exp(x) for x up to 0
  const A cap[2];
  A* const kept[2];        // each side's exponentials, each block's relative to the peak so far
  A* const block_peak[2];  // those peaks
  A* const capped[2];      // with kCap each side's f

  DistillationKernel(const Distillation& call, void* memory)
      : c(call),
        inv_t(A(call.inv_temperature)),
        exp_t(call.inv_temperature * kLog2E),
        exp(kLog2E),
        cap{cap_of(call.side[0]), cap_of(call.side[1])},
        kept{static_cast<A*>(memory), kept[0] + whole_vectors(call.classes)},
        block_peak{kept[1] + whole_vectors(call.classes), block_peak[0] + blocks_of(call.classes)},
        capped{block_peak[1] + blocks_of(call.classes), capped[0] + whole_vectors(call.classes)} {}
  static A cap_of(const Side& side) { return side.softcap != 0 ? A(side.softcap) : A(1); }

  // What a sweep fetches while it computes: the hardware stops at the end of a page.
  struct Fetch {
    const T *first, *second;
    TLK_INLINE void at(int64_t k) const {
      __builtin_prefetch(first + k, 0, 3);
      __builtin_prefetch(second + k, 0, 3);
    }
  };
  struct Row {
    const T* x[2];     // logits
    const F* f[2];     // with kCap in scratch, else the logits
    T* grad[2];        // may be null
    const T* next[2];  // the next row
    Fetch grads() const {
      const T* const any = grad[0] ? grad[0] : grad[1] ? grad[1] : next[0];
      return {any, grad[0] && grad[1] ? grad[1] : any};
    }
  };

  // Results of the first sweep. Sums are relative to the peak, which is one of f; `hard_` sums are without the
  // temperature.
  struct Sums {
    A peak[2] = {kLowest, kLowest};
    double sum[2] = {};
    double distance = 0;       // kl: sum of e_0 * ((x_0 - peak_0) - (x_1 - peak_1))
    double hard_sum = 0;       // of the student's exponentials
    double hard_distance = 0;  // sum of peak - x over all classes, for label smoothing
  };

  static int64_t offset(const int64_t* stride, int64_t i, int64_t inner) {
    return i / inner * stride[0] + i % inner * stride[1];
  }
  static A per_row(const PerPosition& value, int64_t i) {
    return value.data ? static_cast<const A*>(value.data)[i * value.stride] : A(1);
  }
  int64_t end_of(int64_t begin) const { return begin + kBlock < c.classes ? begin + kBlock : c.classes; }

  // A difference of f on a side, as one of x.
  template <class Number>
  TLK_INLINE Number of_x(Number difference, int side) const {
    if constexpr (kCap)
      return difference * cap[side];
    else
      return difference;
  }
  // x minus the peak, at n classes from k on.
  TLK_INLINE V below(const Row& row, int side, A peak, int64_t k, int n) const {
    return of_x(load_some(row.f[side] + k, n, A(0)) - peak, side);
  }
  // The gradient by the logits, of that by x.
  TLK_INLINE V through_cap(V d, const Row& row, int side, int64_t k, int n) const {
    if constexpr (kCap)
      if (c.side[side].softcap != 0) {
        const V f = load_some(row.f[side] + k, n, A(0));
        return d * ((A(1) - f) * (A(1) + f));
      }
    return d;
  }

  // The largest f; with kCap also keeps each.
  TLK_INLINE A block_max(const Row& row, int side, int64_t begin, int64_t end) const {
    V m[kSlots] = {set1(kLowest), set1(kLowest), set1(kLowest), set1(kLowest)};
    sweep<A>(begin, end, [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
      V f = load_some(row.x[side] + k, n, kLowest);
      if constexpr (kCap) {
        if (c.side[side].softcap != 0) f = tanh(f / cap[side]);
        if (n < lanes<A>) f = iota<A>() < n ? f : set1(kLowest);  // not -1, which may exceed every f
        store(capped[side] + k, f);
      }
      m[slot] = vmax(f, m[slot]);
    });
    return reduce_max<A>(max_of_slots(m));
  }

  // Makes the sums over the first `count` classes relative to `top`, on sides where it is larger.
  void raise(Sums& z, const A* top, int64_t count) const {
    double shift[2] = {};
    for (int side = 0; side < 2; ++side) {
      if (!(top[side] > z.peak[side])) continue;
      shift[side] = of_x(double(z.peak[side]) - double(top[side]), side);
      const double factor = z.sum[side] == 0 ? 0 : double(exp_t(set1(A(shift[side])))[0]);
      z.sum[side] *= factor;
      if (side == 0 && factor == 0) z.distance = 0;  // it may be infinite
      if (side == 0) z.distance *= factor;
      if (kHard && side == c.student && count) {
        z.hard_sum *= double(exp(set1(A(shift[side])))[0]);
        z.hard_distance -= double(count) * shift[side];
      }
      z.peak[side] = top[side];
    }
    if (kD == Divergence::kl && z.sum[0] != 0) z.distance += z.sum[0] * (shift[0] - shift[1]);
  }

  // Peaks and sums, block by block: a block stays in the first-level cache for both of its sweeps.
  void add_up(const Row& row, Sums& z) const {
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      const int64_t end = end_of(begin);
      const A top[2] = {block_max(row, 0, begin, end), block_max(row, 1, begin, end)};
      raise(z, top, begin);
      A peak[2];
      for (int side = 0; side < 2; ++side) {
        block_peak[side][begin / kBlock] = z.peak[side];
        peak[side] = z.peak[side] == kLowest ? A(0) : z.peak[side];  // only -inf so far: exponentials 0
      }
      const Fetch ahead = end < c.classes ? Fetch{row.x[0] + end, row.x[1] + end} : row.grads();
      Chains<A> s0, s1, distance, hard, hard_distance;
      sweep<A>(begin, end, [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
        ahead.at(k - begin);
        const V d0 = below(row, 0, peak[0], k, n), d1 = below(row, 1, peak[1], k, n);
        const V e0 = exp_t(d0), e1 = exp_t(d1);
        s0.part[slot] += only<A>(e0, n);
        s1.part[slot] += only<A>(e1, n);
        store(kept[0] + k, e0);
        store(kept[1] + k, e1);
        if constexpr (kD == Divergence::kl) distance.part[slot] += only<A>(e0 == A(0) ? V{} : e0 * (d0 - d1), n);
        if constexpr (kHard) {
          const V d = c.student ? d1 : d0;
          hard.part[slot] += only<A>(exp(d), n);
          hard_distance.part[slot] -= only<A>(d, n);
        }
      });
      z.sum[0] += double(s0.sum());
      z.sum[1] += double(s1.sum());
      if constexpr (kD == Divergence::kl) z.distance += double(distance.sum());
      if constexpr (kHard) {
        z.hard_sum += double(hard.sum());
        z.hard_distance += double(hard_distance.sum());
      }
    }
    for (int side = 0; side < 2; ++side)
      if (z.peak[side] == kLowest) z.sum[side] = __builtin_nan("");
  }

  // The two distributions, once their sums are known.
  struct Distributions {
    A peak[2];
    A scale[2];           // share / sum
    A log_sum[2];         // js
    double log_sum_rest;  // js: sum of the shares times the rounding errors of log_sum
    A mean[2];            // mean slopes; in kl the mean distance, since its gradient needs no log_sum
  };

  // p of both sides at a vector of classes from k on, in js times the shares. `scale` is block_scale's.
  struct Pair {
    V p[2];
  };
  TLK_INLINE Pair probabilities(const A* scale, int64_t k) const {
    return {{load(kept[0] + k) * scale[0], load(kept[1] + k) * scale[1]}};
  }
  // p = scale * (kept exponential), for the block that starts at `begin`.
  void block_scale(const Distributions& both, int64_t begin, A* scale) const {
    for (int side = 0; side < 2; ++side) {
      const A shift = of_x(block_peak[side][begin / kBlock] - both.peak[side], side);
      scale[side] = shift == 0 ? both.scale[side] : both.scale[side] * exp_t(set1(shift))[0];
    }
  }

  // What both slopes need: in js the mixture's logarithm, in tv the sign of p_0 - p_1, times 1/2.
  TLK_INLINE V common(const Pair& pair) const {
    if constexpr (kD == Divergence::js) return log_normal(pair.p[0] + pair.p[1]);
    const V difference = pair.p[0] - pair.p[1];
    return difference > A(0) ? set1(A(0.5)) : difference < A(0) ? set1(A(-0.5)) : difference;
  }
  // The slope without the share, which is in p.
  template <int kSide>
  TLK_INLINE V slope(const Row& row, const Distributions& both, V common, int64_t k, int n) const {
    if constexpr (kD == Divergence::js)
      return below(row, kSide, both.peak[kSide], k, n) * inv_t - both.log_sum[kSide] - common;
    return kSide ? -common : common;
  }

  // js and tv: returns the divergence, and computes the mean slopes of the sides whose gradients are wanted. A product
  // with p = 0 is 0, even if the logarithm is infinite. If one gradient is wanted, its slopes overwrite the other
  // side's exponentials.
  template <bool kGrad0, bool kGrad1>
  double compare(const Row& row, Distributions& both) const {
    double total = 0, means[2] = {};
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      A scale[2];
      block_scale(both, begin, scale);
      Chains<A> divergence, mean0, mean1;
      sweep<A>(begin, end_of(begin), [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
        const Pair pair = probabilities(scale, k);
        const V shared = common(pair);
        const V s0 = slope<0>(row, both, shared, k, n), s1 = slope<1>(row, both, shared, k, n);
        const V m0 = only<A>(pair.p[0] == A(0) ? V{} : pair.p[0] * s0, n);
        const V m1 = only<A>(pair.p[1] == A(0) ? V{} : pair.p[1] * s1, n);
        if constexpr (kGrad0) mean0.part[slot] += m0;
        if constexpr (kGrad1) mean1.part[slot] += m1;
        divergence.part[slot] += kD == Divergence::tv ? only<A>((pair.p[0] - pair.p[1]) * s0, n) : m0 + m1;
        if constexpr (kGrad0 != kGrad1) store(kept[kGrad0 ? 1 : 0] + k, kGrad0 ? s0 : s1);
      });
      total += double(divergence.sum());
      means[0] += double(mean0.sum());
      means[1] += double(mean1.sum());
    }
    for (int side = 0; side < 2; ++side) both.mean[side] = A(means[side] / share(side));
    return total - both.log_sum_rest;
  }
  // Rounded to A as in the kernels, so that a single class has a mixture of exactly 1.
  double share(int side) const { return kD == Divergence::js ? double(A(c.side[side].share)) : 1; }

  // The gradient of the cross entropy: factor * (softmax(x) - keep * [class is the target] - spread).
  struct Hard {
    A factor, inv_sum, keep, spread;
    int64_t target;
  };

  template <bool kGrad0, bool kGrad1>
  void write_gradients(const Row& row, const Distributions& both, A factor, Hard hard) const {
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      const int64_t end = end_of(begin);
      A scale[2];
      block_scale(both, begin, scale);
      const Fetch grads = row.grads();
      const Fetch ahead = end == c.classes ? Fetch{row.next[0], row.next[1]}
                                           : Fetch{grads.first + begin + kAhead, grads.second + begin + kAhead};
      sweep<A>(begin, end, [&](int64_t k, int, int n) __attribute__((always_inline)) {
        ahead.at(k - begin);
        const Pair pair = probabilities(scale, k);
        V d0{}, d1{};
        if constexpr (kD == Divergence::kl) {
          if constexpr (kGrad0) {
            const V distance = below(row, 0, both.peak[0], k, n) - below(row, 1, both.peak[1], k, n);
            d0 = pair.p[0] == A(0) ? V{} : pair.p[0] * (distance - both.mean[0]) * (factor * inv_t);
          }
          if constexpr (kGrad1) d1 = (pair.p[1] - pair.p[0]) * factor;
        } else {
          V s0{}, s1{};
          if constexpr (kGrad0 != kGrad1) {
            (kGrad0 ? s0 : s1) = load(kept[kGrad0 ? 1 : 0] + k);
          } else {
            const V shared = common(pair);
            s0 = slope<0>(row, both, shared, k, n), s1 = slope<1>(row, both, shared, k, n);
          }
          if constexpr (kGrad0) d0 = pair.p[0] == A(0) ? V{} : pair.p[0] * (s0 - both.mean[0]) * factor;
          if constexpr (kGrad1) d1 = pair.p[1] == A(0) ? V{} : pair.p[1] * (s1 - both.mean[1]) * factor;
        }
        if constexpr (kHard) {
          const int student = c.student;
          const V e = exp(below(row, student, both.peak[student], k, n));
          const V target_p = iota<A>() == typename Simd<A>::Index(hard.target - k) ? set1(hard.keep) : V{};
          (student ? d1 : d0) += (e * hard.inv_sum - (target_p + hard.spread)) * hard.factor;
        }
        if constexpr (kGrad0) store_some(row.grad[0] + k, n, through_cap(d0, row, 0, k, n));
        if constexpr (kGrad1) store_some(row.grad[1] + k, n, through_cap(d1, row, 1, k, n));
      });
    }
  }

  void row(int64_t i) const {
    Row row;
    const int64_t next = i + 1 < c.rows ? i + 1 : i;
    for (int side = 0; side < 2; ++side) {
      const Side& s = c.side[side];
      row.x[side] = static_cast<const T*>(s.x) + offset(s.stride, i, c.inner);
      if constexpr (kCap)
        row.f[side] = capped[side];
      else
        row.f[side] = row.x[side];
      row.next[side] = static_cast<const T*>(s.x) + offset(s.stride, next, c.inner);
      row.grad[side] = s.grad ? static_cast<T*>(s.grad) + offset(s.grad_stride, i, c.inner) : nullptr;
    }
    if ((c.target && c.target[i] == c.ignore_index) || per_row(c.row_weight, i) == 0) return ignore(row, i);
    if (row.grad[0])
      row.grad[1] ? compute<true, true>(row, i) : compute<true, false>(row, i);
    else
      row.grad[1] ? compute<false, true>(row, i) : compute<false, false>(row, i);
  }

  void ignore(const Row& row, int64_t i) const {
    if (c.loss) static_cast<A*>(c.loss)[i] = 0;
    for (T* grad : row.grad)
      if (grad)
        sweep<A>(0, c.classes,
                 [&](int64_t k, int, int n) __attribute__((always_inline)) { store_some(grad + k, n, V{}); });
  }

  template <bool kGrad0, bool kGrad1>
  void compute(const Row& row, int64_t i) const {
    Sums z;
    add_up(row, z);
    Distributions both{};
    for (int side = 0; side < 2; ++side) {
      both.peak[side] = z.peak[side];
      both.scale[side] = A(share(side) / z.sum[side]);
      if constexpr (kD == Divergence::js) {
        const double log_sum = ::log(share(side) / double(both.scale[side]));  // of the rounded scale, as p is
        both.log_sum[side] = A(log_sum);
        both.log_sum_rest += share(side) * (log_sum - double(both.log_sum[side]));
      }
    }
    double divergence;
    if constexpr (kD == Divergence::kl) {
      const double mean = z.distance / z.sum[0];
      divergence = mean * c.inv_temperature + ::log(z.sum[1] / z.sum[0]);
      both.mean[0] = A(mean);
    } else {
      divergence = compare<kGrad0, kGrad1>(row, both);
    }

    const double weight = double(per_row(c.row_weight, i));
    if (c.loss) {
      double value = c.soft * divergence;
      if constexpr (kHard) value += c.hard * cross_entropy(row, z, i);
      static_cast<A*>(c.loss)[i] = A(weight * value);
    }
    if constexpr (kGrad0 || kGrad1) {
      const double upstream = weight * double(per_row(c.grad_loss, i));
      Hard hard{};
      if constexpr (kHard)
        hard = {A(upstream * c.hard), A(1 / z.hard_sum), A(1 - c.smoothing), A(c.smoothing / double(c.classes)),
                c.target[i]};
      write_gradients<kGrad0, kGrad1>(row, both, A(upstream * c.soft * c.inv_temperature), hard);
    }
  }

  double cross_entropy(const Row& row, const Sums& z, int64_t i) const {
    const double distance = of_x(double(z.peak[c.student]) - double(load1(row.f[c.student] + c.target[i])), c.student);
    double value = ::log(z.hard_sum) + (1 - c.smoothing) * distance;
    if (c.smoothing != 0) value += c.smoothing / double(c.classes) * z.hard_distance;
    return value;
  }
};

}  // namespace TLK_ISA
}  // namespace tlk
