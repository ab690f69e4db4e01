// Cross entropy of short rows, with contiguous classes that fill a few vectors. A batch of rows takes each step
// together, so that one vector has the logarithms and divisions of all its rows. Row by row, the processor would wait
// for the logarithm and the division between a row's sum and its gradient.
#include "cpu_terms.inl"

namespace tlk {
namespace TLK_ISA {

template <class T, class P, bool kCap>
struct ShortRowKernel : Terms<T, P, kCap> {
  using K = Terms<T, P, kCap>;
  using K::c, K::cap, K::cap1, K::coefficients, K::computes_entropy, K::counted, K::dense, K::join, K::keep, K::L;
  using K::log_sum_, K::offset, K::peak_, K::q_at, K::slope, K::spread, K::target_of, K::to_exp2, K::weight;
  using K::weight_at, K::with_entropy, K::write_absent, K::write_correct, K::write_entropy, K::write_loss;
  using typename K::A;
  using typename K::Coefficients;
  using typename K::Target;
  using typename K::V;

  static constexpr int kVectors = 4;           // of the longest row
  static constexpr int kWidth = kVectors * L;  // classes of the longest row
  static constexpr int kBatch = L;             // rows

  explicit ShortRowKernel(const CrossEntropy& call) : K(call) {}

  struct Batch {
    int64_t first;  // the first row
    int rows;
    bool absent[kBatch];  // rows that do not take part
    A e[kBatch][kWidth], f[kCap ? kBatch : 1][kWidth];
    A peak[kBatch], sum[kBatch], log_sum[kBatch], inverse[kBatch];
    Target target[kBatch];
  };

  const T* x_at(int64_t row) const { return static_cast<const T*>(c.x.data) + offset(c.x, row); }
  const P* q_at_row(int64_t row) const {
    return c.indices ? nullptr : static_cast<const P*>(c.probabilities.data) + offset(c.probabilities, row);
  }

  // Calls body(first class, number of classes) for each vector of a row; the last may have fewer than L classes.
  template <class Body>
  TLK_INLINE void each(Body body) const {
    const int classes = int(c.classes);
    int k = 0;
    for (; k + L <= classes; k += L) body(k, L);
    if (k < classes) body(k, classes - k);
  }

  // Peak, exponentials and sums of a row.
  template <bool kDense>
  TLK_INLINE void exponentials(Batch& b, int r) const {
    const int64_t row = b.first + r;
    const A lowest = -A(__builtin_inf());
    const T* x = x_at(row);
    const P* q = q_at_row(row);
    A peak;
    if (c.normaliser_given) {
      peak = peak_[row];
    } else {
      V m = set1(lowest);
      each([&](int k, int n) __attribute__((always_inline)) { m = vmax(load_some(x + k, n, lowest), m); });
      peak = cap1(reduce_max<A>(m));
    }
    V s{}, qs{}, qd{};
    each([&](int k, int n) __attribute__((always_inline)) {
      const V f = cap(load_some(x + k, n, A(0))), distance = f - peak;
      const V e = only<A>(exp2<A>(distance * to_exp2), n);
      s += e;
      store(b.e[r] + k, e);
      if constexpr (kCap) store(b.f[r] + k, f);
      if constexpr (kDense) {
        const V q_k = q_at(q, k, n);
        qs += only<A>(q_k, n);
        qd -= only<A>(q_k * distance, n);
      }
    });
    b.peak[r] = peak;
    b.sum[r] = reduce_sum<A>(s);
    if constexpr (kDense) b.target[r] = {reduce_sum<A>(qs), reduce_sum<A>(qd)};
  }

  // The sum of e * (f - peak), with 0 * -inf = 0.
  A expectation(const Batch& b, int r) const {
    const T* x = x_at(b.first + r);
    V sum{};
    each([&](int k, int n) __attribute__((always_inline)) {
      const V e = load(b.e[r] + k);
      sum += e == A(0) ? V{} : e * (cap(load_some(x + k, n, A(0))) - b.peak[r]);
    });
    return reduce_sum<A>(sum);
  }

