// Loss, normaliser, statistics and gradient of a row, in any combination, by the threads of a team and whatever store
// holds the row. With f(x) = tanh(x / softcap) (or x), z = f(x) * softcap / T, p = softmax(z):
//
//   q_c   = w_c * ((1 - smoothing) * t_c + smoothing / C)      t: probabilities; for a class index y, w_y stands
//                                                              before its term and w_c before the smoothing's
//   loss  = sum_c q_c * (lse - z_c) + z_loss * lse^2
//   dx_c  = (a * p_c - g * q_c) * f'(x_c) / T,                 a = g * (sum_c q_c + 2 * z_loss * lse) + g_lse
#pragma once
#include "kernel.h"
#include "../core/cuda/row_store.cuh"

namespace tlk {

// A call with what stays on the device: the gradient is by factor * grad_loss / *divisor. Without grad_loss that is 1.
struct CrossEntropyOnDevice : CrossEntropy {
  double factor = 1;
  const double* divisor = nullptr;
  bool wide_probabilities = false;  // of the compute type, not the logits'
};

// Its numbers in the compute type, so that no thread computes them in float64.
template <class A>
struct CrossEntropyNumbers {
  A inv_t, softcap, to_z, to_exp2, keep, spread, z_loss, factor;  // z = f * to_z, exp(z) = 2^(f * to_exp2)

  explicit CrossEntropyNumbers(const CrossEntropyOnDevice& c)
      : inv_t(A(c.inv_temperature)),
        softcap(A(c.softcap)),
        to_z(A(c.inv_temperature * (c.softcap != 0 ? c.softcap : 1))),
        to_exp2(A(c.inv_temperature * (c.softcap != 0 ? c.softcap : 1) * 1.4426950408889634074)),
        keep(A(1 - c.smoothing)),
        spread(A(c.smoothing / double(c.classes))),
        z_loss(A(c.z_loss)),
        factor(A(c.factor)) {}
};

TLK_DEVICE float exponential2(float x) { return exp2_approximate(x); }
TLK_DEVICE double exponential2(double x) { return exp2(x); }
TLK_DEVICE float logarithm(float x) { return logf(x); }
TLK_DEVICE double logarithm(double x) { return log(x); }
TLK_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
TLK_DEVICE double hyperbolic_tangent(double x) { return tanh(x); }

// Probabilities, softcap, smoothing, statistics are looked at with kFull alone: the plain kernel has a third of the
// instructions for each logit.
template <class T, bool kFull>
class RowOf {
 public:
  using A = Compute<T>;

  TLK_DEVICE RowOf(const CrossEntropyOnDevice& call, const CrossEntropyNumbers<A>& numbers, int64_t row)
      : c(call), a(numbers), row_(row) {
    there_ = row < c.rows;
    softcap_ = kFull && c.softcap != 0;
    dense_ = kFull && (!c.indices || c.smoothing != 0);
    if (!there_) return;
    x_ = static_cast<const T*>(c.x.data) + offset(c.x.stride);
    if (c.grad.data) grad_ = static_cast<T*>(c.grad.data) + offset(c.grad.stride);
    if (kFull && !c.indices) q_at_ = offset(c.probabilities.stride);
    weight_ = static_cast<const A*>(c.weight);
    const A by_lse = given(c.grad_lse);
    counted_ = true;
    if (c.indices) {
      y_ = c.indices[row];
      counted_ = y_ != c.ignore_index;
      bad_ = counted_ && (y_ < 0 || y_ >= c.classes);
    }
    own_ = c.indices && counted_ && !bad_;
    reads_ = counted_ || !c.skip_ignored || by_lse != 0;
    if (!own_) return;
    own_x_ = widen(x_[y_ * c.x.class_stride]);
    own_q_ = a.keep * weight_at(y_);
  }

  template <class Store>
  TLK_DEVICE void run(Store& store, Team& team, void* memory) {
    const int n = there_ && reads_ ? int(c.classes) : 0;
    store.load(x_, n, team, memory);
    if (c.normaliser_given && !dense_) {
      if (there_) take_normaliser();
      if (c.grad.data) team.sync();  // all have read the target's logit, which may be overwritten
    } else {
      Store::kRereads ? sum_at_once(store, team) : sum_in_two(store, team);
    }
    const bool correct = kFull && c.correct;  // takes more reductions
    if (!correct) team.has_read();
    finish(team);
    if (correct) {
      write_correct(store, team);
      team.has_read();
    }
    if (grad_) write_gradient(store, n == 0, team);
  }

