// Cross entropy with classes that are not contiguous, like (N, C, H, W) in segmentation: positions are the vector
// lanes. A tile's logits, after the softcap, are in scratch as (classes, width): memory is read once, without a
// transposed copy.
#include "cpu_terms.inl"

namespace tlk {
namespace TLK_ISA {

template <class T, class P, bool kCap>
struct TileKernel : Terms<T, P, kCap> {
  using K = Terms<T, P, kCap>;
  using K::c, K::cap, K::cap1, K::coefficients, K::counted, K::dense, K::inner, K::join, K::keep, K::L, K::log_sum_;
  using K::offset, K::peak_, K::slope, K::spread, K::target_of, K::to_exp2, K::weight_at, K::with_entropy;
  using K::write_absent, K::write_correct, K::write_entropy, K::write_loss;
  using typename K::A;
  using typename K::Coefficients;
  using typename K::Target;
  using typename K::V;

  // Exponentials overwrite the logits in scratch, unless the gradient needs both.
  const bool stashes;

  explicit TileKernel(const CrossEntropy& call) : K(call), stashes(!kCap && call.grad.data && !call.normaliser_given) {}

  using Index = typename Simd<A>::Index;
  static TLK_INLINE typename Simd<A>::I load_indices(const Index* p) {
    typename Simd<A>::I v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }

  static constexpr int64_t kSumBlock = 8;  // classes per partial sum; each lane has one chain of additions

  // A sum with compensated rounding errors (Kahan 1965).
  struct Compensated {
    V total{}, error{};
    TLK_INLINE void add(V part) {
      const V term = part - error, sum = total + term;
      const V rounding = (sum - total) - term;
      error = rounding - rounding == A(0) ? rounding : V{};  // not of infinite sums
      total = sum;
    }
  };

  struct Tile {
    int64_t row;   // row of the first position
    int n, width;  // positions; positions that scratch has room for
    int vectors;   // of positions
    A* scratch;    // (classes, width)
    const T* x;
    const P* q;
    T* grad;
  };

  template <class E>
  static TLK_INLINE V load_positions(const E* p, int64_t stride, int n) {
    if (stride == 1) return load_some(p, n, A(0));
    V v{};
    for (int i = 0; i < n; ++i) v[i] = load1(p + i * stride);
    return v;
  }
  template <class E>
  static TLK_INLINE void store_positions(E* p, int64_t stride, int n, V v) {
    if (stride == 1) return store_some(p, n, v);
    for (int i = 0; i < n; ++i) store1(p + i * stride, v[i]);
  }
  static TLK_INLINE int count(const Tile& t, int v) { return t.n - v * L < L ? t.n - v * L : L; }

  // q_k at the positions of vector v, without the target's term of a class index.
  TLK_INLINE V tile_q(const Tile& t, int64_t k, int v) const {
    V q = set1(spread);
    if (t.q) {
      const int64_t stride = c.probabilities.stride[inner];
      q += keep * load_positions(t.q + k * c.probabilities.class_stride + v * L * stride, stride, count(t, v));
    }
    return q * weight_at(k);
  }

  // Classes that are fetched ahead; load_tile goes on with the next tile's. The classes of a tile are far apart, where
  // the hardware does not prefetch. With strides of a power of two they share few sets of a cache, which hold no more.
  static constexpr int64_t kAhead = 4;

  void load_tile(const Tile& t, A* peak) const {
    const int64_t stride = c.x.stride[inner];
    for (int v = 0; v < t.vectors; ++v) store(peak + v * L, set1(-A(__builtin_inf())));
    for (int64_t k = 0; k < c.classes; ++k) {
      const T* const x = t.x + k * c.x.class_stride;
      const T* const ahead = k + kAhead < c.classes
                                 ? x + kAhead * c.x.class_stride
                                 : t.x + (k + kAhead - c.classes) * c.x.class_stride + t.width * stride;
      for (int v = 0; v < t.vectors; ++v) {
        __builtin_prefetch(ahead + v * L * stride, 0, 3);
        V f = cap(load_positions(x + v * L * stride, stride, count(t, v)));
        store(t.scratch + k * t.width + v * L, f);
        store(peak + v * L, vmax(f, load(peak + v * L)));
      }
    }
  }

  void sum_tile(const Tile& t, const A* peak, A* sum, A* q_sum, A* q_distance, A* expectation) const {
    for (int v = 0; v < t.vectors; ++v) {
      const V top = load(peak + v * L);
      Compensated s, qs, qd, ex;
      for (int64_t begin = 0; begin < c.classes; begin += kSumBlock) {
        const int64_t end = begin + kSumBlock < c.classes ? begin + kSumBlock : c.classes;
        V bs{}, bqs{}, bqd{}, bex{};
        for (int64_t k = begin; k < end; ++k) {
          V distance = load(t.scratch + k * t.width + v * L) - top;
          V e = exp2<A>(distance * to_exp2);
          if (stashes) store(t.scratch + k * t.width + v * L, e);
          bs += e;
          if (dense) {
            V q = tile_q(t, k, v);
            bqs += q;
            bqd -= q * distance;
          }
          if (c.entropy) bex += e == A(0) ? V{} : e * distance;
        }
        s.add(bs);
        if (dense) qs.add(bqs), qd.add(bqd);
        if (c.entropy) ex.add(bex);
      }
      store(sum + v * L, s.total);
      store(q_sum + v * L, qs.total);
      store(q_distance + v * L, qd.total);
      store(expectation + v * L, ex.total);
    }
  }

