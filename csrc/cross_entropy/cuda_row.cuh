// Loss, normaliser, statistics and gradient of a row, in any combination. A team of threads works on the row, and a
// store (row_store.cuh) keeps it. With f(x) = tanh(x / softcap), or x, z = f(x) * softcap / T and p = softmax(z):
//
//   q_c   = w_c * ((1 - smoothing) * t_c + smoothing / C)      t: probabilities; for a class index y, its term has the
//                                                              factor w_y and the smoothing's terms w_c
//   loss  = sum_c q_c * (lse - z_c) + z_loss * lse^2
//   dx_c  = (a * p_c - g * q_c - h * p_c * (log p_c + entropy)) * f'(x_c) / T
//                                                              a = g * (sum_c q_c + 2 * z_loss * lse) + g_lse
//                                                              h: upstream of entropy = -sum_c p_c * log p_c
//
// The plain path (kFull = false) has class indices and no option but weight, temperature and z-loss. For one row:
//
//   y = target[row];  x_y = x[y]                        if y is ignored: loss = 0, dx = 0, and x is not read
//   load the row                                        into registers or shared memory, if the store keeps it
//   sweep 1:  peak = max_c x_c                          each thread over its classes, then reduced over the team
//   sweep 2:  sum = sum_c 2^((x_c - peak) * log2(e) / T)                                  the same
//   log_sum = log(sum);  lse = peak / T + log_sum
//   loss = w_y * ((peak - x_y) / T + log_sum) + z_loss * lse^2                            written by one thread
//   g = upstream / T;  rest = (g_lse / T + g * 2 * z_loss * lse) / sum
//   sweep 3:  e_c = 2^((x_c - peak) * log2(e) / T)      if a gradient is wanted
//             dx_c = e_c * (w_y / sum * g + rest)                                         for c != y
//             dx_y = (e_y * w_y / sum - w_y) * g + e_y * rest
//
// A store that keeps nothing has one sweep in place of 1 and 2: a thread scales its sum down when its peak rises. A
// backward call has peak and log_sum from its forward call, and only sweep 3.
#pragma once
#include "kernel.h"
#include "../core/cuda/math.cuh"
#include "../core/cuda/row_store.cuh"

namespace tlk {

// The upstream gradient of the loss is factor * grad_loss / *divisor; grad_loss may be null, which is 1.
struct CrossEntropyOnDevice : CrossEntropy {
  double factor = 1;
  const double* divisor = nullptr;  // one number in device memory; null: 1
  bool wide_probabilities = false;  // they have the compute type, not the logits'
};

// Constants of a call in the compute type, so that no thread computes them in float64.
template <class A>
struct CrossEntropyConstants {
  A inv_t, softcap, to_z, to_exp2;  // z = f * to_z, exp(z) = 2^(f * to_exp2)
  A keep, spread, z_loss, factor;   // keep, spread: 1 - smoothing, smoothing / C, with C of the whole vocabulary

  explicit CrossEntropyConstants(const CrossEntropyOnDevice& c)
      : inv_t(A(c.inv_temperature)),
        softcap(A(c.softcap)),
        to_z(A(c.inv_temperature * (c.softcap != 0 ? c.softcap : 1))),
        to_exp2(A(c.inv_temperature * (c.softcap != 0 ? c.softcap : 1) * kLog2E)),
        keep(A(1 - c.smoothing)),
        spread(A(c.smoothing / c.spread_over)),
        z_loss(A(c.z_loss)),
        factor(A(c.factor)) {}
};

// Only kFull supports probabilities, softcap, smoothing and statistics: the plain kernel has a third of the
// instructions per logit.
template <class T, bool kFull>
class CrossEntropyRow {
 public:
  using A = Compute<T>;

  TLK_DEVICE CrossEntropyRow(const CrossEntropyOnDevice& call, const CrossEntropyConstants<A>& constants, int64_t row)
      : c(call), a(constants), row_(row) {
    valid_ = row < c.rows;
    softcap_ = kFull && c.softcap != 0;
    dense_ = kFull && (!c.indices || c.smoothing != 0);
    if (!valid_) return;
    x_ = static_cast<const T*>(c.x.data) + offset(c.x.stride);
    if (c.grad.data) grad_ = static_cast<T*>(c.grad.data) + offset(c.grad.stride);
    if (kFull && !c.indices) q_offset_ = offset(c.probabilities.stride);
    weight_ = static_cast<const A*>(c.weight);
    if (c.row_weight.data) row_weight_ = per_position(c.row_weight);
    counted_ = row_weight_ != 0;
    if (c.indices && counted_) {
      y_ = c.indices[row];
      counted_ = y_ != c.ignore_index;
      const bool elsewhere = c.elsewhere && y_ == -1;
      has_target_ = counted_ && y_ >= 0 && y_ < c.classes;
      out_of_range_ = counted_ && !elsewhere && !has_target_;
    }
    if (!has_target_) return;
    target_x_ = widen(x_[y_ * c.x.class_stride]);
    target_q_ = a.keep * weight_at(y_);
  }

