// Distillation on a GPU: losses and gradients of rows, by the formulas of csrc/distillation/cpu_rows.inl.
//
// Both rows are read once and each wanted gradient is written once, unless the rows are too long to be kept (rows.cuh).
// The sweeps over a row: for peaks and sums; in js and tv for the mean slopes; for the gradients. Each sweep computes
// the two exponentials of a class again, and the tanh of a softcap: to keep them would take the registers of twice the
// row. There is a kernel for each set of wanted gradients, which computes no other.
#pragma once
#include "kernel.h"
#include "../core/cuda/math.cuh"
#include "../core/cuda/pack.cuh"
#include "../core/cuda/rows.cuh"

namespace tlk {

// The upstream gradient of a row is grad_loss * factor / *divisor.
struct DistillationOnDevice : Distillation {
  double factor = 1;
  const double* divisor = nullptr;  // one number in device memory; null: 1
};

// One row. kWhole: the team's registers hold all of it. Bit i of kGrads: the gradient of side i may be wanted. kCap: a
// side has a softcap; one without has f = x and a cap of 1.
template <class T, Divergence kD, bool kWhole, int kGrads, bool kCap>
struct DistillationRow {
  using A = Compute<T>;
  static constexpr int L = kLanes<T>;
  static constexpr bool kFewPacks = kD == Divergence::js || (kCap && !kWhole && sizeof(T) == 2);  // more would spill
  static constexpr int kPacks = kFewPacks ? kRowPacks<T> / 2 : kRowPacks<T>;

  const DistillationOnDevice& c;
  const RowPlan& plan;
  Team team;
  const int64_t row;
  const int64_t begin, end;  // the block's packs of the row
  const int64_t n;           // classes up to the block's last
  uint4* const staged;       // (2, plan.packs): the block's packs of both rows; null: not in shared memory
  const A inv_t, k_t, k_1;   // e^(x / T) is 2^(x * k_t), e^x is 2^(x * k_1)
  const bool hard, spread;
  const A cap[2];
  const T* x[2];
  T* grad[2];
  uint4 kept[2][kPacks];

  // Sums over classes, relative to the peak, which is one of f. `hard_` sums are the student's, without the
  // temperature.
  struct Sums {
    A peak[2] = {-A(INFINITY), -A(INFINITY)};
    A sum[2] = {};
    A distance = 0;       // kl: sum of e_0 * ((x_0 - peak_0) - (x_1 - peak_1))
    A hard_sum = 0;       // of the student's exponentials
    A hard_distance = 0;  // sum of peak - x, with label smoothing
  };

  TLK_DEVICE DistillationRow(const DistillationOnDevice& call, const RowPlan& plan_)
      : c(call),
        plan(plan_),
        team(team_of(plan_, kWhole ? 1 : plan_.cluster)),
        row(row_of(plan_)),
        begin(int64_t(team.rank()) * plan_.packs),
        end(begin + plan_.packs),
        n(call.classes < end * L ? call.classes : end * L),
        staged(plan_.keep == Keep::shared ? shared_memory<uint4>() + RowPlan::kScratch / 16 : nullptr),
        inv_t(A(call.inv_temperature)),
        k_t(A(call.inv_temperature * kLog2E)),
        k_1(A(kLog2E)),
        hard(call.hard != 0),
        spread(call.hard != 0 && call.smoothing != 0),
        cap{cap_of(call.side[0]), cap_of(call.side[1])} {
    const int64_t outer = row / call.inner, inner = row % call.inner;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const Side& s = call.side[side];
      x[side] = static_cast<const T*>(s.x) + outer * s.stride[0] + inner * s.stride[1];
      grad[side] = s.grad ? static_cast<T*>(s.grad) + outer * s.grad_stride[0] + inner * s.grad_stride[1] : nullptr;
    }
  }

  static TLK_DEVICE A cap_of(const Side& side) { return side.softcap != 0 ? A(side.softcap) : A(1); }

