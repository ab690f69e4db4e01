// Cross entropy where the class axis is contiguous: the classes of a row are the vector lanes. Each block of a row is
// in the first-level cache for both its sweeps, and the gradient's sweep finds the row in the cache behind it.
#include "cpu_short.inl"

namespace tlk {
namespace TLK_ISA {

template <class T, class P, bool kCap>
struct Rows : CallOf<T, P, kCap> {
  using K = CallOf<T, P, kCap>;
  using K::c, K::cap, K::coefficients, K::dense, K::ignored, K::inner, K::join, K::keep, K::kLog2E, K::L;
  using K::cap1, K::log_sum_, K::offset, K::peak_, K::per_position, K::q_at, K::slope, K::spread, K::to_exp2, K::to_z,
      K::weight;
  using K::weight_at, K::write_correct, K::write_loss;
  using typename K::A;
  using typename K::Coefficients;
  using typename K::Target;
  using typename K::V;

  static constexpr int64_t kBlock = 4096;  // classes per block: at most half the first-level cache, summed before
                                           // rounding errors add up
  static constexpr int64_t kAhead = 2048;  // bytes fetched ahead of a long row's gradient sweep: half a page

  // The exponentials of a row that is not too long are kept from the sum to the gradient, each block's from the peak so
  // far: in the gradient's own memory, or for a 16-bit type in scratch. Twice the exponentials cost more than that.
  static constexpr bool kWide = sizeof(T) == sizeof(A);
  static constexpr int kStashed = int(kMaxStash / kBlock);
  A* const scratch;
  const bool stashes;

  Rows(const CrossEntropy& call, void* memory)
      : K(call),
        scratch(static_cast<A*>(memory)),
        stashes(!kCap && call.grad.data && !call.normaliser_given && call.classes <= kMaxStash && (kWide || memory)) {}

  A* stash_of(T* grad) const {
    if constexpr (kWide)
      return grad;
    else
      return scratch;
  }

  static TLK_INLINE A block_max(const T* x, int64_t begin, int64_t end) {
    const A lowest = -A(__builtin_inf());
    V m[4] = {set1(lowest), set1(lowest), set1(lowest), set1(lowest)};
    sweep<A>(begin, end, [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
      m[slot] = vmax(load_some(x + k, n, lowest), m[slot]);
    });
    return reduce_max<A>(vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
  }

  // Peak and sum of exponentials, block by block so that each is in the first-level cache for both its sweeps; with
  // kDense also the target's terms over all classes. What comes next is fetched meanwhile: the following block, or from
  // the last one the gradient's memory, or without a gradient the next row. The hardware does not look past a page.
  template <bool kDense>
  A row_sum(const T* x, const P* q, T* grad, const T* next_row, A& peak, A* from_peak, Target& target) const {
    A* const stash = stashes ? stash_of(grad) : nullptr;
    double sum = 0, q_sum = 0, q_distance = 0;
    peak = -A(__builtin_inf());
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      const bool last = begin + kBlock >= c.classes;
      const int64_t end = last ? c.classes : begin + kBlock;
      const bool fetch_grad = last && grad;
      const T* ahead = last ? next_row : x + begin + kBlock;
      const A top = cap1(block_max(x, begin, end));
      if (top > peak) {
        if (sum != 0) sum *= double(exp2<A>(set1(A((peak - top) * to_exp2)))[0]);
        if (q_sum != 0) q_distance += q_sum * (double(top) - double(peak));
        peak = top;
      }
      const A from = peak == -A(__builtin_inf()) ? A(0) : peak;  // so far -inf alone: their exponentials are 0
      if (stash) from_peak[begin / kBlock] = peak;               // of such a block -inf: its scale will be 0
      Chains<A> s, qs, qd;
      sweep<A>(begin, end, [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
        if (fetch_grad)
          __builtin_prefetch(grad + (k - begin), 1, 3);
        else
          __builtin_prefetch(ahead + (k - begin), 0, 3);
        V distance = cap(load_some(x + k, n, A(0))) - from;
        V e = exp2<A>(distance * to_exp2);
        s.part[slot] += only<A>(e, n);
        if (stash) store_some(stash + k, n, e);
        if constexpr (kDense) {
          V at = q_at(q, k, n);
          qs.part[slot] += only<A>(at, n);
          qd.part[slot] -= only<A>(at * distance, n);
        }
      });
      sum += double(s.sum());
      if constexpr (kDense) {
        q_sum += double(qs.sum());
        q_distance += double(qd.sum());
      }
    }
    target = {A(q_sum), A(q_distance)};
    return peak == -A(__builtin_inf()) ? A(__builtin_nan("")) : A(sum);
  }

  // What a gradient's sweep fetches: a long row's own next elements, where the hardware stops at each page; beside a
  // row of one block, whose gradient is here already, the next row.
  struct Ahead {
    const T* x;
    int64_t grad;
  };
  Ahead fetched_ahead(const T* x, const T* next_row) const {
    constexpr int64_t distance = kAhead / int64_t(sizeof(T));
    return c.classes > kBlock ? Ahead{x + distance, distance} : Ahead{next_row, 0};
  }

  // The dense part of a gradient; q_c is `spread` for every class unless kDense.
  template <bool kDense>
  void row_grad(const T* x, const P* q, T* grad, const T* next_row, A peak, Coefficients co) const {
    const V p = set1(co.p), g = set1(co.g), rest = set1(co.rest), constant = set1(spread);
    const Ahead ahead = fetched_ahead(x, next_row);
    sweep<A>(0, c.classes, [&](int64_t k, int, int n) __attribute__((always_inline)) {
      __builtin_prefetch(ahead.x + k, 0, 3);
      __builtin_prefetch(grad + k + ahead.grad, 1, 3);
      V f = cap(load_some(x + k, n, A(0)));
      V e = exp2<A>((f - peak) * to_exp2);
      V d = join(e, kDense ? q_at(q, k, n) : constant, p, g, rest);
      if constexpr (kCap) d *= slope(f);
      store_some(grad + k, n, d);
    });
  }

