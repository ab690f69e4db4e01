// Cross entropy over rows of logits: loss, normaliser, statistics and gradient, in any combination, for one instruction
// set. With f(x) = softcap * tanh(x / softcap) (or x), z = f(x) / T, p = softmax(z):
//
//   q_c   = w_c * ((1 - smoothing) * t_c + smoothing / C)      t: probabilities; for a class index y, w_y stands
//                                                              before its term and w_c before the smoothing's
//   loss  = sum_c q_c * (lse - z_c) + z_loss * lse^2
//   dx_c  = (a * p_c - g * q_c) * f'(x_c) / T,                 a = g * (sum_c q_c + 2 * z_loss * lse) + g_lse
//
// A row is read from memory once: its later sweeps find it in cache.
#include "cross_entropy.h"
#include "vec.h"

namespace tlk {
namespace TLK_ISA {

template <class T, class P, bool kCap>
struct Kernel {
  using A = typename Compute<T>::type;
  using V = Vec<A>;
  static constexpr int L = lanes<A>;
  static constexpr A kLog2E = A(1.4426950408889634074);
  static constexpr int64_t kBlock = 4096;  // classes per block: at most half the first-level cache, summed before rounding
                                           // errors add up
  static constexpr int64_t kAhead = 2048;  // bytes fetched ahead of a long row's gradient sweep: half a page
  static constexpr int kShort = 4;         // a row of up to this many vectors stays in registers

  const CrossEntropy& c;
  const A* weight;
  const A inv_t, softcap, inv_softcap;
  const A to_exp2;               // exp(f / T) = 2^(f * to_exp2)
  const A keep, spread;          // 1 - smoothing; smoothing / C
  const bool dense;              // q has a term for every class
  const int inner;               // last axis
  A* const peak_;
  A* const log_sum_;

  explicit Kernel(const CrossEntropy& call)
      : c(call),
        weight(static_cast<const A*>(call.weight)),
        inv_t(A(call.inv_temperature)),
        softcap(A(call.softcap)),
        inv_softcap(kCap ? A(1 / call.softcap) : A(0)),
        to_exp2(A(call.inv_temperature * 1.4426950408889634074)),
        keep(A(1 - call.smoothing)),
        spread(A(call.smoothing / double(call.classes))),
        dense(!call.indices || call.smoothing != 0),
        inner(call.axes - 1),
        peak_(static_cast<A*>(call.peak)),
        log_sum_(static_cast<A*>(call.log_sum)) {}

  // ---- what both kernels share ----

  template <class Pointer>
  int64_t offset(const Strided<Pointer>& tensor, int64_t row) const {
    int64_t at = 0;
    for (int axis = inner; axis > 0; --axis) {
      at += row % c.size[axis] * tensor.stride[axis];
      row /= c.size[axis];
    }
    return at + row * tensor.stride[0];
  }

  static A per_position(const PerPosition& value, int64_t row) {
    return value.data ? static_cast<const A*>(value.data)[row * value.stride] : A(0);
  }

  V cap(V x) const {
    if constexpr (kCap)
      return softcap * tanh(x * inv_softcap);
    else
      return x;
  }
  A cap1(A x) const { return cap(set1(x))[0]; }

  // d f / d x, from f
  V slope(V f) const {
    V t = f * inv_softcap;
    return A(1) - t * t;
  }

  bool ignored(int64_t row) const { return c.indices && c.indices[row] == c.ignore_index; }
  A weight_at(int64_t k) const { return weight ? weight[k] : A(1); }

  // What a row's q adds up to, and its product with the distance of the logits from the peak.
  struct Target {
    A q = 0, q_distance = 0;
  };

  void write_loss(int64_t row, bool counted, A peak, A log_sum, Target t) const {
    if (!c.loss) return;
    A value = 0;
    if (counted) {
      value = t.q_distance * inv_t + t.q * log_sum;
      if (c.z_loss != 0) {
        A lse = peak * inv_t + log_sum;
        value += A(c.z_loss) * lse * lse;
      }
    }
    static_cast<A*>(c.loss)[row] = value;
  }