  // f of a logit. `inside`: it is no padding, which stays -inf, where tanh would make it -1.
  TLK_DEVICE A capped(A x, int side, bool inside) const {
    if (!kCap || c.side[side].softcap == 0) return x;
    return inside ? tanh(x / cap[side]) : -A(INFINITY);
  }
  // A difference of f, as one of x. `side` is a constant everywhere: with a variable index the row would not stay in
  // registers.
  TLK_DEVICE A of_x(A difference, int side) const { return kCap ? difference * cap[side] : difference; }
  // The derivative of x by the logit: small near the cap, so from f, not from x, which is rounded again.
  TLK_DEVICE A cap_slope(A f, int side) const {
    return kCap && c.side[side].softcap != 0 ? (A(1) - f) * (A(1) + f) : A(1);
  }

  TLK_DEVICE A per_row(const PerPosition& value) const {
    return value.data ? static_cast<const A*>(value.data)[row * value.stride] : A(1);
  }

  // Calls body(first) for the thread's packs first + i * plan.threads, i < kPacks, with those of both rows in `kept`.
  template <class Body>
  TLK_DEVICE void sweep(bool first_time, Body body) {
    const T fill = narrow<T>(-A(INFINITY));
    for (int64_t start = begin; start < end; start += kPacks * plan.threads) {
      const int64_t first = start + team.thread();
      if (!kWhole || first_time) {
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
          const int64_t k = first + i * plan.threads;
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            if (kWhole || first_time || !staged) {
              kept[side][i] = load_pack(x[side], n, k, fill).bits;
              if (!kWhole && staged && k < end) staged[side * plan.packs + k - begin] = kept[side][i];
            } else {
              kept[side][i] = k < end ? staged[side * plan.packs + k - begin] : filled(fill);
            }
          }
        }
      }
      body(first);
      if (kWhole) break;
    }
  }
  static TLK_DEVICE uint4 filled(T fill) {
    Pack<T> pack;
#pragma unroll
    for (int l = 0; l < L; ++l) pack.lane[l] = fill;
    return pack.bits;
  }

  // Calls body(inside, f_0, f_1) for each lane of the kept packs; `inside`: it is no padding.
  template <class Body>
  TLK_DEVICE void each(int64_t first, Body body) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      A a[L], b[L];
      widen_pack(Pack<T>(kept[0][i]), a);
      widen_pack(Pack<T>(kept[1][i]), b);