  // Writes a row's loss and statistics; returns the coefficients of its gradient and the target's term.
  Coefficients finish(Batch& b, int r, A& target_q) const {
    const int64_t row = b.first + r;
    if (peak_ && !c.normaliser_given) peak_[row] = b.peak[r], log_sum_[row] = b.log_sum[r];
    Target& target = b.target[r];
    target_q = 0;
    const int64_t y = target_of(row);
    if (y >= 0) {
      target_q = keep * weight_at(y);
      target.q += target_q;
      target.q_distance += target_q * (b.peak[r] - cap1(load1(x_at(row) + y)));
    }
    write_loss(row, b.peak[r], b.log_sum[r], target);
    if (computes_entropy()) write_entropy(row, b.log_sum[r], expectation(b, r), b.inverse[r]);
    if (c.correct) write_correct(row, x_at(row), q_at_row(row));
    return coefficients(row, b.peak[r], b.log_sum[r], b.inverse[r], target.q);
  }

  template <bool kDense, bool kEntropy>
  void gradient(const Batch& b, int r, Coefficients co, A target_q) const {
    const int64_t row = b.first + r, y = target_of(row);
    const T* x = x_at(row);
    const P* q = q_at_row(row);
    T* grad = static_cast<T*>(c.grad.data) + offset(c.grad, row);
    const V p = set1(co.p), g = set1(co.g), rest = set1(co.rest), constant = set1(spread);
    const V h = set1(co.h), mean = set1(co.mean);
    const V target_x = kEntropy && y >= 0 ? set1(load1(x + y)) : V{};  // before the sweep, which may overwrite it
    const auto rest_of = [&](V e, V logits) __attribute__((always_inline)) {
      return kEntropy ? with_entropy(e, cap(logits) - b.peak[r], rest, h, mean) : rest;
    };
    each([&](int k, int n) __attribute__((always_inline)) {
      const V e = load(b.e[r] + k);
      V d = join(e, kDense ? q_at(q, k, n) : constant, p, g, rest_of(e, kEntropy ? load_some(x + k, n, A(0)) : V{}));
      if constexpr (kCap) d *= slope(load(b.f[r] + k));
      store_some(grad + k, n, d);
    });
    if (y < 0) return;
    const V e = set1(b.e[r][y]);
    V target_grad = join(e, set1(A(target_q + spread * weight_at(y))), p, g, rest_of(e, target_x));
    if constexpr (kCap) target_grad *= slope(set1(b.f[r][y]));
    store1(grad + y, target_grad[0]);
  }

  void leave_out(const Batch& b, int r) const {
    const int64_t row = b.first + r;
    write_absent(row);
    if (!c.grad.data) return;
    T* grad = static_cast<T*>(c.grad.data) + offset(c.grad, row);
    each([&](int k, int n) __attribute__((always_inline)) { store_some(grad + k, n, V{}); });
  }

  void batch(Batch& b) const {
    for (int r = 0; r < b.rows; ++r) {
      b.absent[r] = !counted(b.first + r);
      b.target[r] = {};
      if (!b.absent[r]) dense ? exponentials<true>(b, r) : exponentials<false>(b, r);
    }
    V log_sum, inverse;
    if (c.normaliser_given) {
      log_sum = load_some(log_sum_ + b.first, b.rows, A(0));
      inverse = exp2<A>(log_sum * -A(kLog2E));
    } else {
      const V sum = load(b.sum);
      log_sum = log_from_one(sum), inverse = A(1) / sum;
    }
    store(b.log_sum, log_sum);
    store(b.inverse, inverse);
    const bool per_class = !c.indices || (dense && weight);
    for (int r = 0; r < b.rows; ++r) {
      if (b.absent[r]) {
        leave_out(b, r);
        continue;
      }
      A target_q;
      const Coefficients co = finish(b, r, target_q);
      if (!c.grad.data) continue;
      if (c.grad_entropy.data)
        per_class ? gradient<true, true>(b, r, co, target_q) : gradient<false, true>(b, r, co, target_q);
      else
        per_class ? gradient<true, false>(b, r, co, target_q) : gradient<false, false>(b, r, co, target_q);
    }
  }
};

template <class T, class P, bool kCap>
void short_rows(const CrossEntropy& call, int64_t begin, int64_t end) {
  using K = ShortRowKernel<T, P, kCap>;
  const K kernel(call);
  typename K::Batch b;
  for (int64_t i = begin; i < end; i += K::kBatch) {
    b.first = i;
    b.rows = int(end - i < K::kBatch ? end - i : K::kBatch);
    kernel.batch(b);
  }
}

}  // namespace TLK_ISA
}  // namespace tlk