 private:
  const CrossEntropyOnDevice& c;
  const CrossEntropyNumbers<A>& a;
  int64_t row_, q_at_ = 0, y_ = -1;
  const T* x_ = nullptr;
  T* grad_ = nullptr;
  const A* weight_ = nullptr;
  A own_x_ = 0, own_q_ = 0;
  A peak_ = 0, log_sum_ = 0, inv_sum_ = 0;
  A s_[4] = {};     // sum of exponentials; of q; of q * (peak - f); of exponentials * (f - peak)
  A lost_[4] = {};  // by rounding them, where one thread has the row (Kahan 1965)
  bool there_ = false, softcap_ = false, dense_ = false, counted_ = false, bad_ = false, own_ = false, reads_ = false;

  TLK_DEVICE int64_t offset(const int64_t (&stride)[kMaxAxes]) const {
    int64_t at = 0, rest = row_;
    for (int axis = c.axes - 1; axis > 0; --axis) {
      at += rest % c.size[axis] * stride[axis];
      rest /= c.size[axis];
    }
    return at + rest * stride[0];
  }
  TLK_DEVICE A given(const PerPosition& value) const {
    return value.data ? static_cast<const A*>(value.data)[row_ * value.stride] : A(0);
  }
  TLK_DEVICE A weight_at(int64_t k) const { return weight_ ? weight_[k] : A(1); }
  TLK_DEVICE A cap(A x) const { return softcap_ ? hyperbolic_tangent(x / a.softcap) : x; }

  // A target's probability, as it was given.
  TLK_DEVICE A probability(int64_t k) const {
    const int64_t at = q_at_ + k * c.probabilities.class_stride;
    return c.wide_probabilities ? static_cast<const A*>(c.probabilities.data)[at]
                                : widen(static_cast<const T*>(c.probabilities.data)[at]);
  }
  // q_k but for a class index's own term
  TLK_DEVICE A q(int64_t k) const {
    const A at = c.indices ? a.spread : probability(k) * a.keep + a.spread;
    return at * weight_at(k);
  }

  TLK_DEVICE void take_normaliser() {
    peak_ = static_cast<const A*>(c.peak)[row_], log_sum_ = static_cast<const A*>(c.log_sum)[row_];
    inv_sum_ = exponential2(log_sum_ * A(-1.4426950408889634074));
  }

  // Adds a number's terms to the sums, `peak` being the largest so far.
  TLK_DEVICE void add(A (&sum)[4], int64_t k, A f, A peak) {
    if (kFull && k >= c.classes) return;
    const A distance = f - peak, e = exponential2(distance * a.to_exp2);
    sum[0] += e;
    if (!kFull) return;
    if (dense_) {
      const A at = q(k);
      sum[1] += at;
      sum[2] -= at * distance;
    }
    if (c.entropy && e != 0) sum[3] += e * distance;
  }
  // The same of neighbouring numbers. A row's only thread adds in one chain, where rounding would add up too.
  template <bool kAlone, int N>
  TLK_DEVICE void add_all(int64_t k, const A (&v)[N], A peak) {
    A part[4] = {};
#pragma unroll
    for (int i = 0; i < N; ++i) add(kAlone ? part : s_, k + i, cap(v[i]), peak);
    if (!kAlone) return;
#pragma unroll
    for (int i = 0; i < (kFull ? 4 : 1); ++i) {
      const A more = part[i] - lost_[i], sum = s_[i] + more, less = (sum - s_[i]) - more;
      lost_[i] = less - less == 0 ? less : A(0);  // beside an infinity nothing is lost
      s_[i] = sum;
    }
  }

  TLK_DEVICE void add_up(Team& team) {
    if (kFull)
      team.reduce<Sum>(s_);
    else
      s_[0] = team.reduce<Sum>(s_[0]);
    log_sum_ = logarithm(s_[0]), inv_sum_ = 1 / s_[0];
  }

  template <class Store>
  TLK_DEVICE void sum_in_two(const Store& store, Team& team) {
    A top = Max::none<A>();
    store.each([&](int, auto& v) {
#pragma unroll
      for (A value : v) top = Max::join(top, value);
    });
    peak_ = cap(team.reduce<Max>(top));
    store.each([&](int k, auto& v) { add_all<Store::kAlone>(k, v, peak_); });
    add_up(team);
  }