  // dx_c = (e_c * p - q * q_c + e_c * rest) * f'(x_c), e_c = 2^((f_c - peak) * to_exp2). The share of the z-loss and of
  // lse stays apart: rounded into p it would not cancel against q_c where p_c is 1.
  struct Coefficients {
    A p, q, rest;
  };
  Coefficients coefficients(int64_t row, bool counted, A peak, A log_sum, A inv_sum, A q) const {
    const A g = counted ? per_position(c.grad_loss, row) * inv_t : A(0);
    A rest = per_position(c.grad_lse, row) * inv_t;
    if (counted && c.z_loss != 0) rest += g * A(2 * c.z_loss) * (peak * inv_t + log_sum);
    return {g * q * inv_sum, g, rest * inv_sum};
  }

  // The first largest element; a NaN counts as the largest, as torch.argmax has it.
  template <class E>
  static int64_t argmax(const E* p, int64_t stride, int64_t n) {
    int64_t best = 0;
    auto largest = load1(p);
    for (int64_t k = 1; k < n && largest == largest; ++k) {
      auto value = load1(p + k * stride);
      if (value > largest || value != value) best = k, largest = value;
    }
    return best;
  }
  void write_correct(int64_t row, const T* x, const P* q) const {
    int64_t truth = c.indices ? c.indices[row] : argmax(q, c.probabilities.class_stride, c.classes);
    c.correct[row] = !ignored(row) && argmax(x, c.x.class_stride, c.classes) == truth;
  }

  // ---- rows: the class axis is contiguous and its classes are the vector lanes ----

  // Calls body(first class, unroll slot, vector count of classes or L) over [begin, end).
  template <class Body>
  static void sweep(int64_t begin, int64_t end, Body body) {
    int64_t k = begin;
    for (; k + 4 * L <= end; k += 4 * L) {
      body(k, 0, L);
      body(k + L, 1, L);
      body(k + 2 * L, 2, L);
      body(k + 3 * L, 3, L);
    }
    for (; k + L <= end; k += L) body(k, 0, L);
    if (k < end) body(k, 0, int(end - k));
  }

  template <class E>
  static V load_some(const E* p, int n, A fill) {
    return n == L ? load(p) : load_n(p, n, set1(fill));
  }
  template <class E>
  static void store_some(E* p, int n, V v) {
    if (n == L)
      store(p, v);
    else
      store_n(p, n, v);
  }

