// Distillation on a GPU: losses and gradients of rows, in the terms of csrc/distillation/cpu.inl.
//
// Bytes: both rows are read and each wanted gradient is written once, as long as the rows are kept (rows.cuh). A row is
// swept for peaks and sums, in js and tv for the means of the slopes, and for the gradients. Exponentials are computed
// again in each sweep, two of a class, since kept numbers would take the registers of twice the row. A gradient that is
// not wanted is not computed: kernels are made for sets of them.
#pragma once
#include "kernel.h"
#include "../core/cuda/pack.cuh"
#include "../core/cuda/rows.cuh"

namespace tlk {

TLK_DEVICE float exp2_of(float x) { return exp2_approximate(x); }
TLK_DEVICE double exp2_of(double x) { return exp2(x); }

struct DistillationOnDevice : Distillation {
  // The upstream gradient is that of the row times factor / *divisor.
  double factor = 1;
  const double* divisor = nullptr;  // null: 1
};

// Bit i of kGrads: there may be a gradient of side i.
template <class T, Divergence kD, bool kWhole, int kGrads>
struct DistillationRow {
  using A = Compute<T>;
  static constexpr int L = kLanes<T>;
  static constexpr int kPacks = kD == Divergence::js ? kRowPacks<T> / 2 : kRowPacks<T>;  // else js would spill
  static constexpr double kLog2E = 1.4426950408889634074;

  const DistillationOnDevice& c;
  const RowPlan& plan;
  Team team;
  const int64_t row;
  const int64_t begin, end;  // the packs that this block has
  const int64_t n;           // classes up to their end
  uint4* const staged;       // that part of both rows, where it is kept in shared memory
  const A inv_t, k_t, k_1;   // e^(x / T) is 2^(x * k_t), e^x is 2^(x * k_1)
  const bool hard, spread;
  const T* x[2];
  T* grad[2];
  uint4 kept[2][kPacks];

  // Over all classes, from the peak; the hard ones of the student without the temperature.
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
        spread(call.hard != 0 && call.smoothing != 0) {
    const int64_t outer = row / call.inner, inner = row % call.inner;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const Side& of = call.side[side];
      x[side] = static_cast<const T*>(of.x) + outer * of.stride[0] + inner * of.stride[1];
      grad[side] = of.grad ? static_cast<T*>(of.grad) + outer * of.grad_stride[0] + inner * of.grad_stride[1] : nullptr;
    }
  }

  TLK_DEVICE A per_row(const PerPosition& value) const {
    return value.data ? static_cast<const A*>(value.data)[row * value.stride] : A(1);
  }
  // What exponentials are taken from: any number where there are none but zeros.
  static TLK_DEVICE A base(A peak) { return peak == -A(INFINITY) ? A(0) : peak; }

