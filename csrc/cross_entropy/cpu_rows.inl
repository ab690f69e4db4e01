// Cross entropy with contiguous classes: the classes of a row are the vector lanes. A block of a row stays in the
// first-level cache for its two sweeps, the row in the second-level cache for the gradient's sweep.
#include "cpu_short.inl"

namespace tlk {
namespace TLK_ISA {

template <class T, class P, bool kCap>
struct RowKernel : Terms<T, P, kCap> {
  using K = Terms<T, P, kCap>;
  using K::c, K::cap, K::cap1, K::coefficients, K::computes_entropy, K::counted, K::dense, K::join, K::keep;
  using K::log_sum_, K::offset, K::peak_, K::q_at, K::slope, K::spread, K::target_of, K::to_exp2, K::weight;
  using K::weight_at, K::with_entropy, K::write_absent, K::write_correct, K::write_entropy, K::write_loss;
  using typename K::A;
  using typename K::Coefficients;
  using typename K::Target;
  using typename K::V;

  // Classes per block. A block takes at most half the first-level cache, and has a sum of its own, so that
  // rounding errors stay small.
  static constexpr int64_t kBlock = 4096;
  static constexpr int64_t kAhead = 2048;  // bytes that a long row's gradient sweep fetches ahead: half a page

  // The exponentials of a row up to kMaxStash are kept for the gradient, each block's relative to the peak so far: in
  // the gradient's memory, or for a 16-bit type in scratch. Computing them twice costs more.
  static constexpr bool kWide = sizeof(T) == sizeof(A);
  static constexpr int kStashed = int(kMaxStash / kBlock);  // blocks
  A* const scratch;
  const bool stashes;

  RowKernel(const CrossEntropy& call, void* memory)
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
    V m[kSlots] = {set1(lowest), set1(lowest), set1(lowest), set1(lowest)};
    sweep<A>(begin, end, [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
      m[slot] = vmax(load_some(x + k, n, lowest), m[slot]);
    });
    return reduce_max<A>(max_of_slots(m));
  }

  // What the first sweep finds besides the sum of exponentials. The expectation is not divided by that sum.
  struct RowSums {
    A peak, expectation = 0;
    A block_peak[kStashed];
    Target target;
  };

  // Peak and sum of exponentials, block by block; with kDense also the target's sums over all classes, with kEntropy
  // the sum of e * (f - peak), with 0 * -inf = 0. Fetches ahead, since the hardware stops at the end of a page: the
  // next block or, in the last one, the gradient's memory, or without a gradient the next row.
  template <bool kDense, bool kEntropy>
  A row_sum(const T* x, const P* q, T* grad, const T* next_row, RowSums& sums) const {
    A& peak = sums.peak;
    A* const stash = stashes ? stash_of(grad) : nullptr;
    double sum = 0, q_sum = 0, q_distance = 0, e_distance = 0;
    peak = -A(__builtin_inf());
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      const bool last = begin + kBlock >= c.classes;
      const int64_t end = last ? c.classes : begin + kBlock;
      const bool fetch_grad = last && grad;
      const T* ahead = last ? next_row : x + begin + kBlock;
      const A top = cap1(block_max(x, begin, end));
      if (top > peak) {
        if (sum != 0) {
          const double scale = double(exp2<A>(set1(A((peak - top) * to_exp2)))[0]);
          if (kEntropy) e_distance = scale == 0 ? 0 : (e_distance + sum * (double(peak) - double(top))) * scale;
          sum *= scale;
        }
        if (q_sum != 0) q_distance += q_sum * (double(top) - double(peak));
        peak = top;
      }
      const A base = peak == -A(__builtin_inf()) ? A(0) : peak;  // only -inf so far: their exponentials are 0
      if (stash) sums.block_peak[begin / kBlock] = peak;         // -inf for such a block: its scale will be 0
      Chains<A> s, qs, qd, ed;
      sweep<A>(begin, end, [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
        if (fetch_grad)
          __builtin_prefetch(grad + (k - begin), 1, 3);
        else
          __builtin_prefetch(ahead + (k - begin), 0, 3);
        V distance = cap(load_some(x + k, n, A(0))) - base;
        V e = exp2<A>(distance * to_exp2);
        s.part[slot] += only<A>(e, n);
        if (stash) store_some(stash + k, n, e);
        if constexpr (kDense) {
          V q_k = q_at(q, k, n);
          qs.part[slot] += only<A>(q_k, n);
          qd.part[slot] -= only<A>(q_k * distance, n);
        }
        if constexpr (kEntropy) ed.part[slot] += only<A>(e == A(0) ? V{} : e * distance, n);
      });
      sum += double(s.sum());
      if constexpr (kDense) {
        q_sum += double(qs.sum());
        q_distance += double(qd.sum());
      }
      if constexpr (kEntropy) e_distance += double(ed.sum());
    }
    sums.expectation = A(e_distance);
    sums.target = {A(q_sum), A(q_distance)};
    return peak == -A(__builtin_inf()) ? A(__builtin_nan("")) : A(sum);
  }

  // What a gradient's sweep fetches: in a long row its next elements, since the hardware stops at the end of a page; in
  // a row of one block, whose gradient is in cache already, the next row.
  struct Ahead {
    const T* x;
    int64_t grad;
  };
  Ahead fetched_ahead(const T* x, const T* next_row) const {
    constexpr int64_t distance = kAhead / int64_t(sizeof(T));
    return c.classes > kBlock ? Ahead{x + distance, distance} : Ahead{next_row, 0};
  }