  // Everything that is wanted of the row. `memory`: the store's shared memory.
  template <class Store>
  TLK_DEVICE void run(Store& store, Team& team, void* memory) {
    const int n = counted_ ? int(c.classes) : 0;
    store.load(x_, n, team, memory);
    if (c.normaliser_given) {
      if (dense_) sum_targets(store, team);
      if (valid_) take_normaliser();
      if (c.grad.data) team.sync();  // every thread has read the target's logit, which the gradient may overwrite
    } else {
      Store::kRereads ? sum_in_one_sweep(store, team) : sum_in_two_sweeps(store, team);
    }
    const bool correct = kFull && c.correct;  // needs more reductions
    if (!correct) team.has_read();
    write_loss(team);
    if (correct) {
      write_correct(store, team);
      team.has_read();
    }
    if (grad_) write_gradient(store, n == 0, team);
  }

 private:
  const CrossEntropyOnDevice& c;
  const CrossEntropyConstants<A>& a;
  int64_t row_, q_offset_ = 0, y_ = -1;
  const T* x_ = nullptr;
  T* grad_ = nullptr;
  const A* weight_ = nullptr;
  A target_x_ = 0, target_q_ = 0, row_weight_ = 1;
  A peak_ = 0, log_sum_ = 0, inv_sum_ = 0;
  A s_[4] = {};      // sums of exponentials; of q; of q * (peak - f); of exponentials * (f - peak)
  A error_[4] = {};  // their rounding errors, if one thread has the row (Kahan 1965)
  bool valid_ = false, softcap_ = false, dense_ = false, out_of_range_ = false, has_target_ = false;
  bool counted_ = false;  // whether the row takes part; another is not read, and its results and gradient are 0

  TLK_DEVICE int64_t offset(const int64_t (&stride)[kMaxAxes]) const {
    int64_t result = 0, rest = row_;
    for (int axis = c.axes - 1; axis > 0; --axis) {
      result += rest % c.size[axis] * stride[axis];
      rest /= c.size[axis];
    }
    return result + rest * stride[0];
  }
  TLK_DEVICE A per_position(const PerPosition& value) const {
    return value.data ? static_cast<const A*>(value.data)[row_ * value.stride] : A(0);
  }
  TLK_DEVICE A weight_at(int64_t k) const { return weight_ ? weight_[k] : A(1); }
  TLK_DEVICE A cap(A x) const { return softcap_ ? tanh(x / a.softcap) : x; }

  // The target's probability of class k, as given.
  TLK_DEVICE A probability(int64_t k) const {
    const int64_t index = q_offset_ + k * c.probabilities.class_stride;
    return c.wide_probabilities ? static_cast<const A*>(c.probabilities.data)[index]
                                : widen(static_cast<const T*>(c.probabilities.data)[index]);
  }
  // q_k without the target's term of a class index.
  TLK_DEVICE A q(int64_t k) const {
    const A unweighted = c.indices ? a.spread : probability(k) * a.keep + a.spread;
    return unweighted * weight_at(k);
  }

  TLK_DEVICE void take_normaliser() {
    peak_ = static_cast<const A*>(c.peak)[row_], log_sum_ = static_cast<const A*>(c.log_sum)[row_];
    inv_sum_ = fast_exp2(log_sum_ * A(-kLog2E));
  }