  // Calls body(first pack) with kPacks packs of both rows in `kept`, the next of a thread `plan.threads` further on.
  template <class Body>
  TLK_DEVICE void sweep(bool first_time, Body body) {
    const T fill = narrow<T>(-A(INFINITY));
    for (int64_t k = begin; k < end; k += kPacks * plan.threads) {
      const int64_t first = k + team.thread();
      if (!kWhole || first_time) {
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
          const int64_t at = first + i * plan.threads;
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            if (kWhole || first_time || !staged) {
              kept[side][i] = load_pack(x[side], n, at, fill).bits;
              if (!kWhole && staged && at < end) staged[side * plan.packs + at - begin] = kept[side][i];
            } else {
              kept[side][i] = at < end ? staged[side * plan.packs + at - begin] : filled(fill);
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

  // Calls body(pack, lane, x_0, x_1) for what `kept` holds.
  template <class Body>
  TLK_DEVICE void each(Body body) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const Pack<T> a(kept[0][i]), b(kept[1][i]);
#pragma unroll
      for (int l = 0; l < L; ++l) body(i, l, widen(a.lane[l]), widen(b.lane[l]));
    }
  }

  // Takes what a thread has summed over `before` classes to peaks that are at least as large.
  TLK_DEVICE void raise(Sums& z, A top_0, A top_1, A before) const {
    const A top[2] = {top_0, top_1};
    A shift[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      shift[side] = base(z.peak[side]) - base(top[side]);
      z.sum[side] = z.sum[side] == 0 ? A(0) : z.sum[side] * exp2_of(shift[side] * k_t);
      if (hard && side == c.student) {
        z.hard_sum = z.hard_sum == 0 ? A(0) : z.hard_sum * exp2_of(shift[side] * k_1);
        if (before > 0) z.hard_distance -= before * shift[side];
      }
    }
    if (kD == Divergence::kl) {
      const A moved = z.distance * exp2_of(shift[0] * k_t) + z.sum[0] * (shift[0] - shift[1]);
      z.distance = z.sum[0] == 0 ? A(0) : moved;
    }
    z.peak[0] = top_0, z.peak[1] = top_1;
  }

  TLK_DEVICE void add_up(Sums& z) {
    A counted = 0;
    sweep(true, [&](int64_t first) {
      A top[2] = {z.peak[0], z.peak[1]};
      each([&](int, int, A x_0, A x_1) { top[0] = fmax(top[0], x_0), top[1] = fmax(top[1], x_1); });
      raise(z, top[0], top[1], counted);
      const A from_0 = base(top[0]), from_1 = base(top[1]);
      each([&](int i, int l, A x_0, A x_1) {
        const A d_0 = x_0 - from_0, d_1 = x_1 - from_1;
        const A e_0 = exp2_of(d_0 * k_t), e_1 = exp2_of(d_1 * k_t);
        z.sum[0] += e_0;
        z.sum[1] += e_1;
        if (kD == Divergence::kl) z.distance += e_0 == 0 ? A(0) : e_0 * (d_0 - d_1);
        if (hard) {
          const A d = c.student ? d_1 : d_0;
          z.hard_sum += exp2_of(d * k_1);
          if (spread && (first + i * plan.threads) * L + l < n) z.hard_distance -= d, counted += 1;
        }
      });
    });
    A peak[2] = {z.peak[0], z.peak[1]};
    team.template reduce<Max>(peak);
    raise(z, peak[0], peak[1], counted);
    A sums[5] = {z.sum[0], z.sum[1], z.distance, z.hard_sum, z.hard_distance};
    team.template reduce<Sum>(sums);
    z.sum[0] = sums[0], z.sum[1] = sums[1], z.distance = sums[2], z.hard_sum = sums[3], z.hard_distance = sums[4];
  }

  // The two distributions, once their sums are known.
  struct Distributions {
    A peak[2];
    A scale[2];  // share / sum
    A apart;     // js: log(sum_0 / sum_1)
    A mean[2];   // of the slope
  };

  struct Pair {
    A p[2], s[2];  // probabilities, for js times the shares; slopes, without them
  };
  TLK_DEVICE Pair compare(const Distributions& of, A x_0, A x_1) const {
    const A d_0 = x_0 - of.peak[0], d_1 = x_1 - of.peak[1];
    Pair pair;
    pair.p[0] = exp2_of(d_0 * k_t) * of.scale[0], pair.p[1] = exp2_of(d_1 * k_t) * of.scale[1];
    if (kD == Divergence::kl) {
      pair.s[0] = (d_0 - d_1) * inv_t, pair.s[1] = 0;
    } else if (kD == Divergence::js) {
      // log(p_k / m), m over the larger of the two, so that nothing overflows and near 0 there are no large terms.
      const A apart = (d_0 - d_1) * inv_t - of.apart;
      const A ratio = exp2_of(-fabs(apart) * k_1);
      const A more = -log(apart > 0 ? share(0) + share(1) * ratio : share(1) + share(0) * ratio);
      pair.s[0] = pair.p[0] == 0 ? A(0) : more + (apart < 0 ? apart : A(0));
      pair.s[1] = pair.p[1] == 0 ? A(0) : more - (apart > 0 ? apart : A(0));
    } else {
      const A difference = pair.p[0] - pair.p[1];
      pair.s[0] = difference > 0 ? A(0.5) : difference < 0 ? A(-0.5) : difference;  // NaN stays
      pair.s[1] = -pair.s[0];
    }
    return pair;
  }

  // For js and tv: the divergence, and the means of the slopes of which there may be a gradient.
  TLK_DEVICE A mean_slopes(Distributions& of) {
    A sums[3] = {};
    sweep(false, [&](int64_t) {
      each([&](int, int, A x_0, A x_1) {
        const Pair pair = compare(of, x_0, x_1);
        const A m_0 = pair.p[0] * pair.s[0], m_1 = pair.p[1] * pair.s[1];
        sums[0] += kD == Divergence::tv ? (pair.p[0] - pair.p[1]) * pair.s[0] : m_0 + m_1;
        if (kGrads & 1) sums[1] += m_0;
        if (kGrads & 2) sums[2] += m_1;
      });
    });
    team.template reduce<Sum>(sums);
    of.mean[0] = sums[1] / share(0), of.mean[1] = sums[2] / share(1);
    return sums[0];
  }
  TLK_DEVICE A share(int side) const { return kD == Divergence::js ? A(c.side[side].share) : A(1); }

  struct Hard {
    A factor, inv_sum, keep, spread;  // softmax(x) - keep * [class is the target] - spread, times factor
    int64_t target;
  };

  TLK_DEVICE void write_gradients(const Distributions& of, A factor, const Hard& h) {
    sweep(false, [&](int64_t first) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const int64_t at = first + i * plan.threads;
        const Pack<T> a(kept[0][i]), b(kept[1][i]);
        A d[2][L];
#pragma unroll
        for (int l = 0; l < L; ++l) {
          const A x_0 = widen(a.lane[l]), x_1 = widen(b.lane[l]);
          const Pair pair = compare(of, x_0, x_1);
          d[0][l] = pair.p[0] == 0 ? A(0) : pair.p[0] * (pair.s[0] - of.mean[0]) * factor;
          if (kD == Divergence::kl)
            d[1][l] = (pair.p[1] - pair.p[0]) * factor;
          else
            d[1][l] = pair.p[1] == 0 ? A(0) : pair.p[1] * (pair.s[1] - of.mean[1]) * factor;
          if (hard) {
            const A e = exp2_of((c.student ? x_1 - of.peak[1] : x_0 - of.peak[0]) * k_1);
            const A own = at * L + l == h.target ? h.keep : A(0);
            const A by_hard = (e * h.inv_sum - (own + h.spread)) * h.factor;
            d[0][l] += c.student ? A(0) : by_hard;
            d[1][l] += c.student ? by_hard : A(0);
          }
        }
#pragma unroll
        for (int side = 0; side < 2; ++side)
          if (wants(side)) store_pack(grad[side], n, at, narrow_pack<T>(d[side]));
      }
    });
  }

