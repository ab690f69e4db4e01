// Cross entropy with classes that are not contiguous, like (N, C, H, W) in segmentation: positions are the vector
// lanes. A tile's logits, after the softcap, are in scratch as (classes, width): memory is read once, without a
// transposed copy.
#include "cpu_terms.inl"

namespace tlk {
namespace TLK_ISA {

template <class T, class P, bool kCap>
struct TileKernel : Terms<T, P, kCap> {
  using K = Terms<T, P, kCap>;
  using K::c, K::cap, K::cap1, K::coefficients, K::dense, K::ignored, K::inner, K::join, K::keep, K::L, K::log_sum_;
  using K::offset, K::peak_, K::per_position, K::slope, K::spread, K::to_exp2, K::to_z, K::weight_at;
  using K::write_correct, K::write_loss;
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

  // The positions of vector v whose coefficients are all 0: they are ignored, and their lse has no gradient. The `p` of
  // a position that counts and has a NaN logit is NaN.
  static TLK_INLINE typename Simd<A>::I absent(const A* p, const A* g, const A* rest, int v) {
    return (load(p + v * L) == A(0)) & (load(g + v * L) == A(0)) & (load(rest + v * L) == A(0));
  }

  // target_class: the class index of each position, -1 if ignored or without one; target_q: the target's term.
  void grad_tile(const Tile& t, const A* peak, const A* p, const A* g, const A* rest, const Index* target_class,
                 const A* target_q, bool any_ignored) const {
    for (int64_t k = 0; k < c.classes; ++k)
      for (int v = 0; v < t.vectors; ++v) {
        A* logits = t.scratch + k * t.width + v * L;
        const V f = load(logits);
        const V e = stashes ? f : exp2<A>((f - load(peak + v * L)) * to_exp2);
        V q = dense ? tile_q(t, k, v) : V{};
        q += load_indices(target_class + v * L) == Index(k) ? load(target_q + v * L) : V{};
        V d = join(e, q, load(p + v * L), load(g + v * L), load(rest + v * L));
        if constexpr (kCap) d *= slope(f);
        if (any_ignored) d = absent(p, g, rest, v) ? V{} : d;  // also with NaN logits
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
    A p[kMaxTileWidth] = {}, g[kMaxTileWidth] = {}, rest[kMaxTileWidth] = {}, target_q[kMaxTileWidth] = {};
    Index target_class[kMaxTileWidth];
    for (int i = 0; i < t.vectors * L; ++i) target_class[i] = -1;
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

    for (int v = 0; v < t.vectors; ++v) {  // `sum` becomes log_sum; `ex`, after the entropy, the sum's inverse
      V log_sum{}, inverse{};
      const int n = count(t, v);
      if (c.normaliser_given) {
        log_sum = load_some(log_sum_ + t.row + v * L, n, A(0));
        inverse = exp2<A>(log_sum * -A(kLog2E));
      } else {
        const V s = load(sum + v * L);
        log_sum = log_from_one(s), inverse = A(1) / s;
        if (c.entropy)
          store_some(static_cast<A*>(c.entropy) + t.row + v * L, n, log_sum - load(ex + v * L) * to_z * inverse);
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
      if (c.indices && counted) {
        const A f = cap1(load1(t.x + c.indices[row] * c.x.class_stride + i * c.x.stride[inner]));
        target_class[i] = Index(c.indices[row]);
        target_q[i] = keep * weight_at(c.indices[row]);
        target.q += target_q[i];
        target.q_distance += target_q[i] * (peak[i] - f);
      }
      write_loss(row, counted, peak[i], sum[i], target);
      if (c.correct)
        write_correct(row, t.x + i * c.x.stride[inner], t.q ? t.q + i * c.probabilities.stride[inner] : t.q);
      if (t.grad && (counted || per_position(c.grad_lse, row) != 0)) {
        const Coefficients co = coefficients(row, counted, peak[i], sum[i], ex[i], target.q);
        p[i] = co.p, g[i] = co.g, rest[i] = co.rest;
      }
    }
    if (t.grad) grad_tile(t, peak, p, g, rest, target_class, target_q, any_ignored);
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
