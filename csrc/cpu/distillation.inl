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
#include "distillation.h"
#include "sweep.h"

namespace tlk {
namespace TLK_ISA {

template <class T, Divergence kD, bool kHard, bool kKeeps>
struct DistillationKernel {
  using A = typename Compute<T>::type;
  using V = Vec<A>;
  static constexpr int L = lanes<A>;
  static constexpr A kLog2E = A(1.4426950408889634074);
  static constexpr A kLowest = -A(__builtin_inf());
  static constexpr int64_t kBlock = 2048;  // classes per block: of both sides at most the first-level cache
  static constexpr int kBlocks = int(kMaxKept / kBlock);
  static constexpr int64_t kAhead = 2048 / int64_t(sizeof(T));  // fetched ahead of a gradient's sweep: half a page

  const Distillation& c;
  const A inv_t, to_exp2;  // exp(x / T) = 2^(x * to_exp2)
  A* const kept[3];        // each side's exponentials from the peak so far; the mixture's logarithm

  DistillationKernel(const Distillation& call, void* memory)
      : c(call),
        inv_t(A(call.inv_temperature)),
        to_exp2(A(call.inv_temperature * 1.4426950408889634074)),
        kept{static_cast<A*>(memory), static_cast<A*>(memory) + kept_stride(call.classes),
             static_cast<A*>(memory) + 2 * kept_stride(call.classes)} {}

  struct Row {
    const T* x[2];
    T* grad[2];
    const T* next[2];  // the following row, to be fetched
  };

  // What the first sweep finds. Sums are from the peak, the hard ones without the temperature.
  struct Sums {
    A peak[2] = {kLowest, kLowest};
    double sum[2] = {};
    double distance = 0;       // kl: sum of e_0 * ((x_0 - peak_0) - (x_1 - peak_1))
    double hard_sum = 0;       // of the student's exponentials
    double hard_distance = 0;  // sum of peak - x over all classes, with label smoothing
    A from[2][kBlocks];        // the peak from which a block's exponentials are kept
  };

  static int64_t offset(const int64_t* stride, int64_t i, int64_t inner) {
    return i / inner * stride[0] + i % inner * stride[1];
  }
  static A per_row(const PerPosition& value, int64_t i) {
    return value.data ? static_cast<const A*>(value.data)[i * value.stride] : A(1);
  }
  int64_t end_of(int64_t begin) const { return begin + kBlock < c.classes ? begin + kBlock : c.classes; }
  static A exp1(A x) { return exp2<A>(set1(x))[0]; }

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
      const double factor = z.sum[side] == 0 ? 0 : double(exp1(A(shift[side]) * to_exp2));
      z.sum[side] *= factor;
      if (side == 0 && factor == 0) z.distance = 0;  // it may be infinite
      if (side == 0) z.distance *= factor;
      if (kHard && side == c.student && done) {
        z.hard_sum *= double(exp1(A(shift[side]) * kLog2E));
        z.hard_distance -= double(done) * shift[side];
      }
      z.peak[side] = top[side];
    }
    if (kD == Divergence::kl && z.sum[0] != 0) z.distance += z.sum[0] * (shift[0] - shift[1]);
  }