  TLK_DEVICE bool wants(int side) const { return (kGrads >> side & 1) && grad[side]; }

  // The loss and the gradients of a row that is not looked at.
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
    const bool ignored = c.target && target == c.ignore_index;
    if (ignored || target < 0 || target >= c.classes) return fill(ignored ? A(0) : A(NAN));
    // Read before a gradient may take the place of the logits.
    const A own = hard ? widen((c.student ? x[1] : x[0])[target]) : A(0);
    Sums z;
    add_up(z);
    Distributions of = {};
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (z.peak[side] == -A(INFINITY)) z.sum[side] = A(NAN);
      of.peak[side] = z.peak[side];
      of.scale[side] = share(side) / z.sum[side];
    }
    if (kD == Divergence::js) of.apart = log(z.sum[0] / z.sum[1]);
    A divergence;
    if (kD == Divergence::kl) {
      of.mean[0] = z.distance / z.sum[0] * inv_t;
      divergence = of.mean[0] + log(z.sum[1] / z.sum[0]);
    } else {
      divergence = mean_slopes(of);
    }
    team.has_read();
    const A weight = per_row(c.row_weight);
    if (c.loss && team.leads()) {
      A value = A(c.soft) * divergence;
      if (hard) {
        A cross_entropy = log(z.hard_sum) + A(1 - c.smoothing) * ((c.student ? z.peak[1] : z.peak[0]) - own);
        if (spread) cross_entropy += A(c.smoothing / double(c.classes)) * z.hard_distance;
        value += A(c.hard) * cross_entropy;
      }
      static_cast<A*>(c.loss)[row] = weight * value;
    }
    if (wants(0) || wants(1)) {
      const A upstream = weight * per_row(c.grad_loss) * (c.divisor ? A(c.factor) / A(*c.divisor) : A(c.factor));
      const Hard h = {upstream * A(c.hard), 1 / z.hard_sum, A(1 - c.smoothing), A(c.smoothing / double(c.classes)),
                      target};
      write_gradients(of, upstream * A(c.soft * c.inv_temperature), h);
    }
  }
};