  // The same from the exponentials kept, where each block has its own scale.
  template <bool kDense>
  void row_grad_stashed(const T* x, const P* q, T* grad, const T* next_row, A peak, const A* from_peak,
                        Coefficients co) const {
    const V g = set1(co.g), constant = set1(spread);
    const Ahead ahead = fetched_ahead(x, next_row);
    const A* const stash = stash_of(grad);
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      const int64_t end = begin + kBlock < c.classes ? begin + kBlock : c.classes;
      const A scale = exp2<A>(set1(A((from_peak[begin / kBlock] - peak) * to_exp2)))[0];
      const V p = set1(A(co.p * scale)), rest = set1(A(co.rest * scale));
      sweep<A>(begin, end, [&](int64_t k, int, int n) __attribute__((always_inline)) {
        __builtin_prefetch(ahead.x + k, 0, 3);
        __builtin_prefetch(grad + k + ahead.grad, 1, 3);
        V e = load_some(stash + k, n, A(0));
        store_some(grad + k, n, join(e, kDense ? q_at(q, k, n) : constant, p, g, rest));
      });
    }
  }

  void row(int64_t i) const {
    const T* x = static_cast<const T*>(c.x.data) + offset(c.x, i);
    const P* q = c.indices ? nullptr : static_cast<const P*>(c.probabilities.data) + offset(c.probabilities, i);
    T* grad = c.grad.data ? static_cast<T*>(c.grad.data) + offset(c.grad, i) : nullptr;
    const bool counted = !ignored(i);

    if (!counted && c.skip_ignored && per_position(c.grad_lse, i) == 0) {
      if (peak_ && !c.normaliser_given) peak_[i] = log_sum_[i] = 0;
      write_loss(i, false, 0, 0, {});
      if (grad)
        sweep<A>(0, c.classes,
                 [&](int64_t k, int, int n) __attribute__((always_inline)) { store_some(grad + k, n, V{}); });
      return;
    }

    const T* next = i + 1 == c.rows ? x : static_cast<const T*>(c.x.data) + offset(c.x, i + 1);
    A peak, log_sum, inv_sum, from_peak[kStashed];
    Target target;
    if (c.normaliser_given) {
      peak = peak_[i], log_sum = log_sum_[i], inv_sum = exp2<A>(set1(A(log_sum * -kLog2E)))[0];
      if (dense) target.q = q ? q_total(q) : spread * A(c.weight_sum);
    } else {
      const A sum = dense ? row_sum<true>(x, q, grad, next, peak, from_peak, target)
                          : row_sum<false>(x, q, grad, next, peak, from_peak, target);
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
    if (c.entropy) static_cast<A*>(c.entropy)[i] = log_sum - row_expectation(x, peak) * to_z * inv_sum;
    if (c.correct) write_correct(i, x, q);
    if (!grad) return;

    const Coefficients co = coefficients(i, counted, peak, log_sum, inv_sum, target.q);
    const bool per_class = q || (dense && weight);
    V own{};  // computed before the sweep, which may overwrite x
    if (c.indices && counted) {
      const V f = cap(set1(own_x));
      const V e = exp2<A>((f - peak) * to_exp2);
      own = join(e, set1(A(own_q + spread * weight_at(c.indices[i]))), set1(co.p), set1(co.g), set1(co.rest));
      if constexpr (kCap) own *= slope(f);
    }
    if (stashes)
      per_class ? row_grad_stashed<true>(x, q, grad, next, peak, from_peak, co)
                : row_grad_stashed<false>(x, q, grad, next, peak, from_peak, co);
    else
      per_class ? row_grad<true>(x, q, grad, next, peak, co) : row_grad<false>(x, q, grad, next, peak, co);
    if (c.indices && counted) store1(grad + c.indices[i], own[0]);
  }

  A q_total(const P* q) const {
    double total = 0;
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      const int64_t end = begin + kBlock < c.classes ? begin + kBlock : c.classes;
      Chains<A> s;
      sweep<A>(begin, end, [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
        V at = q_at(q, k, n);
        s.part[slot] += only<A>(at, n);
      });
      total += double(s.sum());
    }
    return A(total);
  }

  // sum of 2^((f - peak) * to_exp2) * (f - peak), where 0 * -inf = 0
  A row_expectation(const T* x, A peak) const {
    double total = 0;
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      const int64_t end = begin + kBlock < c.classes ? begin + kBlock : c.classes;
      Chains<A> s;
      sweep<A>(begin, end, [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
        V distance = cap(load_some(x + k, n, A(0))) - peak;
        V e = exp2<A>(distance * to_exp2);
        e = only<A>(e, n);
        s.part[slot] += e == A(0) ? V{} : e * distance;
      });
      total += double(s.sum());
    }
    return A(total);
  }
};

template <class T, class P, bool kCap>
void rows(const CrossEntropy& call, int64_t begin, int64_t end, void* scratch) {
  if (call.classes <= ShortRows<T, P, kCap>::kWidth) return short_rows<T, P, kCap>(call, begin, end);
  const Rows<T, P, kCap> kernel(call, scratch);
  for (int64_t i = begin; i < end; ++i) kernel.row(i);
}

}  // namespace TLK_ISA
}  // namespace tlk