  // Adds the terms of class k to the sums, relative to `peak`.
  TLK_DEVICE void add(A (&sum)[4], int64_t k, A f, A peak) {
    if (kFull && k >= c.classes) return;
    const A distance = f - peak, e = fast_exp2(distance * a.to_exp2);
    sum[0] += e;
    if (!kFull) return;
    if (dense_) {
      const A q_k = q(k);
      sum[1] += q_k;
      sum[2] -= q_k * distance;
    }
    if (c.entropy && e != 0) sum[3] += e * distance;
  }
  // Adds the terms of classes k to k + N - 1. A thread that has the whole row adds in one long chain, and compensates
  // its rounding errors.
  template <bool kAlone, int N>
  TLK_DEVICE void add_all(int64_t k, const A (&v)[N], A peak) {
    A part[4] = {};
#pragma unroll
    for (int i = 0; i < N; ++i) add(kAlone ? part : s_, k + i, cap(v[i]), peak);
    if (!kAlone) return;
#pragma unroll
    for (int i = 0; i < (kFull ? 4 : 1); ++i) add_compensated<kAlone>(s_[i], error_[i], part[i]);
  }
  template <bool kAlone>
  static TLK_DEVICE void add_compensated(A& sum, A& error, A part) {
    const A term = part - error, next = sum + term, rounding = (next - sum) - term;
    error = kAlone && rounding - rounding == 0 ? rounding : A(0);  // not of infinite sums
    sum = next;
  }

  // The sum of q, where the normaliser is given.
  template <class Store>
  TLK_DEVICE void sum_targets(const Store& store, Team& team) {
    A error = 0;
    store.each([&](int k, auto& v) {
      A part = 0;
      for (int i = 0; i < int(sizeof v / sizeof(A)) && k + i < c.classes; ++i) part += q(k + i);
      add_compensated<Store::kAlone>(s_[1], error, part);
    });
    s_[1] = team.reduce<Sum>(s_[1]);
  }

  // Reduces the sums over the team.
  TLK_DEVICE void reduce_sums(Team& team) {
    if (kFull)
      team.reduce<Sum>(s_);
    else
      s_[0] = team.reduce<Sum>(s_[0]);
    log_sum_ = log(s_[0]), inv_sum_ = 1 / s_[0];
  }

  template <class Store>
  TLK_DEVICE void sum_in_two_sweeps(const Store& store, Team& team) {
    A top = Max::none<A>();
    store.each([&](int, auto& v) {
#pragma unroll
      for (A value : v) top = Max::join(top, value);
    });
    peak_ = cap(team.reduce<Max>(top));
    store.each([&](int k, auto& v) { add_all<Store::kAlone>(k, v, peak_); });
    reduce_sums(team);
  }

  // Each thread's sums are relative to its largest number so far.
  template <class Store>
  TLK_DEVICE void sum_in_one_sweep(const Store& store, Team& team) {
    A thread_peak = Max::none<A>();
    store.each([&](int k, auto& v) {
      A top = Max::none<A>();
#pragma unroll
      for (A value : v) top = Max::join(top, value);
      raise(thread_peak, cap(top));
      add_all<Store::kAlone>(k, v, finite_or_zero(thread_peak));
    });
    peak_ = team.reduce<Max>(thread_peak);
    raise(thread_peak, peak_);
    if (peak_ == Max::none<A>()) s_[0] = A(NAN);
    reduce_sums(team);
  }
  // Makes the sums relative to `top` if it is larger than their peak.
  TLK_DEVICE void raise(A& peak, A top) {
    if (!(top > peak)) return;
    if (s_[0] != 0) {
      const A scale = fast_exp2((peak - top) * a.to_exp2);
      if (kFull && c.entropy) s_[3] = scale == 0 ? A(0) : (s_[3] + s_[0] * (peak - top)) * scale;
      s_[0] *= scale;
      error_[0] *= scale, error_[3] *= scale;
    }
    if (kFull && s_[1] != 0) s_[2] += s_[1] * (top - peak);
    peak = top;
  }

  // Adds the target's term, and writes loss, normaliser and entropy.
  TLK_DEVICE void write_loss(const Team& team) {
    if (has_target_) {
      s_[1] += target_q_;
      s_[2] += target_q_ * (peak_ - cap(target_x_));
    }
    if (!valid_ || !team.leads()) return;
    const A lse = peak_ * a.to_z + log_sum_;
    if (c.loss) {
      A value = s_[2] * a.to_z + s_[1] * log_sum_;
      if (c.z_loss != 0) value += a.z_loss * lse * lse;
      static_cast<A*>(c.loss)[row_] = !counted_ ? A(0) : out_of_range_ ? A(NAN) : value * row_weight_;
    }
    if (c.normaliser_given) return;
    if (c.peak) {
      static_cast<A*>(c.peak)[row_] = counted_ ? peak_ : A(0);
      static_cast<A*>(c.log_sum)[row_] = counted_ ? log_sum_ : A(0);
    }
    if (kFull && c.entropy) static_cast<A*>(c.entropy)[row_] = counted_ ? log_sum_ - s_[3] * a.to_z * inv_sum_ : A(0);
  }