  // Of each position: the coefficients of its gradient, and its target's class and term.
  struct Gradient {
    A p[kMaxTileWidth] = {}, g[kMaxTileWidth] = {}, rest[kMaxTileWidth] = {};
    A h[kMaxTileWidth] = {}, mean[kMaxTileWidth] = {}, target_q[kMaxTileWidth] = {};
    Index target[kMaxTileWidth];  // kNone, or kAbsent if the position does not take part
  };
  static constexpr Index kNone = -1, kAbsent = -2;

  void grad_tile(const Tile& t, const A* peak, const Gradient& gradient, bool any_absent) const {
    for (int64_t k = 0; k < c.classes; ++k)
      for (int v = 0; v < t.vectors; ++v) {
        A* logits = t.scratch + k * t.width + v * L;
        const V f = load(logits), distance = f - load(peak + v * L);
        const V e = stashes ? f : exp2<A>(distance * to_exp2);
        const auto target = load_indices(gradient.target + v * L);
        V q = dense ? tile_q(t, k, v) : V{};
        q += target == Index(k) ? load(gradient.target_q + v * L) : V{};
        V rest = load(gradient.rest + v * L);
        if (c.grad_entropy.data)
          rest = with_entropy(e, distance, rest, load(gradient.h + v * L), load(gradient.mean + v * L));
        V d = join(e, q, load(gradient.p + v * L), load(gradient.g + v * L), rest);
        if constexpr (kCap) d *= slope(f);
        if (any_absent) d = target == kAbsent ? V{} : d;  // also with NaN logits
        store(logits, d);
      }
    const int64_t stride = c.grad.stride[inner];
    for (int64_t k = 0; k < c.classes; ++k) {
      T* const grad = t.grad + k * c.grad.class_stride;
      for (int v = 0; v < t.vectors; ++v) {
        __builtin_prefetch(grad + kAhead * c.grad.class_stride + v * L * stride, 1, 3);
        store_positions(grad + v * L * stride, stride, count(t, v), load(t.scratch + k * t.width + v * L));
      }
    }
  }

  void tile(const Tile& t) const {
    A peak[kMaxTileWidth], sum[kMaxTileWidth], q_sum[kMaxTileWidth], q_distance[kMaxTileWidth], ex[kMaxTileWidth];
    Gradient gradient;
    for (int i = 0; i < t.vectors * L; ++i) gradient.target[i] = kNone;
    load_tile(t, peak);
    if (c.normaliser_given) {
      for (int i = 0; i < t.n; ++i) peak[i] = peak_[t.row + i], q_sum[i] = spread * A(c.weight_sum);
      if (t.q)
        for (int v = 0; v < t.vectors; ++v) {
          Compensated q;
          for (int64_t k = 0; k < c.classes; ++k) q.add(tile_q(t, k, v));
          store(q_sum + v * L, q.total);
        }
    } else {
      sum_tile(t, peak, sum, q_sum, q_distance, ex);
    }

    A inverse[kMaxTileWidth];
    for (int v = 0; v < t.vectors; ++v) {  // `sum` becomes log_sum
      V log_sum{};
      if (c.normaliser_given) {
        log_sum = load_some(log_sum_ + t.row + v * L, count(t, v), A(0));
        store(inverse + v * L, exp2<A>(log_sum * -A(kLog2E)));
      } else {
        log_sum = log_from_one(load(sum + v * L));
        store(inverse + v * L, A(1) / load(sum + v * L));
      }
      store(sum + v * L, log_sum);
    }

    bool any_absent = false;
    for (int i = 0; i < t.n; ++i) {
      const int64_t row = t.row + i, y = target_of(row);
      if (!counted(row)) {
        write_absent(row);
        gradient.target[i] = kAbsent;
        any_absent = true;
        continue;
      }
      if (peak_ && !c.normaliser_given) peak_[row] = peak[i], log_sum_[row] = sum[i];
      Target target;
      if (dense) target = {q_sum[i], c.normaliser_given ? A(0) : q_distance[i]};
      if (y >= 0) {
        const A f = cap1(load1(t.x + y * c.x.class_stride + i * c.x.stride[inner]));
        gradient.target[i] = Index(y);
        gradient.target_q[i] = keep * weight_at(y);
        target.q += gradient.target_q[i];
        target.q_distance += gradient.target_q[i] * (peak[i] - f);
      }
      write_loss(row, peak[i], sum[i], target);
      write_entropy(row, sum[i], ex[i], inverse[i]);
      if (c.correct)
        write_correct(row, t.x + i * c.x.stride[inner], t.q ? t.q + i * c.probabilities.stride[inner] : t.q);
      if (!t.grad) continue;
      const Coefficients co = coefficients(row, peak[i], sum[i], inverse[i], target.q);
      gradient.p[i] = co.p, gradient.g[i] = co.g, gradient.rest[i] = co.rest;
      gradient.h[i] = co.h, gradient.mean[i] = co.mean;
    }
    if (t.grad) grad_tile(t, peak, gradient, any_absent);
  }
};

template <class T, class P, bool kCap>
void tiles(const CrossEntropy& call, int64_t begin, int64_t end, int width, void* scratch) {
  using K = TileKernel<T, P, kCap>;
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

}  // namespace TLK_ISA
}  // namespace tlk
