// Cross entropy where the class axis is not contiguous (segmentation: (N, C, H, W)): positions are the vector lanes. A
// tile's logits, capped, lie in scratch as classes x width, so that memory is read once and no transposed copy is made.
#include "cpu_terms.inl"

namespace tlk {
namespace TLK_ISA {

template <class T, class P, bool kCap>
struct Tiles : CallOf<T, P, kCap> {
  using K = CallOf<T, P, kCap>;
  using K::c, K::cap, K::coefficients, K::dense, K::ignored, K::inner, K::join, K::keep, K::kLog2E, K::L;
  using K::cap1, K::weight_at, K::write_correct, K::write_loss;
  using K::log_sum_, K::offset, K::peak_, K::per_position, K::slope, K::spread, K::to_exp2, K::to_z, K::weight;
  using typename K::A;
  using typename K::Coefficients;
  using typename K::Target;
  using typename K::V;

  // The exponentials take the place of the logits in scratch, unless the gradient needs both.
  const bool stashes;

  explicit Tiles(const CrossEntropy& call) : K(call), stashes(!kCap && call.grad.data && !call.normaliser_given) {}

  using Index = typename Simd<A>::Index;
  static TLK_INLINE typename Simd<A>::I load_indices(const Index* p) {
    typename Simd<A>::I v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }

  static constexpr int64_t kSumBlock = 8;  // classes per partial sum: one chain of additions to a lane

  // A sum of many parts that loses next to nothing (Kahan 1965).
  struct Compensated {
    V total{}, lost{};
    TLK_INLINE void add(V part) {
      const V y = part - lost, t = total + y;
      const V less = (t - total) - y;
      lost = less - less == A(0) ? less : V{};  // beside an infinity nothing is lost
      total = t;
    }
  };

  struct Tile {
    int64_t row;   // of the first position
    int n, width;  // positions; those that scratch has room for
    int vectors;   // that hold the positions
    A* scratch;
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

  // q_c at the positions of vector v
  TLK_INLINE V tile_q(const Tile& t, int64_t k, int v) const {
    V at = set1(spread);
    if (t.q) {
      const int64_t stride = c.probabilities.stride[inner];
      at += keep * load_positions(t.q + k * c.probabilities.class_stride + v * L * stride, stride, count(t, v));
    }
    return at * weight_at(k);
  }

  // The lines of a tile lie far apart, where the hardware fetches nothing ahead, and strides of a power of two put them
  // into few sets of a cache: so many classes are fetched ahead, and no more, in the load from the next tile too.
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
            V at = tile_q(t, k, v);
            bqs += at;
            bqd -= at * distance;
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

  // Positions of vector v whose coefficients are all 0: they are ignored and their lse gets no gradient. A position
  // that counts and has a NaN logit is none of them, since its `p` is NaN.
  static TLK_INLINE typename Simd<A>::I absent(const A* p, const A* g, const A* rest, int v) {
    return (load(p + v * L) == A(0)) & (load(g + v * L) == A(0)) & (load(rest + v * L) == A(0));
  }

  // `own_y` is the class index of a position that counts and has one, else -1; `own_q` that class's own term.
  void grad_tile(const Tile& t, const A* peak, const A* p, const A* g, const A* rest, const Index* own_y,
                 const A* own_q, bool any_ignored) const {
    for (int64_t k = 0; k < c.classes; ++k)
      for (int v = 0; v < t.vectors; ++v) {
        A* at = t.scratch + k * t.width + v * L;
        const V f = load(at);
        const V e = stashes ? f : exp2<A>((f - load(peak + v * L)) * to_exp2);
        V q = dense ? tile_q(t, k, v) : V{};
        q += load_indices(own_y + v * L) == Index(k) ? load(own_q + v * L) : V{};
        V d = join(e, q, load(p + v * L), load(g + v * L), load(rest + v * L));
        if constexpr (kCap) d *= slope(f);
        if (any_ignored) d = absent(p, g, rest, v) ? V{} : d;  // even of NaN logits
        store(at, d);
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
    A p[kMaxTileWidth] = {}, g[kMaxTileWidth] = {}, rest[kMaxTileWidth] = {}, own_q[kMaxTileWidth] = {};
    Index own_y[kMaxTileWidth];
    for (int i = 0; i < t.vectors * L; ++i) own_y[i] = -1;
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
        own_y[i] = Index(c.indices[row]);
        own_q[i] = keep * weight_at(c.indices[row]);
        target.q += own_q[i];
        target.q_distance += own_q[i] * (peak[i] - f);
      }
      write_loss(row, counted, peak[i], sum[i], target);
      if (c.correct)
        write_correct(row, t.x + i * c.x.stride[inner], t.q ? t.q + i * c.probabilities.stride[inner] : t.q);
      if (t.grad && (counted || per_position(c.grad_lse, row) != 0)) {
        const Coefficients co = coefficients(row, counted, peak[i], sum[i], ex[i], target.q);
        p[i] = co.p, g[i] = co.g, rest[i] = co.rest;
      }
    }
    if (t.grad) grad_tile(t, peak, p, g, rest, own_y, own_q, any_ignored);
  }
};

template <class T, class P, bool kCap>
void tiles(const CrossEntropy& call, int64_t begin, int64_t end, int width, void* scratch) {
  using K = Tiles<T, P, kCap>;
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