  // Peaks and sums, block by block so that each is in the first-level cache for both its sweeps. What comes next is
  // fetched meanwhile: the following block, or from the last one the gradient's memory.
  void add_up(const Row& row, Sums& z) const {
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      const int64_t end = end_of(begin);
      const A top[2] = {block_max(row.x[0], begin, end), block_max(row.x[1], begin, end)};
      raise(z, top, begin);
      A from[2];
      for (int side = 0; side < 2; ++side) {
        from[side] = z.peak[side] == kLowest ? A(0) : z.peak[side];  // so far -inf alone: their exponentials are 0
        if (kKeeps) z.from[side][begin / kBlock] = z.peak[side];
      }
      const bool last = end == c.classes;
      Chains<A> s0, s1, distance, hard, hard_distance;
      sweep<A>(begin, end, [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
        for (int side = 0; side < 2; ++side) {
          if (!last)
            __builtin_prefetch(row.x[side] + end + (k - begin), 0, 3);
          else if (row.grad[side])
            __builtin_prefetch(row.grad[side] + (k - begin), 1, 3);
        }
        const V d0 = load_some(row.x[0] + k, n, A(0)) - from[0], d1 = load_some(row.x[1] + k, n, A(0)) - from[1];
        const V e0 = exp2<A>(d0 * to_exp2), e1 = exp2<A>(d1 * to_exp2);
        s0.part[slot] += only<A>(e0, n);
        s1.part[slot] += only<A>(e1, n);
        if constexpr (kKeeps) {
          store(kept[0] + k, e0);
          store(kept[1] + k, e1);
        }
        if constexpr (kD == Divergence::kl) distance.part[slot] += only<A>(e0 == A(0) ? V{} : e0 * (d0 - d1), n);
        if constexpr (kHard) {
          const V d = c.student ? d1 : d0;
          hard.part[slot] += only<A>(exp2<A>(d * kLog2E), n);
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
    A peak[2], inv_sum[2];
    A log_sum[2];         // of js
    double log_sum_rest;  // what rounding took from them, times the shares
    A mean[2];            // of the slope; for kl of the distance, whose gradient needs neither temperature nor log_sum
  };

  // p of both sides at classes k to k + n of the block whose kept exponentials have that scale.
  struct Pair {
    V p[2];
  };
  TLK_INLINE Pair probabilities(const Row& row, const Distributions& of, const A* scale, int64_t k, int n) const {
    Pair pair;
    for (int side = 0; side < 2; ++side)
      pair.p[side] = kKeeps ? load(kept[side] + k) * scale[side]
                            : exp2<A>((load_some(row.x[side] + k, n, A(0)) - of.peak[side]) * to_exp2) * scale[side];
    return pair;
  }
  void block_scale(const Distributions& of, const Sums& z, int64_t begin, A* scale) const {
    for (int side = 0; side < 2; ++side) {
      scale[side] = of.inv_sum[side];
      if (kKeeps && z.from[side][begin / kBlock] != of.peak[side])
        scale[side] *= exp1((z.from[side][begin / kBlock] - of.peak[side]) * to_exp2);
    }
  }

  TLK_INLINE V log_p(const Row& row, const Distributions& of, int side, int64_t k, int n) const {
    return (load_some(row.x[side] + k, n, A(0)) - of.peak[side]) * inv_t - of.log_sum[side];
  }
  TLK_INLINE V log_mixture(const Pair& pair) const {
    return log_from_one(pair.p[0] * A(c.side[0].share) + pair.p[1] * A(c.side[1].share));
  }
  TLK_INLINE V slope(const Row& row, const Distributions& of, const Pair& pair, V log_m, int side, int64_t k,
                     int n) const {
    if constexpr (kD == Divergence::js) return (log_p(row, of, side, k, n) - log_m) * A(c.side[side].share);
    const V difference = pair.p[side] - pair.p[1 - side];
    return difference > A(0) ? set1(A(0.5)) : difference < A(0) ? set1(A(-0.5)) : difference;
  }

  // js and tv: the divergence, and the mean slopes. Where p is 0 so is its product, whatever the logarithms.
  double compare(const Row& row, Distributions& of, const Sums& z) const {
    double total = 0, means[2] = {};
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      A scale[2];
      block_scale(of, z, begin, scale);
      Chains<A> divergence, mean0, mean1;
      sweep<A>(begin, end_of(begin), [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
        const Pair pair = probabilities(row, of, scale, k, n);
        V log_m{};
        if constexpr (kD == Divergence::js) {
          log_m = log_mixture(pair);
          if constexpr (kKeeps) store(kept[2] + k, log_m);
        }
        const V s0 = slope(row, of, pair, log_m, 0, k, n), s1 = slope(row, of, pair, log_m, 1, k, n);
        const V m0 = only<A>(pair.p[0] == A(0) ? V{} : pair.p[0] * s0, n);
        const V m1 = only<A>(pair.p[1] == A(0) ? V{} : pair.p[1] * s1, n);
        mean0.part[slot] += m0;
        mean1.part[slot] += m1;
        divergence.part[slot] += kD == Divergence::tv ? only<A>((pair.p[0] - pair.p[1]) * s0, n) : m0 + m1;
      });
      total += double(divergence.sum());
      means[0] += double(mean0.sum());
      means[1] += double(mean1.sum());
    }
    of.mean[0] = A(means[0]), of.mean[1] = A(means[1]);
    return total - of.log_sum_rest;
  }

  struct Hard {
    A factor, inv_sum, keep, spread;  // softmax(x) - keep * [class is the target] - spread, times factor
    int64_t target;
  };

  void write_gradients(const Row& row, const Distributions& of, const Sums& z, A factor, Hard hard) const {
    const int student = c.student;
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      const int64_t end = end_of(begin);
      A scale[2];
      block_scale(of, z, begin, scale);
      const bool last = end == c.classes;
      sweep<A>(begin, end, [&](int64_t k, int, int n) __attribute__((always_inline)) {
        for (int side = 0; side < 2; ++side) {
          __builtin_prefetch(last ? row.next[side] + (k - begin) : row.x[side] + k + kAhead, 0, 3);
          if (row.grad[side]) __builtin_prefetch(row.grad[side] + k + kAhead, 1, 3);
        }
        const Pair pair = probabilities(row, of, scale, k, n);
        V log_m{}, d[2];
        if constexpr (kD == Divergence::js) log_m = kKeeps ? load(kept[2] + k) : log_mixture(pair);
        for (int side = 0; side < 2; ++side) {
          if (!row.grad[side]) continue;
          const V p = pair.p[side];
          if (kD == Divergence::kl && side == 1) {
            d[1] = (p - pair.p[0]) * factor;
          } else {
            V s;
            if constexpr (kD == Divergence::kl)
              s = ((load_some(row.x[0] + k, n, A(0)) - of.peak[0]) - (load_some(row.x[1] + k, n, A(0)) - of.peak[1]));
            else
              s = slope(row, of, pair, log_m, side, k, n);
            d[side] = p == A(0) ? V{} : p * (s - of.mean[side]) * (kD == Divergence::kl ? factor * inv_t : factor);
          }
        }
        if constexpr (kHard) {
          if (row.grad[student]) {
            const V e = exp2<A>((load_some(row.x[student] + k, n, A(0)) - of.peak[student]) * kLog2E);
            const V own = iota<A>() == typename Simd<A>::Index(hard.target - k) ? set1(hard.keep) : V{};
            d[student] += (e * hard.inv_sum - (own + hard.spread)) * hard.factor;
          }
        }
        if (row.grad[0]) store_some(row.grad[0] + k, n, d[0]);
        if (row.grad[1]) store_some(row.grad[1] + k, n, d[1]);
      });
    }
  }

  void row(int64_t i) const {
    Row row;
    const int64_t following = i + 1 < c.rows ? i + 1 : i;
    bool differentiates = false;
    for (int side = 0; side < 2; ++side) {
      const Side& of = c.side[side];
      row.x[side] = static_cast<const T*>(of.x) + offset(of.stride, i, c.inner);
      row.next[side] = static_cast<const T*>(of.x) + offset(of.stride, following, c.inner);
      row.grad[side] = of.grad ? static_cast<T*>(of.grad) + offset(of.grad_stride, i, c.inner) : nullptr;
      differentiates |= of.grad != nullptr;
    }
    A* const loss = c.loss ? static_cast<A*>(c.loss) + i : nullptr;
    if (c.target && c.target[i] == c.ignore_index) {
      if (loss) *loss = 0;
      for (T* grad : row.grad)
        if (grad)
          sweep<A>(0, c.classes,
                   [&](int64_t k, int, int n) __attribute__((always_inline)) { store_some(grad + k, n, V{}); });
      return;
    }

    Sums z;
    add_up(row, z);
    Distributions of{};
    for (int side = 0; side < 2; ++side) {
      of.peak[side] = z.peak[side];
      of.inv_sum[side] = A(1 / z.sum[side]);
      if constexpr (kD == Divergence::js) {
        const double log_sum = -::log(double(of.inv_sum[side]));  // so that log p is that of p as rounded
        of.log_sum[side] = A(log_sum);
        of.log_sum_rest += c.side[side].share * (log_sum - double(of.log_sum[side]));
      }
    }
    double divergence;
    if constexpr (kD == Divergence::kl) {
      const double mean = z.distance / z.sum[0];
      divergence = mean * c.inv_temperature + ::log(z.sum[1] / z.sum[0]);
      of.mean[0] = A(mean);
    } else {
      divergence = compare(row, of, z);
    }

    const double weight = double(per_row(c.row_weight, i));
    if (loss) {
      double value = c.soft * divergence;
      if constexpr (kHard) value += c.hard * cross_entropy(row, z, i);
      *loss = A(weight * value);
    }
    if (!differentiates) return;
    const double upstream = weight * double(per_row(c.grad_loss, i));
    Hard hard{};
    if constexpr (kHard)
      hard = {A(upstream * c.hard), A(1 / z.hard_sum), A(1 - c.smoothing), A(c.smoothing / double(c.classes)),
              c.target[i]};
    write_gradients(row, of, z, A(upstream * c.soft * c.inv_temperature), hard);
  }

  double cross_entropy(const Row& row, const Sums& z, int64_t i) const {
    const double own = double(z.peak[c.student]) - double(load1(row.x[c.student] + c.target[i]));
    double value = ::log(z.hard_sum) + (1 - c.smoothing) * own;
    if (c.smoothing != 0) value += c.smoothing / double(c.classes) * z.hard_distance;
    return value;
  }
};

template <class T, Divergence kD, bool kHard, bool kKeeps>
void distillation_rows(const Distillation& call, int64_t begin, int64_t end, void* kept) {
  const DistillationKernel<T, kD, kHard, kKeeps> kernel(call, kept);
  for (int64_t i = begin; i < end; ++i) kernel.row(i);
}

template <class T, Divergence kD>
DistillationRows distillation_of(bool hard, bool keeps) {
  if (hard) return keeps ? distillation_rows<T, kD, true, true> : distillation_rows<T, kD, true, false>;
  return keeps ? distillation_rows<T, kD, false, true> : distillation_rows<T, kD, false, false>;
}

template <class T>
DistillationRows distillation_of(Divergence divergence, bool hard, bool keeps) {
  switch (divergence) {
    case Divergence::kl:
      return distillation_of<T, Divergence::kl>(hard, keeps);
    case Divergence::js:
      return distillation_of<T, Divergence::js>(hard, keeps);
    default:
      return distillation_of<T, Divergence::tv>(hard, keeps);
  }
}

DistillationRows distillation(Scalar logits, Divergence divergence, bool hard, bool keeps) {
  switch (logits) {
    case Scalar::f64:
      return distillation_of<double>(divergence, hard, keeps);
    case Scalar::f32:
      return distillation_of<float>(divergence, hard, keeps);
    case Scalar::bf16:
      return distillation_of<bf16>(divergence, hard, keeps);
    default:
      return distillation_of<f16>(divergence, hard, keeps);
  }
}

}  // namespace TLK_ISA
}  // namespace tlk