  static A block_max(const T* x, int64_t begin, int64_t end) {
    const A lowest = -A(__builtin_inf());
    V m[4] = {set1(lowest), set1(lowest), set1(lowest), set1(lowest)};
    sweep(begin, end, [&](int64_t k, int slot, int n) { m[slot] = vmax(load_some(x + k, n, lowest), m[slot]); });
    return reduce_max<A>(vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
  }

  V q_at(const P* q, int64_t k, int n) const {
    V v = q ? load_some(q + k, n, A(0)) * keep + spread : set1(spread);
    return weight ? v * load_some(weight + k, n, A(0)) : v;
  }

  // Peak and sum of exponentials, block by block so that each is in the first-level cache for both its sweeps; with
  // kDense also the target's terms over all classes. What comes next is fetched meanwhile: the following block, or from
  // the last one the gradient's memory and the next row. The hardware does not look past a page of 4 KiB.
  template <bool kDense>
  A row_sum(const T* x, const P* q, const T* grad, const T* next_row, A& peak, Target& target) const {
    double sum = 0, q_sum = 0, q_distance = 0;
    peak = -A(__builtin_inf());
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      const bool last = begin + kBlock >= c.classes;
      const int64_t end = last ? c.classes : begin + kBlock;
      const T* ahead = last ? next_row : x + begin + kBlock;
      const T* written = grad ? grad : ahead;
      const A top = cap1(block_max(x, begin, end));
      if (top > peak) {
        if (sum != 0) sum *= double(exp2<A>(set1(A((peak - top) * to_exp2)))[0]);
        if (q_sum != 0) q_distance += q_sum * (double(top) - double(peak));
        peak = top;
      }
      const A from = peak == -A(__builtin_inf()) ? A(0) : peak;  // so far -inf alone: their exponentials are 0
      V s[4] = {}, qs[4] = {}, qd[4] = {};
      sweep(begin, end, [&](int64_t k, int slot, int n) {
        __builtin_prefetch(ahead + (k - begin), 0, 3);
        if (last) __builtin_prefetch(written + (k - begin), 1, 3);
        V distance = cap(load_some(x + k, n, A(0))) - from;
        V e = exp2<A>(distance * to_exp2);
        s[slot] += n == L || iota<A>() < n ? e : V{};
        if constexpr (kDense) {
          V at = q_at(q, k, n);
          qs[slot] += n == L || iota<A>() < n ? at : V{};
          qd[slot] -= n == L || iota<A>() < n ? at * distance : V{};
        }
      });
      sum += double(reduce_sum<A>((s[0] + s[1]) + (s[2] + s[3])));
      if constexpr (kDense) {
        q_sum += double(reduce_sum<A>((qs[0] + qs[1]) + (qs[2] + qs[3])));
        q_distance += double(reduce_sum<A>((qd[0] + qd[1]) + (qd[2] + qd[3])));
      }
    }
    target = {A(q_sum), A(q_distance)};
    return peak == -A(__builtin_inf()) ? A(__builtin_nan("")) : A(sum);
  }

  // The dense part of a gradient; q_c is `spread` for every class unless kDense.
  template <bool kDense>
  void row_grad(const T* x, const P* q, T* grad, A peak, Coefficients co) const {
    const V constant = set1(A(co.q * spread));
    const int64_t ahead = c.classes > kBlock ? kAhead / int64_t(sizeof(T)) : 0;
    sweep(0, c.classes, [&](int64_t k, int, int n) {
      if (ahead) {
        __builtin_prefetch(x + k + ahead, 0, 3);
        __builtin_prefetch(grad + k + ahead, 1, 3);
      }
      V f = cap(load_some(x + k, n, A(0)));
      V e = exp2<A>((f - peak) * to_exp2);
      V d = e * co.p - (kDense ? co.q * q_at(q, k, n) : constant) + e * co.rest;
      if constexpr (kCap) d *= slope(f);
      store_some(grad + k, n, d);
    });
  }

  // A short row between its two uses: the capped logits and their exponentials from the peak.
  struct InRegisters {
    V f[kShort], e[kShort];
    int vectors;
  };
  int count(int v) const { return v * L + L <= c.classes ? L : int(c.classes - v * L); }
  static typename Simd<A>::I in_row(int n) { return iota<A>() < n; }