  // The gradient without the target's term of a class index. Unless kDense, q_c is `spread` for every class.
  template <bool kDense, bool kEntropy>
  void row_grad(const T* x, const P* q, T* grad, const T* next_row, A peak, Coefficients co) const {
    const V p = set1(co.p), g = set1(co.g), rest = set1(co.rest), constant = set1(spread);
    const V h = set1(co.h), mean = set1(co.mean);
    const Ahead ahead = fetched_ahead(x, next_row);
    sweep<A>(0, c.classes, [&](int64_t k, int, int n) __attribute__((always_inline)) {
      __builtin_prefetch(ahead.x + k, 0, 3);
      __builtin_prefetch(grad + k + ahead.grad, 1, 3);
      V f = cap(load_some(x + k, n, A(0))), distance = f - peak;
      V e = exp2<A>(distance * to_exp2);
      V d =
          join(e, kDense ? q_at(q, k, n) : constant, p, g, kEntropy ? with_entropy(e, distance, rest, h, mean) : rest);
      if constexpr (kCap) d *= slope(f);
      store_some(grad + k, n, d);
    });
  }

  // The same from the kept exponentials, where each block has a scale of its own.
  template <bool kDense>
  void row_grad_stashed(const T* x, const P* q, T* grad, const T* next_row, A peak, const A* block_peak,
                        Coefficients co) const {
    const V g = set1(co.g), constant = set1(spread);
    const Ahead ahead = fetched_ahead(x, next_row);
    const A* const stash = stash_of(grad);
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      const int64_t end = begin + kBlock < c.classes ? begin + kBlock : c.classes;
      const A scale = exp2<A>(set1(A((block_peak[begin / kBlock] - peak) * to_exp2)))[0];
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
    if (!counted(i)) {
      write_absent(i);
      if (grad)
        sweep<A>(0, c.classes,
                 [&](int64_t k, int, int n) __attribute__((always_inline)) { store_some(grad + k, n, V{}); });
      return;
    }

    const T* next = i + 1 == c.rows ? x : static_cast<const T*>(c.x.data) + offset(c.x, i + 1);
    A log_sum, inv_sum;
    RowSums sums;
    A& peak = sums.peak;
    Target& target = sums.target;
    if (c.normaliser_given) {
      peak = peak_[i], log_sum = log_sum_[i], inv_sum = exp2<A>(set1(A(log_sum * -A(kLog2E))))[0];
      if (dense) target.q = q ? q_total(q) : spread * A(c.weight_sum);
    } else {
      A sum;
      if (computes_entropy())
        sum = dense ? row_sum<true, true>(x, q, grad, next, sums) : row_sum<false, true>(x, q, grad, next, sums);
      else
        sum = dense ? row_sum<true, false>(x, q, grad, next, sums) : row_sum<false, false>(x, q, grad, next, sums);
      log_sum = log_from_one(set1(sum))[0], inv_sum = 1 / sum;
      if (peak_) peak_[i] = peak, log_sum_[i] = log_sum;
    }

    const int64_t y = target_of(i);
    A target_q = 0, target_x = 0;
    if (y >= 0) {
      target_x = load1(x + y);
      target_q = keep * weight_at(y);
      target.q += target_q;
      target.q_distance += target_q * (peak - cap1(target_x));
    }
    write_loss(i, peak, log_sum, target);
    write_entropy(i, log_sum, sums.expectation, inv_sum);
    if (c.correct) write_correct(i, x, q);
    if (!grad) return;

    const Coefficients co = coefficients(i, peak, log_sum, inv_sum, target.q);
    const bool per_class = q || (dense && weight);
    V target_grad{};  // computed before the sweep, which may overwrite x
    if (y >= 0) {
      const V f = cap(set1(target_x)), distance = f - peak;
      const V e = exp2<A>(distance * to_exp2);
      const V rest = set1(co.rest), q_y = set1(A(target_q + spread * weight_at(y)));
      target_grad = join(e, q_y, set1(co.p), set1(co.g),
                         c.grad_entropy.data ? with_entropy(e, distance, rest, set1(co.h), set1(co.mean)) : rest);
      if constexpr (kCap) target_grad *= slope(f);
    }
    if (stashes)
      per_class ? row_grad_stashed<true>(x, q, grad, next, peak, sums.block_peak, co)
                : row_grad_stashed<false>(x, q, grad, next, peak, sums.block_peak, co);
    else if (c.grad_entropy.data)
      per_class ? row_grad<true, true>(x, q, grad, next, peak, co) : row_grad<false, true>(x, q, grad, next, peak, co);
    else
      per_class ? row_grad<true, false>(x, q, grad, next, peak, co)
                : row_grad<false, false>(x, q, grad, next, peak, co);
    if (y >= 0) store1(grad + y, target_grad[0]);
  }

  // The sum of q_c.
  A q_total(const P* q) const {
    double total = 0;
    for (int64_t begin = 0; begin < c.classes; begin += kBlock) {
      const int64_t end = begin + kBlock < c.classes ? begin + kBlock : c.classes;
      Chains<A> s;
      sweep<A>(begin, end, [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
        s.part[slot] += only<A>(q_at(q, k, n), n);
      });
      total += double(s.sum());
    }
    return A(total);
  }
};

template <class T, class P, bool kCap>
void rows(const CrossEntropy& call, int64_t begin, int64_t end, void* scratch) {
  if (call.classes <= ShortRowKernel<T, P, kCap>::kWidth) return short_rows<T, P, kCap>(call, begin, end);
  const RowKernel<T, P, kCap> kernel(call, scratch);
  for (int64_t i = begin; i < end; ++i) kernel.row(i);
}

}  // namespace TLK_ISA
}  // namespace tlk
