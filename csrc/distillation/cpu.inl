// Distillation for one instruction set: loss and gradients of a row. With u_k the logits of side k over the
// temperature, p_k = softmax(u_k), D the divergence and slope_k = dD / dp_k (a constant in it drops out):
//
//   dD / du_k = p_k * (slope_k - sum of p_k * slope_k)
//
//   kl: slope_0 = log(p_0 / p_1), of sum D;   slope_1 = -p_0 / p_1, of sum -1, which leaves p_1 - p_0
//   js: slope_k = share_k * log(p_k / m),     m = share_0 * p_0 + share_1 * p_1
//   tv: slope_k = +-1/2, the sign of p_k - p_other
//
// and for the student also hard * (softmax(x) - smoothed target). log p_k = (x_k - peak_k) / T - log_sum_k, so a common
// offset of the logits costs no accuracy. A row is read from memory once: its later sweeps find it, or what was kept of
// it, in cache.
#include "kernel.h"
#include "../core/cpu/sweep.h"

namespace tlk {
namespace TLK_ISA {

template <class T, Divergence kD, bool kHard>
struct DistillationKernel {
  using A = typename Compute<T>::type;
  using V = Vec<A>;
  static constexpr double kLog2E = 1.4426950408889634074;
  static constexpr A kLowest = -A(__builtin_inf());
  // Classes that are summed at a time, before rounding errors add up: in float in 4 vectors of sums, 32 terms each. Of
  // both sides they are at most half the first-level cache.
  static constexpr int64_t kBlock = 32 * TLK_VEC_BYTES;
  static_assert(kBlock >= kLeastBlock, "room for the peaks");
  static constexpr int64_t kAhead = 2048 / int64_t(sizeof(T));  // fetched ahead of a gradient's sweep: half a page

  const Distillation& c;
  const A inv_t;
  const ScaledExp2<A> exp_t, exp;  // exp(x / T) and exp(x), x up to 0
  A* const kept[2];                // each side's exponentials, each block's from the peak so far
  A* const from[2];                // those peaks

  DistillationKernel(const Distillation& call, void* memory)
      : c(call),
        inv_t(A(call.inv_temperature)),
        exp_t(call.inv_temperature * kLog2E),
        exp(kLog2E),
        kept{static_cast<A*>(memory), static_cast<A*>(memory) + whole_vectors(call.classes)},
        from{static_cast<A*>(memory) + 2 * whole_vectors(call.classes),
             static_cast<A*>(memory) + 2 * whole_vectors(call.classes) + blocks_of(call.classes)} {}

  // What a sweep fetches while it computes: the hardware does not look past a page.
  struct Fetch {
    const T *first, *second;
    TLK_INLINE void at(int64_t k) const {
      __builtin_prefetch(first + k, 0, 3);
      __builtin_prefetch(second + k, 0, 3);
    }
  };
  struct Row {
    const T* x[2];
    T* grad[2];        // may be null
    const T* next[2];  // the following row
    Fetch grads() const {
      const T* const any = grad[0] ? grad[0] : grad[1] ? grad[1] : next[0];
      return {any, grad[0] && grad[1] ? grad[1] : any};
    }
  };

  // What the first sweep finds. Sums are from the peak, the hard ones without the temperature.
  struct Sums {
    A peak[2] = {kLowest, kLowest};
    double sum[2] = {};
    double distance = 0;       // kl: sum of e_0 * ((x_0 - peak_0) - (x_1 - peak_1))
    double hard_sum = 0;       // of the student's exponentials
    double hard_distance = 0;  // sum of peak - x over all classes, with label smoothing
  };

  static int64_t offset(const int64_t* stride, int64_t i, int64_t inner) {
    return i / inner * stride[0] + i % inner * stride[1];
  }
  static A per_row(const PerPosition& value, int64_t i) {
    return value.data ? static_cast<const A*>(value.data)[i * value.stride] : A(1);
  }
  int64_t end_of(int64_t begin) const { return begin + kBlock < c.classes ? begin + kBlock : c.classes; }