  void load_short(const T* x, InRegisters& r) const {
    r.vectors = int((c.classes + L - 1) / L);
    for (int v = 0; v < r.vectors; ++v) r.f[v] = load_some(x + v * L, count(v), -A(__builtin_inf()));
  }
  A max_short(const InRegisters& r) const {
    V m = set1(-A(__builtin_inf()));
    for (int v = 0; v < r.vectors; ++v) m = vmax(r.f[v], m);
    return reduce_max<A>(m);
  }
  void exp_short(InRegisters& r, A peak) const {
    for (int v = 0; v < r.vectors; ++v) {
      if constexpr (kCap) r.f[v] = cap(r.f[v]);
      r.e[v] = exp2<A>((r.f[v] - peak) * to_exp2);
      if constexpr (kCap) r.e[v] = in_row(count(v)) ? r.e[v] : V{};
    }
  }
  A sum_short(const InRegisters& r, const P* q, A peak, Target& target) const {
    V s{};
    for (int v = 0; v < r.vectors; ++v) s += r.e[v];
    if (dense) {
      V qs{}, qd{};
      for (int v = 0; v < r.vectors; ++v) {
        V at = q_at(q, v * L, count(v));
        qs += in_row(count(v)) ? at : V{};
        qd -= in_row(count(v)) ? at * (r.f[v] - peak) : V{};
      }
      target = {reduce_sum<A>(qs), reduce_sum<A>(qd)};
    }
    return reduce_sum<A>(s);
  }
  template <bool kDense>
  void grad_short(const InRegisters& r, const P* q, T* grad, Coefficients co, int64_t y, A own_q) const {
    for (int v = 0; v < r.vectors; ++v) {
      V at = kDense ? q_at(q, v * L, count(v)) : set1(spread);
      at += iota<A>() == int(y - v * L) ? set1(own_q) : V{};
      V d = r.e[v] * co.p - at * co.q + r.e[v] * co.rest;
      if constexpr (kCap) d *= slope(r.f[v]);
      store_some(grad + v * L, count(v), d);
    }
  }

  template <bool kIsShort>
  void row(int64_t i) const {
    const T* x = static_cast<const T*>(c.x.data) + offset(c.x, i);
    const P* q = c.indices ? nullptr : static_cast<const P*>(c.probabilities.data) + offset(c.probabilities, i);
    T* grad = c.grad.data ? static_cast<T*>(c.grad.data) + offset(c.grad, i) : nullptr;
    const bool counted = !ignored(i);

    if (!counted && c.skip_ignored && per_position(c.grad_lse, i) == 0) {
      if (peak_ && !c.normaliser_given) peak_[i] = log_sum_[i] = 0;
      write_loss(i, false, 0, 0, {});
      if (grad) sweep(0, c.classes, [&](int64_t k, int, int n) { store_some(grad + k, n, V{}); });
      return;
    }

    InRegisters r;
    if constexpr (kIsShort) load_short(x, r);

    A peak, log_sum, inv_sum;
    Target target;
    if (c.normaliser_given) {
      peak = peak_[i], log_sum = log_sum_[i], inv_sum = exp2<A>(set1(A(log_sum * -kLog2E)))[0];
      if (dense) target.q = q ? q_total(q) : spread * A(c.weight_sum);
      if constexpr (kIsShort) exp_short(r, peak);
    } else {
      A sum;
      if constexpr (kIsShort) {
        peak = cap1(max_short(r));
        exp_short(r, peak);
        sum = sum_short(r, q, peak, target);
      } else {
        const T* next = i + 1 < c.rows ? static_cast<const T*>(c.x.data) + offset(c.x, i + 1) : x;
        sum = dense ? row_sum<true>(x, q, grad, next, peak, target) : row_sum<false>(x, q, grad, next, peak, target);
      }
      log_sum = log_from_one(set1(sum))[0], inv_sum = 1 / sum;
      if (peak_) peak_[i] = peak, log_sum_[i] = log_sum;
    }

    A own_q = 0, own_x = 0;  // the term of a class index
    if (c.indices && counted) {
      own_x = load1(x + c.indices[i]);
      own_q = keep * weight_at(c.indices[i]);
      target.q += own_q;
      target.q_distance += own_q * (peak - cap1(own_x));
    }
    write_loss(i, counted, peak, log_sum, target);
    if (c.entropy) static_cast<A*>(c.entropy)[i] = log_sum - row_expectation(x, peak) * inv_t * inv_sum;
    if (c.correct) write_correct(i, x, q);
    if (!grad) return;

    const Coefficients co = coefficients(i, counted, peak, log_sum, inv_sum, target.q);
    const bool per_class = q || (dense && weight);
    if constexpr (kIsShort) {
      const int64_t y = c.indices && counted ? c.indices[i] : -1;
      per_class ? grad_short<true>(r, q, grad, co, y, own_q) : grad_short<false>(r, q, grad, co, y, own_q);
    } else {
      V own{};  // computed before the sweep, which may overwrite x
      if (c.indices && counted) {
        const V f = cap(set1(own_x));
        const V e = exp2<A>((f - peak) * to_exp2);
        own = e * co.p - co.q * (own_q + spread * weight_at(c.indices[i])) + e * co.rest;
        if constexpr (kCap) own *= slope(f);
      }
      per_class ? row_grad<true>(x, q, grad, peak, co) : row_grad<false>(x, q, grad, peak, co);
      if (c.indices && counted) store1(grad + c.indices[i], own[0]);
    }
  }