#pragma unroll
      for (int l = 0; l < L; ++l) {
        const bool inside = (first + i * plan.threads) * L + l < n;
        body(inside, capped(a[l], 0, inside), capped(b[l], 1, inside));
      }
    }
  }

  // Makes a thread's sums over `count` classes relative to peaks that are at least as large.
  TLK_DEVICE void raise(Sums& z, A top_0, A top_1, A count) const {
    const A top[2] = {top_0, top_1};
    A shift[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      shift[side] = of_x(finite_or_zero(z.peak[side]) - finite_or_zero(top[side]), side);
      z.sum[side] = z.sum[side] == 0 ? A(0) : z.sum[side] * fast_exp2(shift[side] * k_t);
      if (hard && side == c.student) {
        z.hard_sum = z.hard_sum == 0 ? A(0) : z.hard_sum * fast_exp2(shift[side] * k_1);
        if (count > 0) z.hard_distance -= count * shift[side];
      }
    }
    if (kD == Divergence::kl) {
      const A moved = z.distance * fast_exp2(shift[0] * k_t) + z.sum[0] * (shift[0] - shift[1]);
      z.distance = z.sum[0] == 0 ? A(0) : moved;
    }
    z.peak[0] = top_0, z.peak[1] = top_1;
  }

  // The first sweep: peaks and sums.
  TLK_DEVICE void add_up(Sums& z) {
    A count = 0;
    sweep(true, [&](int64_t first) {
      A top[2] = {z.peak[0], z.peak[1]};
      each(first, [&](bool, A f_0, A f_1) { top[0] = fmax(top[0], f_0), top[1] = fmax(top[1], f_1); });
      raise(z, top[0], top[1], count);
      const A base_0 = finite_or_zero(top[0]), base_1 = finite_or_zero(top[1]);
      each(first, [&](bool inside, A f_0, A f_1) {
        const A d_0 = of_x(f_0 - base_0, 0), d_1 = of_x(f_1 - base_1, 1);
        const A e_0 = fast_exp2(d_0 * k_t), e_1 = fast_exp2(d_1 * k_t);
        z.sum[0] += e_0;
        z.sum[1] += e_1;
        if (kD == Divergence::kl) z.distance += e_0 == 0 ? A(0) : e_0 * (d_0 - d_1);
        if (hard) {
          const A d = c.student ? d_1 : d_0;
          z.hard_sum += fast_exp2(d * k_1);
          if (spread && inside) z.hard_distance -= d, count += 1;
        }
      });
    });
    A peak[2] = {z.peak[0], z.peak[1]};
    team.template reduce<Max>(peak);
    raise(z, peak[0], peak[1], count);
    A sums[5] = {z.sum[0], z.sum[1], z.distance, z.hard_sum, z.hard_distance};
    team.template reduce<Sum>(sums);
    z.sum[0] = sums[0], z.sum[1] = sums[1], z.distance = sums[2], z.hard_sum = sums[3], z.hard_distance = sums[4];
  }

  // The two distributions, once their sums are known.
  struct Distributions {
    A peak[2];
    A scale[2];   // share / sum
    A log_ratio;  // js: log(sum_0 / sum_1)
    A mean[2];    // mean slopes
  };

  struct Pair {
    A p[2], s[2];  // probabilities, in js times the shares; slopes, without the shares
  };
  TLK_DEVICE Pair compare(const Distributions& both, A f_0, A f_1) const {
    const A d_0 = of_x(f_0 - both.peak[0], 0), d_1 = of_x(f_1 - both.peak[1], 1);
    Pair pair;
    pair.p[0] = fast_exp2(d_0 * k_t) * both.scale[0], pair.p[1] = fast_exp2(d_1 * k_t) * both.scale[1];
    if (kD == Divergence::kl) {
      pair.s[0] = (d_0 - d_1) * inv_t, pair.s[1] = 0;
    } else if (kD == Divergence::js) {
      // log(p_k / m), with m divided by the larger p: nothing overflows, and small logarithms have small terms.
      const A log_ratio = (d_0 - d_1) * inv_t - both.log_ratio;  // log(p_0 / p_1)
      const A ratio = fast_exp2(-fabs(log_ratio) * k_1);
      const A log_larger = -log(log_ratio > 0 ? share(0) + share(1) * ratio : share(1) + share(0) * ratio);
      pair.s[0] = pair.p[0] == 0 ? A(0) : log_larger + (log_ratio < 0 ? log_ratio : A(0));
      pair.s[1] = pair.p[1] == 0 ? A(0) : log_larger - (log_ratio > 0 ? log_ratio : A(0));
    } else {
      const A difference = pair.p[0] - pair.p[1];
      pair.s[0] = difference > 0 ? A(0.5) : difference < 0 ? A(-0.5) : difference;  // NaN stays
      pair.s[1] = -pair.s[0];
    }
    return pair;
  }

  // js and tv: returns the divergence, and computes the mean slopes of sides whose gradient may be wanted.
  TLK_DEVICE A mean_slopes(Distributions& both) {
    A sums[3] = {};
    sweep(false, [&](int64_t first) {
      each(first, [&](bool, A f_0, A f_1) {
        const Pair pair = compare(both, f_0, f_1);
        const A m_0 = pair.p[0] * pair.s[0], m_1 = pair.p[1] * pair.s[1];
        sums[0] += kD == Divergence::tv ? (pair.p[0] - pair.p[1]) * pair.s[0] : m_0 + m_1;
        if (kGrads & 1) sums[1] += m_0;
        if (kGrads & 2) sums[2] += m_1;
      });
    });
    team.template reduce<Sum>(sums);
    both.mean[0] = sums[1] / share(0), both.mean[1] = sums[2] / share(1);
    return sums[0];
  }
  TLK_DEVICE A share(int side) const { return kD == Divergence::js ? A(c.side[side].share) : A(1); }

  // The gradient of the cross entropy: factor * (softmax(x) - keep * [class is the target] - spread).
  struct Hard {
    A factor, inv_sum, keep, spread;
    int64_t target;
  };

  TLK_DEVICE void write_gradients(const Distributions& both, A factor, const Hard& h) {
    sweep(false, [&](int64_t first) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const int64_t k = first + i * plan.threads;
        A a[L], b[L], d[2][L];
        widen_pack(Pack<T>(kept[0][i]), a);
        widen_pack(Pack<T>(kept[1][i]), b);
#pragma unroll
        for (int l = 0; l < L; ++l) {
          const bool inside = k * L + l < n;
          const A f_0 = capped(a[l], 0, inside), f_1 = capped(b[l], 1, inside);
          const Pair pair = compare(both, f_0, f_1);
          d[0][l] = pair.p[0] == 0 ? A(0) : pair.p[0] * (pair.s[0] - both.mean[0]) * factor;
          if (kD == Divergence::kl)
            d[1][l] = (pair.p[1] - pair.p[0]) * factor;
          else
            d[1][l] = pair.p[1] == 0 ? A(0) : pair.p[1] * (pair.s[1] - both.mean[1]) * factor;
          if (hard) {
            const A d_s = c.student ? of_x(f_1 - both.peak[1], 1) : of_x(f_0 - both.peak[0], 0);
            const A e = fast_exp2(d_s * k_1);
            const A target_p = k * L + l == h.target ? h.keep : A(0);
            const A by_hard = (e * h.inv_sum - (target_p + h.spread)) * h.factor;
            d[0][l] += c.student ? A(0) : by_hard;
            d[1][l] += c.student ? by_hard : A(0);
          }
          if (kCap) d[0][l] *= cap_slope(f_0, 0), d[1][l] *= cap_slope(f_1, 1);
        }
#pragma unroll
        for (int side = 0; side < 2; ++side)
          if (wants(side)) store_pack(grad[side], n, k, narrow_pack<T>(d[side]));
      }
    });
  }

  TLK_DEVICE bool wants(int side) const { return (kGrads >> side & 1) && grad[side]; }

  // Loss and gradients of a row that is not read.
  TLK_DEVICE void fill(A value) {
    team.has_read();
    if (c.loss && team.leads()) static_cast<A*>(c.loss)[row] = value;
    Pack<T> pack;
#pragma unroll
    for (int l = 0; l < L; ++l) pack.lane[l] = narrow<T>(value);
    for (int64_t k = begin; k < end; k += plan.threads)
#pragma unroll
      for (int side = 0; side < 2; ++side)
        if (wants(side)) store_pack(grad[side], n, k + team.thread(), pack);
  }

  TLK_DEVICE void run() {
    const int64_t target = c.target ? c.target[row] : 0;
    const A weight = per_row(c.row_weight);
    const bool ignored = (c.target && target == c.ignore_index) || weight == 0;
    if (ignored || target < 0 || target >= c.classes) return fill(ignored ? A(0) : A(NAN));
    // Read before a gradient may overwrite the logits.
    A target_f = hard ? widen((c.student ? x[1] : x[0])[target]) : A(0);
    if (kCap && hard) target_f = c.student ? capped(target_f, 1, true) : capped(target_f, 0, true);
    Sums z;
    add_up(z);
    Distributions both = {};
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (z.peak[side] == -A(INFINITY)) z.sum[side] = A(NAN);
      both.peak[side] = z.peak[side];
      both.scale[side] = share(side) / z.sum[side];
    }
    if (kD == Divergence::js) both.log_ratio = log(z.sum[0] / z.sum[1]);
    A divergence;
    if (kD == Divergence::kl) {
      both.mean[0] = z.distance / z.sum[0] * inv_t;
      divergence = both.mean[0] + log(z.sum[1] / z.sum[0]);
    } else {
      divergence = mean_slopes(both);
    }
    team.has_read();
    if (c.loss && team.leads()) {
      A value = A(c.soft) * divergence;
      if (hard) {
        const A target_distance = c.student ? of_x(z.peak[1] - target_f, 1) : of_x(z.peak[0] - target_f, 0);
        A cross_entropy = log(z.hard_sum) + A(1 - c.smoothing) * target_distance;
        if (spread) cross_entropy += A(c.smoothing / double(c.classes)) * z.hard_distance;
        value += A(c.hard) * cross_entropy;
      }
      static_cast<A*>(c.loss)[row] = weight * value;
    }
    if (wants(0) || wants(1)) {
      const A upstream = weight * per_row(c.grad_loss) * (c.divisor ? A(c.factor) / A(*c.divisor) : A(c.factor));
      const Hard h = {upstream * A(c.hard), 1 / z.hard_sum, A(1 - c.smoothing), A(c.smoothing / double(c.classes)),
                      target};
      write_gradients(both, upstream * A(c.soft * c.inv_temperature), h);
    }
  }
};

}  // namespace tlk