  // In one sweep: each thread's sums are from its own largest number so far.
  template <class Store>
  TLK_DEVICE void sum_at_once(const Store& store, Team& team) {
    A mine = Max::none<A>();
    store.each([&](int k, auto& v) {
      A top = Max::none<A>();
#pragma unroll
      for (A value : v) top = Max::join(top, value);
      raise(mine, cap(top));
      const A from = mine == Max::none<A>() ? A(0) : mine;  // so far -inf alone: their exponentials are 0
      add_all<Store::kAlone>(k, v, from);
    });
    peak_ = team.reduce<Max>(mine);
    raise(mine, peak_);
    if (peak_ == Max::none<A>()) s_[0] = A(NAN);
    add_up(team);
  }
  // Sums from `mine` become sums from `top`.
  TLK_DEVICE void raise(A& mine, A top) {
    if (!(top > mine)) return;
    if (s_[0] != 0) {
      const A scale = exponential2((mine - top) * a.to_exp2);
      if (kFull && c.entropy) s_[3] = scale == 0 ? A(0) : (s_[3] + s_[0] * (mine - top)) * scale;
      s_[0] *= scale;
      lost_[0] *= scale, lost_[3] *= scale;
    }
    if (kFull && s_[1] != 0) s_[2] += s_[1] * (top - mine);
    mine = top;
  }

  TLK_DEVICE void finish(const Team& team) {
    if (own_) {
      s_[1] += own_q_;
      s_[2] += own_q_ * (peak_ - cap(own_x_));
    }
    if (!there_ || !team.leads()) return;
    const A lse = peak_ * a.to_z + log_sum_;
    if (c.loss) {
      A value = s_[2] * a.to_z + s_[1] * log_sum_;
      if (c.z_loss != 0) value += a.z_loss * lse * lse;
      static_cast<A*>(c.loss)[row_] = !counted_ ? A(0) : bad_ ? A(NAN) : value;
    }
    if (c.peak && !c.normaliser_given) {
      static_cast<A*>(c.peak)[row_] = reads_ ? peak_ : A(0);
      static_cast<A*>(c.log_sum)[row_] = reads_ ? log_sum_ : A(0);
    }
    if (kFull && c.entropy) static_cast<A*>(c.entropy)[row_] = log_sum_ - s_[3] * a.to_z * inv_sum_;
  }

  // Whether the first largest logit is the target's; a NaN counts as the largest, as torch.argmax has it.
  template <class Store>
  TLK_DEVICE void write_correct(const Store& store, Team& team) {
    int64_t y = y_;
    A truth = own_x_;
    bool has = own_;
    if (!c.indices) {  // the first largest probability
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
      has = there_ && reads_;
      if (has) truth = widen(x_[y * c.x.class_stride]);
    }
    A beaten = 0;
    store.each([&](int k, auto& v) {
      for (int i = 0; i < int(sizeof v / sizeof(A)); ++i) {
        const bool larger = v[i] > truth || (v[i] != v[i] && truth == truth);
        const bool same = v[i] == truth || (v[i] != v[i] && truth != truth);
        if (larger || (same && k + i < y)) beaten = 1;
      }
    });
    beaten = team.reduce<Sum>(beaten);
    if (there_ && team.leads()) c.correct[row_] = has && beaten == 0;
  }

  // dx_c = (g * (e_c * p - q_c) + e_c * rest) * T * dz / dx, e_c = 2^((f_c - peak) * to_exp2). One product against q_c,
  // so that it cancels where p_c is 1; and not rounded together with the share of z-loss and lse.
  template <class Store>
  TLK_DEVICE void write_gradient(const Store& store, bool unread, const Team& team) {
    if (unread) return write_zeros(team);
    A up = c.grad_loss.data ? given(c.grad_loss) : A(1);
    up *= a.factor;
    if (c.divisor) up /= A(*c.divisor);
    const A g = bad_ ? A(NAN) : counted_ ? up * a.inv_t : A(0);
    A rest = given(c.grad_lse) * a.inv_t;
    if (counted_ && c.z_loss != 0) rest += g * 2 * a.z_loss * (peak_ * a.to_z + log_sum_);
    const A p = s_[1] * inv_sum_;
    rest *= inv_sum_;
    const A plain = p * g + rest;
    const int y = own_ ? int(y_) : -1;
    store.each(
        [&](int k, auto& v) {
#pragma unroll
          for (int i = 0; i < int(sizeof v / sizeof(A)); ++i) {
            const A f = cap(v[i]), e = exponential2((f - peak_) * a.to_exp2);
            if (!kFull) {
              v[i] = k + i == y ? (e * p - own_q_) * g + e * rest : e * plain;
              continue;
            }
            A at = dense_ && k + i < c.classes ? q(k + i) : A(0);
            if (k + i == y) at += own_q_;
            v[i] = (e * p - at) * g + e * rest;
            if (softcap_) v[i] *= (A(1) - f) * (A(1) + f);  // of f as it is: near the cap it is small
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