  A q_total(const P* q) const {
    double total = 0;
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      const int64_t end = begin + kBlock < c.classes ? begin + kBlock : c.classes;
      V s[4] = {};
      sweep(begin, end, [&](int64_t k, int slot, int n) {
        V at = q_at(q, k, n);
        s[slot] += n == L || iota<A>() < n ? at : V{};
      });
      total += double(reduce_sum<A>((s[0] + s[1]) + (s[2] + s[3])));
    }
    return A(total);
  }

  // sum of 2^((f - peak) * to_exp2) * (f - peak), where 0 * -inf = 0
  A row_expectation(const T* x, A peak) const {
    double total = 0;
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      const int64_t end = begin + kBlock < c.classes ? begin + kBlock : c.classes;
      V s[4] = {};
      sweep(begin, end, [&](int64_t k, int slot, int n) {
        V distance = cap(load_some(x + k, n, A(0))) - peak;
        V e = exp2<A>(distance * to_exp2);
        e = n == L || iota<A>() < n ? e : V{};
        s[slot] += e == A(0) ? V{} : e * distance;
      });
      total += double(reduce_sum<A>((s[0] + s[1]) + (s[2] + s[3])));
    }
    return A(total);
  }

  // ---- tiles: the positions are the vector lanes; a tile's logits, capped, lie in scratch as classes x width ----

  static constexpr int64_t kSumBlock = 256;  // classes per partial sum, as kBlock is for rows

  struct Tile {
    int64_t row;      // of the first position
    int n, width;     // positions; those that scratch has room for
    int vectors;      // that hold the positions
    A* scratch;
    const T* x;
    const P* q;
    T* grad;
  };

  template <class E>
  static V load_positions(const E* p, int64_t stride, int n) {
    if (stride == 1) return load_some(p, n, A(0));
    V v{};
    for (int i = 0; i < n; ++i) v[i] = load1(p + i * stride);
    return v;
  }
  template <class E>
  static void store_positions(E* p, int64_t stride, int n, V v) {
    if (stride == 1) return store_some(p, n, v);
    for (int i = 0; i < n; ++i) store1(p + i * stride, v[i]);
  }
  static int count(const Tile& t, int v) { return t.n - v * L < L ? t.n - v * L : L; }

  // q_c at the positions of vector v
  V tile_q(const Tile& t, int64_t k, int v) const {
    V at = set1(spread);
    if (t.q) {
      const int64_t stride = c.probabilities.stride[inner];
      at += keep * load_positions(t.q + k * c.probabilities.class_stride + v * L * stride, stride, count(t, v));
    }
    return at * weight_at(k);
  }

  void load_tile(const Tile& t, A* peak) const {
    const int64_t stride = c.x.stride[inner];
    for (int v = 0; v < t.vectors; ++v) store(peak + v * L, set1(-A(__builtin_inf())));
    for (int64_t k = 0; k < c.classes; ++k)
      for (int v = 0; v < t.vectors; ++v) {
        V f = cap(load_positions(t.x + k * c.x.class_stride + v * L * stride, stride, count(t, v)));
        store(t.scratch + k * t.width + v * L, f);
        store(peak + v * L, vmax(f, load(peak + v * L)));
      }
  }