  // Writes whether the first largest logit is the target's; NaN counts as the largest, as in torch.argmax.
  template <class Store>
  TLK_DEVICE void write_correct(const Store& store, Team& team) {
    int64_t y = y_;
    A target_x = target_x_;
    bool has_target = has_target_;
    if (!c.indices) {  // the target is the first largest probability
      A top = Max::none<A>();
      bool nan = false;
      store.each([&](int k, auto& v) {
        for (int i = 0; i < int(sizeof v / sizeof(A)) && k + i < c.classes; ++i) {
          const A p = probability(k + i);
          top = Max::join(top, p);
          nan |= p != p;
        }
      });
      top = team.reduce<Max>(top);
      nan = team.reduce<Sum>(nan ? A(1) : A(0)) != 0;
      long long first = Min::none<long long>();
      store.each([&](int k, auto& v) {
        for (int i = 0; i < int(sizeof v / sizeof(A)) && k + i < c.classes; ++i) {
          const A p = probability(k + i);
          if (nan ? p != p : p == top) first = Min::join(first, k + i);
        }
      });
      y = team.reduce<Min>(first);
      has_target = counted_;
      if (has_target) target_x = widen(x_[y * c.x.class_stride]);
    }
    A beaten = 0;  // whether another class is the first largest
    store.each([&](int k, auto& v) {
      for (int i = 0; i < int(sizeof v / sizeof(A)); ++i) {
        const bool larger = v[i] > target_x || (v[i] != v[i] && target_x == target_x);
        const bool same = v[i] == target_x || (v[i] != v[i] && target_x != target_x);
        if (larger || (same && k + i < y)) beaten = 1;
      }
    });
    beaten = team.reduce<Sum>(beaten);
    if (valid_ && team.leads()) c.correct[row_] = has_target && beaten == 0;
  }

  // dx_c = (g * (e_c * p - q_c) + e_c * rest) * T * dz / dx, with e_c = 2^((f_c - peak) * to_exp2). e_c * p - q_c has
  // one product, so that it is exactly 0 where p_c is 1; the part of z-loss and lse is rounded apart from it.
  template <class Store>
  TLK_DEVICE void write_gradient(const Store& store, bool unread, const Team& team) {
    if (unread) return write_zeros(team);
    A upstream = c.grad_loss.data ? per_position(c.grad_loss) : A(1);
    upstream *= a.factor;
    if (c.divisor) upstream /= A(*c.divisor);
    const A g = out_of_range_ ? A(NAN) : upstream * row_weight_ * a.inv_t;
    A rest = per_position(c.grad_lse) * a.inv_t;
    if (c.z_loss != 0) rest += g * 2 * a.z_loss * (peak_ * a.to_z + log_sum_);
    const A p = s_[1] * inv_sum_;
    rest *= inv_sum_;
    const A plain = p * g + rest;
    const bool by_entropy = kFull && c.grad_entropy.data;
    A h = 0, mean = 0;  // the entropy adds h * (f - peak - mean) to `rest`; mean: the expectation of f - peak
    if (by_entropy) {
      h = -per_position(c.grad_entropy) * a.inv_t * a.to_z * inv_sum_;
      mean = (log_sum_ - static_cast<const A*>(c.entropy)[row_]) / a.to_z;
    }
    const int y = has_target_ ? int(y_) : -1;
    store.each(
        [&](int k, auto& v) {
#pragma unroll
          for (int i = 0; i < int(sizeof v / sizeof(A)); ++i) {
            const A f = cap(v[i]), e = fast_exp2((f - peak_) * a.to_exp2);
            if (!kFull) {
              v[i] = k + i == y ? (e * p - target_q_) * g + e * rest : e * plain;
              continue;
            }
            A q_k = dense_ && k + i < c.classes ? q(k + i) : A(0);
            if (k + i == y) q_k += target_q_;
            const A rest_k = by_entropy && e != 0 ? rest + (f - peak_ - mean) * h : rest;  // f may be -inf where e is 0
            v[i] = (e * p - q_k) * g + e * rest_k;
            if (softcap_)
              v[i] *= (A(1) - f) * (A(1) + f);  // small near the cap: from f, not from z, which is rounded again
          }
        },
        grad_);
  }
  TLK_DEVICE void write_zeros(const Team& team) {
    const int step = team.threads() * team.blocks();
    for (int k = team.thread() + int(team.rank()) * team.threads(); k < c.classes; k += step)
      grad_[k * c.grad.class_stride] = narrow<T>(A(0));
  }
};

}  // namespace tlk