  static TLK_INLINE A block_max(const T* x, int64_t begin, int64_t end) {
    V m[kSlots] = {set1(kLowest), set1(kLowest), set1(kLowest), set1(kLowest)};
    sweep<A>(begin, end, [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
      m[slot] = vmax(load_some(x + k, n, kLowest), m[slot]);
    });
    return reduce_max<A>(vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
  }

  // Takes what is summed over the first `done` classes to the larger peaks.
  void raise(Sums& z, const A* top, int64_t done) const {
    double shift[2] = {};
    for (int side = 0; side < 2; ++side) {
      if (!(top[side] > z.peak[side])) continue;
      shift[side] = double(z.peak[side]) - double(top[side]);
      const double factor = z.sum[side] == 0 ? 0 : double(exp_t(set1(A(shift[side])))[0]);
      z.sum[side] *= factor;
      if (side == 0 && factor == 0) z.distance = 0;  // it may be infinite
      if (side == 0) z.distance *= factor;
      if (kHard && side == c.student && done) {
        z.hard_sum *= double(exp(set1(A(shift[side])))[0]);
        z.hard_distance -= double(done) * shift[side];
      }
      z.peak[side] = top[side];
    }
    if (kD == Divergence::kl && z.sum[0] != 0) z.distance += z.sum[0] * (shift[0] - shift[1]);
  }

  // Peaks and sums, block by block so that each is in the first-level cache for both its sweeps.
  void add_up(const Row& row, Sums& z) const {
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      const int64_t end = end_of(begin);
      const A top[2] = {block_max(row.x[0], begin, end), block_max(row.x[1], begin, end)};
      raise(z, top, begin);
      A peak[2];
      for (int side = 0; side < 2; ++side) {
        from[side][begin / kBlock] = z.peak[side];
        peak[side] = z.peak[side] == kLowest ? A(0) : z.peak[side];  // so far -inf alone: their exponentials are 0
      }
      const Fetch ahead = end < c.classes ? Fetch{row.x[0] + end, row.x[1] + end} : row.grads();
      Chains<A> s0, s1, distance, hard, hard_distance;
      sweep<A>(begin, end, [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
        ahead.at(k - begin);
        const V d0 = load_some(row.x[0] + k, n, A(0)) - peak[0], d1 = load_some(row.x[1] + k, n, A(0)) - peak[1];
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
    double log_sum_rest;  // what rounding took from them, times the shares
    A mean[2];            // of the slope; for kl of the distance, since its gradient needs no log_sum
  };

  // p of both sides at classes k to k + n of the block whose exponentials have that scale; for js times the shares.
  struct Pair {
    V p[2];
  };
  TLK_INLINE Pair probabilities(const A* scale, int64_t k) const {
    return {{load(kept[0] + k) * scale[0], load(kept[1] + k) * scale[1]}};
  }
  void block_scale(const Distributions& of, int64_t begin, A* scale) const {
    for (int side = 0; side < 2; ++side) {
      const A shift = from[side][begin / kBlock] - of.peak[side];
      scale[side] = shift == 0 ? of.scale[side] : of.scale[side] * exp_t(set1(shift))[0];
    }
  }

  // The mixture's logarithm for js, or the signs of p_0 - p_1 times 1/2 for tv: all that slopes need beside the logits.
  TLK_INLINE V common(const Pair& pair) const {
    if constexpr (kD == Divergence::js) return log_normal(pair.p[0] + pair.p[1]);
    const V difference = pair.p[0] - pair.p[1];
    return difference > A(0) ? set1(A(0.5)) : difference < A(0) ? set1(A(-0.5)) : difference;
  }
  // Without the share, which is in p.
  template <int kSide>
  TLK_INLINE V slope(const Row& row, const Distributions& of, V common, int64_t k, int n) const {
    if constexpr (kD == Divergence::js)
      return (load_some(row.x[kSide] + k, n, A(0)) - of.peak[kSide]) * inv_t - of.log_sum[kSide] - common;
    return kSide ? -common : common;
  }

  // js and tv: the divergence, and the mean slopes of the sides whose gradients are wanted. Where p is 0 so is its
  // product, whatever the logarithms. The slope of a single such side is kept in the place of the other's exponentials.
  template <bool kOf0, bool kOf1>
  double compare(const Row& row, Distributions& of) const {
    double total = 0, means[2] = {};
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      A scale[2];
      block_scale(of, begin, scale);
      Chains<A> divergence, mean0, mean1;
      sweep<A>(begin, end_of(begin), [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
        const Pair pair = probabilities(scale, k);
        const V both = common(pair);
        const V s0 = slope<0>(row, of, both, k, n), s1 = slope<1>(row, of, both, k, n);
        const V m0 = only<A>(pair.p[0] == A(0) ? V{} : pair.p[0] * s0, n);
        const V m1 = only<A>(pair.p[1] == A(0) ? V{} : pair.p[1] * s1, n);
        if constexpr (kOf0) mean0.part[slot] += m0;
        if constexpr (kOf1) mean1.part[slot] += m1;
        divergence.part[slot] += kD == Divergence::tv ? only<A>((pair.p[0] - pair.p[1]) * s0, n) : m0 + m1;
        if constexpr (kOf0 != kOf1) store(kept[kOf0 ? 1 : 0] + k, kOf0 ? s0 : s1);
      });
      total += double(divergence.sum());
      means[0] += double(mean0.sum());
      means[1] += double(mean1.sum());
    }
    for (int side = 0; side < 2; ++side) of.mean[side] = A(means[side] / share(side));
    return total - of.log_sum_rest;
  }
  // As rounded, so that of a single class the mixture is 1.
  double share(int side) const { return kD == Divergence::js ? double(A(c.side[side].share)) : 1; }

  struct Hard {
    A factor, inv_sum, keep, spread;  // softmax(x) - keep * [class is the target] - spread, times factor
    int64_t target;
  };

  template <bool kOf0, bool kOf1>
  void write_gradients(const Row& row, const Distributions& of, A factor, Hard hard) const {
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      const int64_t end = end_of(begin);
      A scale[2];
      block_scale(of, begin, scale);
      const Fetch grads = row.grads();
      const Fetch ahead = end == c.classes ? Fetch{row.next[0], row.next[1]}
                                           : Fetch{grads.first + begin + kAhead, grads.second + begin + kAhead};
      sweep<A>(begin, end, [&](int64_t k, int, int n) __attribute__((always_inline)) {
        ahead.at(k - begin);
        const Pair pair = probabilities(scale, k);
        V d0{}, d1{};
        if constexpr (kD == Divergence::kl) {
          if constexpr (kOf0) {
            const V distance =
                (load_some(row.x[0] + k, n, A(0)) - of.peak[0]) - (load_some(row.x[1] + k, n, A(0)) - of.peak[1]);
            d0 = pair.p[0] == A(0) ? V{} : pair.p[0] * (distance - of.mean[0]) * (factor * inv_t);
          }
          if constexpr (kOf1) d1 = (pair.p[1] - pair.p[0]) * factor;
        } else {
          V s0{}, s1{};
          if constexpr (kOf0 != kOf1) {
            (kOf0 ? s0 : s1) = load(kept[kOf0 ? 1 : 0] + k);
          } else {
            const V both = common(pair);
            s0 = slope<0>(row, of, both, k, n), s1 = slope<1>(row, of, both, k, n);
          }
          if constexpr (kOf0) d0 = pair.p[0] == A(0) ? V{} : pair.p[0] * (s0 - of.mean[0]) * factor;
          if constexpr (kOf1) d1 = pair.p[1] == A(0) ? V{} : pair.p[1] * (s1 - of.mean[1]) * factor;
        }
        if constexpr (kHard) {
          const int student = c.student;
          const V e = exp(load_some(row.x[student] + k, n, A(0)) - of.peak[student]);
          const V own = iota<A>() == typename Simd<A>::Index(hard.target - k) ? set1(hard.keep) : V{};
          (student ? d1 : d0) += (e * hard.inv_sum - (own + hard.spread)) * hard.factor;
        }
        if constexpr (kOf0) store_some(row.grad[0] + k, n, d0);
        if constexpr (kOf1) store_some(row.grad[1] + k, n, d1);
      });
    }
  }

  void row(int64_t i) const {
    Row row;
    const int64_t following = i + 1 < c.rows ? i + 1 : i;
    for (int side = 0; side < 2; ++side) {
      const Side& of = c.side[side];
      row.x[side] = static_cast<const T*>(of.x) + offset(of.stride, i, c.inner);
      row.next[side] = static_cast<const T*>(of.x) + offset(of.stride, following, c.inner);
      row.grad[side] = of.grad ? static_cast<T*>(of.grad) + offset(of.grad_stride, i, c.inner) : nullptr;
    }
    if (c.target && c.target[i] == c.ignore_index) return ignore(row, i);
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

  template <bool kOf0, bool kOf1>
  void compute(const Row& row, int64_t i) const {
    Sums z;
    add_up(row, z);
    Distributions of{};
    for (int side = 0; side < 2; ++side) {
      of.peak[side] = z.peak[side];
      of.scale[side] = A(share(side) / z.sum[side]);
      if constexpr (kD == Divergence::js) {
        const double log_sum = ::log(share(side) / double(of.scale[side]));  // so that log p is that of p as rounded
        of.log_sum[side] = A(log_sum);
        of.log_sum_rest += share(side) * (log_sum - double(of.log_sum[side]));
      }
    }
    double divergence;
    if constexpr (kD == Divergence::kl) {
      const double mean = z.distance / z.sum[0];
      divergence = mean * c.inv_temperature + ::log(z.sum[1] / z.sum[0]);
      of.mean[0] = A(mean);
    } else {
      divergence = compare<kOf0, kOf1>(row, of);
    }

    const double weight = double(per_row(c.row_weight, i));
    if (c.loss) {
      double value = c.soft * divergence;
      if constexpr (kHard) value += c.hard * cross_entropy(row, z, i);
      static_cast<A*>(c.loss)[i] = A(weight * value);
    }
    if constexpr (kOf0 || kOf1) {
      const double upstream = weight * double(per_row(c.grad_loss, i));
      Hard hard{};
      if constexpr (kHard)
        hard = {A(upstream * c.hard), A(1 / z.hard_sum), A(1 - c.smoothing), A(c.smoothing / double(c.classes)),
                c.target[i]};
      write_gradients<kOf0, kOf1>(row, of, A(upstream * c.soft * c.inv_temperature), hard);
    }
  }

  double cross_entropy(const Row& row, const Sums& z, int64_t i) const {
    const double own = double(z.peak[c.student]) - double(load1(row.x[c.student] + c.target[i]));
    double value = ::log(z.hard_sum) + (1 - c.smoothing) * own;
    if (c.smoothing != 0) value += c.smoothing / double(c.classes) * z.hard_distance;
    return value;
  }
};

template <class T, Divergence kD, bool kHard>
void distillation_rows(const Distillation& call, int64_t begin, int64_t end, void* kept) {
  const DistillationKernel<T, kD, kHard> kernel(call, kept);
  for (int64_t i = begin; i < end; ++i) kernel.row(i);
}

template <class T>
DistillationRows distillation_of(Divergence divergence, bool hard) {
  switch (divergence) {
    case Divergence::kl:
      return hard ? distillation_rows<T, Divergence::kl, true> : distillation_rows<T, Divergence::kl, false>;
    case Divergence::js:
      return hard ? distillation_rows<T, Divergence::js, true> : distillation_rows<T, Divergence::js, false>;
    default:
      return hard ? distillation_rows<T, Divergence::tv, true> : distillation_rows<T, Divergence::tv, false>;
  }
}

DistillationRows distillation(Scalar logits, Divergence divergence, bool hard) {
  switch (logits) {
    case Scalar::f64:
      return distillation_of<double>(divergence, hard);
    case Scalar::f32:
      return distillation_of<float>(divergence, hard);
    case Scalar::bf16:
      return distillation_of<bf16>(divergence, hard);
    default:
      return distillation_of<f16>(divergence, hard);
  }
}

}  // namespace TLK_ISA
}  // namespace tlk