  void sum_tile(const Tile& t, const A* peak, A* sum, A* q_sum, A* q_distance, A* expectation) const {
    for (int v = 0; v < t.vectors; ++v) {
      const V top = load(peak + v * L);
      V s{}, qs{}, qd{}, ex{};
      for (int64_t begin = 0; begin < c.classes; begin += kSumBlock) {
        const int64_t end = begin + kSumBlock < c.classes ? begin + kSumBlock : c.classes;
        V bs{}, bqs{}, bqd{}, bex{};
        for (int64_t k = begin; k < end; ++k) {
          V distance = load(t.scratch + k * t.width + v * L) - top;
          V e = exp2<A>(distance * to_exp2);
          bs += e;
          if (dense) {
            V at = tile_q(t, k, v);
            bqs += at;
            bqd -= at * distance;
          }
          if (c.entropy) bex += e == A(0) ? V{} : e * distance;
        }
        s += bs, qs += bqs, qd += bqd, ex += bex;
      }
      store(sum + v * L, s);
      store(q_sum + v * L, qs);
      store(q_distance + v * L, qd);
      store(expectation + v * L, ex);
    }
  }

  void grad_tile(const Tile& t, const A* peak, const A* p, const A* g, const A* rest, const A* own_q,
                 bool any_ignored) const {
    for (int64_t k = 0; k < c.classes; ++k)
      for (int v = 0; v < t.vectors; ++v) {
        A* at = t.scratch + k * t.width + v * L;
        const V f = load(at);
        const V e = exp2<A>((f - load(peak + v * L)) * to_exp2);
        V d = e * load(p + v * L);
        if (dense) d -= load(g + v * L) * tile_q(t, k, v);
        d += e * load(rest + v * L);
        if constexpr (kCap) d *= slope(f);
        if (any_ignored) d = load(g + v * L) == A(0) && load(rest + v * L) == A(0) ? V{} : d;  // even where its logits are NaN
        store(at, d);
      }
    if (c.indices)
      for (int i = 0; i < t.n; ++i)
        if (!ignored(t.row + i)) t.scratch[c.indices[t.row + i] * t.width + i] -= own_q[i];
    const int64_t stride = c.grad.stride[inner];
    for (int64_t k = 0; k < c.classes; ++k)
      for (int v = 0; v < t.vectors; ++v)
        store_positions(t.grad + k * c.grad.class_stride + v * L * stride, stride, count(t, v),
                        load(t.scratch + k * t.width + v * L));
  }