// Blocks of a multiprocessor that the compiler is to leave registers for; 0: it sees for itself, and goes down to 64
// where that spills little, so that two blocks of 512 fit. For rows that are swept three blocks would spill 100 words.
template <class T>
constexpr int least_blocks(bool whole) {
  return !whole ? 2 : sizeof(T) == 8 ? 1 : 0;
}

template <class T, Divergence kD, bool kWhole, int kGrads>
__global__ void __launch_bounds__(kWhole ? kRowThreads : kSweepThreads, least_blocks<T>(kWhole))
    distillation_kernel(const __grid_constant__ DistillationOnDevice call, const __grid_constant__ RowPlan plan) {
  DistillationRow<T, kD, kWhole, kGrads> of(call, plan);
  if (of.row < call.rows) of.run();
  of.team.wait_for_readers();
}

template <class T, Divergence kD, int kGrads>
cudaError_t distillation_of(const DistillationOnDevice& call, cudaStream_t stream) {
  Device device;
  if (const cudaError_t error = current_device(device)) return error;
  const RowPlan plan = plan_rows<T>(device, call.classes, 2, DistillationRow<T, kD, true, kGrads>::kPacks);
  if ((call.rows + plan.rows - 1) / plan.rows * plan.cluster > 0x7fffffff) return cudaErrorNotSupported;
  const auto kernel = plan.keep == Keep::registers ? distillation_kernel<T, kD, true, kGrads>
                                                   : distillation_kernel<T, kD, false, kGrads>;
  return launch(grid_of(plan, call.rows), stream, kernel, call, plan);
}

// The teacher's gradient alone, which hardly any training asks for, has no kernel of its own but in kl, where the
// student is either side.
template <class T, Divergence kD>
cudaError_t distillation_of(const DistillationOnDevice& call, cudaStream_t stream) {
  const bool of_0 = call.side[0].grad, of_1 = call.side[1].grad;
  if (!of_0 && !of_1) return distillation_of<T, kD, 0>(call, stream);
  if (!of_0) return distillation_of<T, kD, 2>(call, stream);
  if constexpr (kD == Divergence::kl)
    if (!of_1) return distillation_of<T, kD, 1>(call, stream);
  return distillation_of<T, kD, 3>(call, stream);
}

template <class T>
cudaError_t distillation_of(const DistillationOnDevice& call, cudaStream_t stream) {
  switch (call.divergence) {
    case Divergence::kl:
      return distillation_of<T, Divergence::kl>(call, stream);
    case Divergence::js:
      return distillation_of<T, Divergence::js>(call, stream);
    default:
      return distillation_of<T, Divergence::tv>(call, stream);
  }
}

// All rows, whose logits are of that type. A class index out of range makes its row NaN.
inline cudaError_t distillation(const DistillationOnDevice& call, Scalar logits, cudaStream_t stream) {
  if (call.rows == 0) return cudaSuccess;
  switch (logits) {
    case Scalar::f64:
      return distillation_of<double>(call, stream);
    case Scalar::f32:
      return distillation_of<float>(call, stream);
    case Scalar::bf16:
      return distillation_of<bf16>(call, stream);
    default:
      return distillation_of<f16>(call, stream);
  }
}

}  // namespace tlk