  void tile(const Tile& t) const {
    A peak[kMaxTileWidth], sum[kMaxTileWidth], q_sum[kMaxTileWidth], q_distance[kMaxTileWidth], ex[kMaxTileWidth];
    A p[kMaxTileWidth] = {}, g[kMaxTileWidth] = {}, rest[kMaxTileWidth] = {}, own_q[kMaxTileWidth];
    load_tile(t, peak);
    if (c.normaliser_given) {
      for (int i = 0; i < t.n; ++i) peak[i] = peak_[t.row + i], q_sum[i] = spread * A(c.weight_sum);
      if (t.q)
        for (int v = 0; v < t.vectors; ++v) {
          V total{};
          for (int64_t k = 0; k < c.classes; ++k) total += tile_q(t, k, v);
          store(q_sum + v * L, total);
        }
    } else {
      sum_tile(t, peak, sum, q_sum, q_distance, ex);
    }

    for (int v = 0; v < t.vectors; ++v) {  // log_sum in place of sum; its inverse in ex, which the entropy has used
      V log_sum{}, inverse{};
      const int n = count(t, v);
      if (c.normaliser_given) {
        log_sum = load_some(log_sum_ + t.row + v * L, n, A(0));
        inverse = exp2<A>(log_sum * -kLog2E);
      } else {
        const V s = load(sum + v * L);
        log_sum = log_from_one(s), inverse = A(1) / s;
        if (c.entropy)
          store_some(static_cast<A*>(c.entropy) + t.row + v * L, n, log_sum - load(ex + v * L) * inv_t * inverse);
      }
      store(sum + v * L, log_sum);
      store(ex + v * L, inverse);
    }

    bool any_ignored = false;
    for (int i = 0; i < t.n; ++i) {
      const int64_t row = t.row + i;
      const bool counted = !ignored(row);
      any_ignored |= !counted;
      if (peak_ && !c.normaliser_given) peak_[row] = peak[i], log_sum_[row] = sum[i];
      Target target;
      if (dense) target = {q_sum[i], c.normaliser_given ? A(0) : q_distance[i]};
      A f = 0;
      own_q[i] = 0;
      if (c.indices && counted) {
        f = t.scratch[c.indices[row] * t.width + i];
        own_q[i] = keep * weight_at(c.indices[row]);
        target.q += own_q[i];
        target.q_distance += own_q[i] * (peak[i] - f);
      }
      write_loss(row, counted, peak[i], sum[i], target);
      if (c.correct) write_correct(row, t.x + i * c.x.stride[inner], t.q ? t.q + i * c.probabilities.stride[inner] : t.q);
      if (t.grad) {
        const Coefficients co = coefficients(row, counted, peak[i], sum[i], ex[i], target.q);
        p[i] = co.p, g[i] = co.q, rest[i] = co.rest, own_q[i] *= co.q;
        if constexpr (kCap) own_q[i] *= slope(set1(f))[0];
      }
    }
    if (t.grad) grad_tile(t, peak, p, g, rest, own_q, any_ignored);
  }
};

template <class T, class P, bool kCap>
void rows(const CrossEntropy& call, int64_t begin, int64_t end) {
  using K = Kernel<T, P, kCap>;
  const K kernel(call);
  if (call.classes <= K::kShort * K::L)
    for (int64_t i = begin; i < end; ++i) kernel.template row<true>(i);
  else
    for (int64_t i = begin; i < end; ++i) kernel.template row<false>(i);
}

template <class T, class P, bool kCap>
void tiles(const CrossEntropy& call, int64_t begin, int64_t end, int width, void* scratch) {
  using K = Kernel<T, P, kCap>;
  const K kernel(call);
  const int64_t line = call.size[kernel.inner], per_line = (line + width - 1) / width;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t start = i % per_line * width, row = i / per_line * line + start;
    const int n = int(line - start < width ? line - start : width);
    typename K::Tile t{row,
                       n,
                       width,
                       (n + K::L - 1) / K::L,
                       static_cast<typename K::A*>(scratch),
                       static_cast<const T*>(call.x.data) + kernel.offset(call.x, row),
                       nullptr,
                       nullptr};
    if (!call.indices) t.q = static_cast<const P*>(call.probabilities.data) + kernel.offset(call.probabilities, row);
    if (call.grad.data) t.grad = static_cast<T*>(call.grad.data) + kernel.offset(call.grad, row);
    kernel.tile(t);
  }
}

template <class T, class P>
CrossEntropyKernels select(bool softcap) {
  return softcap ? CrossEntropyKernels{rows<T, P, true>, tiles<T, P, true>}
                 : CrossEntropyKernels{rows<T, P, false>, tiles<T, P, false>};
}

inline CrossEntropyKernels cross_entropy(Scalar logits, Scalar probabilities, bool softcap) {
  const bool wide = probabilities == Scalar::f32;
  switch (logits) {
    case Scalar::f64:
      return select<double, double>(softcap);
    case Scalar::f32:
      return select<float, float>(softcap);
    case Scalar::bf16:
      return wide ? select<bf16, float>(softcap) : select<bf16, bf16>(softcap);
    default:
      return wide ? select<f16, float>(softcap) : select<f16, f16>(softcap);
  }
}

}  // namespace TLK_ISA
}  // namespace tlk
