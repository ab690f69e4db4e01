// InfoNCE's kernels on a tile of similarities, compiled once for each instruction set (see isa.cpp). Logits are
// scale * similarity.
#include "kernel.h"

#include "../core/cpu/exponential.h"
#include "../core/cpu/sweep.h"

extern "C" double exp(double) noexcept;

namespace tlk {
namespace TLK_ISA {

template <class A, Set kSet>
struct SimilarityKernel {
  using V = Vec<A>;
  using I = typename Simd<A>::I;
  using Index = typename Simd<A>::Index;
  static constexpr int L = lanes<A>;
  static constexpr A kOut = A(-1e38);  // in the tile: an entry that is left out. Its logit is -inf at any scale.

  const InfoNce& p;
  const Tile& t;
  const A scale;

  SimilarityKernel(const InfoNce& call, const Tile& tile) : p(call), t(tile), scale(A(call.scale)) {}

  A* row(int64_t r) const { return static_cast<A*>(t.c) + r * t.stride; }
  TLK_INLINE V logit(V x) const { return x == kOut ? set1(A(-__builtin_inf())) : x * scale; }
  // exp(logit - peak). The logit is rounded first, as fused x * scale - peak would differ between kernels.
  template <class P>
  TLK_INLINE V relative(V x, P peak) const {
    return exponential<A>(logit(x) - peak);
  }

  static TLK_INLINE I load_ids(const void* ids, int64_t index, int n) {
    const Index* first = static_cast<const Index*>(ids) + index;
    I v{};
    if (n == L)
      __builtin_memcpy(&v, first, sizeof v);
    else
      for (int i = 0; i < n; ++i) v[i] = first[i];
    return v;
  }

  // Which of the n entries x of row r, from the tile's column k on, are in the set.
  TLK_INLINE I in_set(V x, int64_t r, int64_t k, int n) const {
    I in = x != kOut;
    if constexpr (kSet == Set::label)
      in &= load_ids(p.column_ids, t.column + k, n) == static_cast<const Index*>(p.row_ids)[t.row + r];
    return in;
  }

  // The tile's column of the row's positive, or -1.
  int64_t positive(int64_t r) const {
    const int64_t k = p.target ? p.target[t.row + r] - t.column : -1;
    return k < t.columns ? k : -1;
  }

  // Sets entries of a row that are left out, and the positive, to kOut.
  void mark(int64_t r) const {
    A* c = row(r);
    const int64_t i = t.row + r, k = positive(r);
    if (k >= 0) {
      if (p.reads_positive) {
        p.rows.positive[i] = c[k];
        if (t.both) p.columns.positive[t.column + k] = c[k];
      }
      c[k] = kOut;
    }
    if (p.mask && (t.keys || p.mask_has_negatives)) {
      const bool* mask = p.mask + i * p.mask_stride + t.column;
      for (int64_t j = 0; j < t.columns; ++j) c[j] = mask[j] ? kOut : c[j];
    }
    if (!t.keys) return;
    const int64_t column = i + p.self_column - t.column;
    if (p.self_column >= 0 && column >= 0 && column < t.columns) c[column] = kOut;
    if (kSet != Set::label && p.row_ids) {
      const Index id = static_cast<const Index*>(p.row_ids)[i];
      const Index* ids = static_cast<const Index*>(p.column_ids) + t.column;
      for (int64_t j = 0; j < t.columns; ++j) c[j] = ids[j] == id ? kOut : c[j];
    }
  }

  // Raises the peak of row or column i to `peak` if that is larger. Returns the peak, or 0 if it is -inf.
  static A raise(const Direction& d, int64_t i, A peak) {
    if (double(peak) > d.peak[i]) {
      const double factor = ::exp(d.peak[i] - double(peak));
      d.sum[i] *= factor;
      d.moment[i] *= factor;
      d.peak[i] = double(peak);
    }
    return d.peak[i] == -__builtin_inf() ? A(0) : A(d.peak[i]);
  }

  void row_statistics(int64_t begin, int64_t end) const {
    for (int64_t r = begin; r < end; ++r) {
      mark(r);
      const A* c = row(r);
      V top[kSlots];
      for (V& v : top) v = set1(A(-__builtin_inf()));
      sweep<A>(0, t.columns, [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
        top[slot] = vmax(top[slot], logit(load_some(c + k, n, kOut)));
      });
      const A peak = raise(p.rows, t.row + r, reduce_max<A>(max_of_slots(top)));
      Chains<A> sum, moment, set_sum, set_count;
      sweep<A>(0, t.columns, [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
        const V x = load_some(c + k, n, kOut);
        const V e = relative(x, peak);
        sum.part[slot] += e;
        moment.part[slot] += e * x;
        if constexpr (kSet != Set::none) {
          const I in = in_set(x, r, k, n);
          set_sum.part[slot] += in ? x : V{};
          set_count.part[slot] += in ? set1(A(1)) : V{};
        }
      });
      add(p.rows, t.row + r, sum.sum(), moment.sum(), set_sum.sum(), set_count.sum());
    }
  }

  static void add(const Direction& d, int64_t i, A sum, A moment, A set_sum, A set_count) {
    d.sum[i] += double(sum);
    d.moment[i] += double(moment);
    if constexpr (kSet != Set::none) {
      d.set_sum[i] += double(set_sum);
      d.set_count[i] += double(set_count);
    }
  }

  // One vector of columns at a time.
  void column_statistics(int64_t begin, int64_t end) const {
    for (int64_t k = begin; k < end; k += L) {
      const int n = end - k < L ? int(end - k) : L;
      V top[kSlots];
      for (V& v : top) v = set1(A(-__builtin_inf()));
      each_row([&](int64_t r, int slot) __attribute__((always_inline)) {
        top[slot] = vmax(top[slot], logit(load_some(row(r) + k, n, kOut)));
      });
      V peak = max_of_slots(top);
      for (int j = 0; j < n; ++j) peak[j] = raise(p.columns, t.column + k + j, peak[j]);
      Chains<A> sum, moment, set_sum, set_count;
      each_row([&](int64_t r, int slot) __attribute__((always_inline)) {
        const V x = load_some(row(r) + k, n, kOut);
        const V e = relative(x, peak);
        sum.part[slot] += e;
        moment.part[slot] += e * x;
        if constexpr (kSet != Set::none) {
          const I in = in_set(x, r, k, n);
          set_sum.part[slot] += in ? x : V{};
          set_count.part[slot] += in ? set1(A(1)) : V{};
        }
      });
      const V sums = by_lane(sum), moments = by_lane(moment), set_sums = by_lane(set_sum),
              set_counts = by_lane(set_count);
      for (int j = 0; j < n; ++j) add(p.columns, t.column + k + j, sums[j], moments[j], set_sums[j], set_counts[j]);
    }
  }

  // The sum in each lane.
  static TLK_INLINE V by_lane(const Chains<A>& c) { return (c.part[0] + c.part[1]) + (c.part[2] + c.part[3]); }

  // Calls body(row, slot) for every row of the tile.
  template <class Body>
  TLK_INLINE void each_row(Body body) const {
    int64_t r = 0;
    for (; r + kSlots <= t.rows; r += kSlots) {
      body(r, 0);
      body(r + 1, 1);
      body(r + 2, 2);
      body(r + 3, 3);
    }
    for (; r < t.rows; ++r) body(r, 0);
  }

  // kBoth: columns have a loss too.
  template <bool kBoth>
  void gradient(int64_t begin, int64_t end) const {
    const Slope &by_row = p.row_slope, &by_column = p.column_slope;
    auto number = [](const void* values, int64_t i) { return static_cast<const A*>(values)[i]; };
    auto vector = [](const void* values, int64_t j, int n)
                      __attribute__((always_inline)) { return load_some(static_cast<const A*>(values) + j, n, A(0)); };
    for (int64_t r = begin; r < end; ++r) {
      mark(r);
      A* c = row(r);
      const int64_t i = t.row + r;
      const A top = number(by_row.top, i), factor = number(by_row.factor, i), share = number(by_row.share, i);
      sweep<A>(0, t.columns, [&](int64_t k, int, int n) __attribute__((always_inline)) {
        const V x = load_some(c + k, n, kOut);
        V d = relative(x, top) * factor;
        V shares = set1(share);
        if constexpr (kBoth) {
          d += relative(x, vector(by_column.top, t.column + k, n)) * vector(by_column.factor, t.column + k, n);
          if constexpr (kSet != Set::none) shares += vector(by_column.share, t.column + k, n);
        }
        if constexpr (kSet != Set::none) d -= in_set(x, r, k, n) ? shares : V{};
        store_some(c + k, n, x == kOut ? V{} : d);
      });
      if (const int64_t k = positive(r); k >= 0)
        c[k] = number(by_row.positive, i) + (kBoth ? number(by_column.positive, t.column + k) : A(0));
    }
  }
};

template <class A, Set kSet>
void row_statistics(const InfoNce& call, const Tile& tile, int64_t begin, int64_t end) {
  SimilarityKernel<A, kSet>(call, tile).row_statistics(begin, end);
}
template <class A, Set kSet>
void column_statistics(const InfoNce& call, const Tile& tile, int64_t begin, int64_t end) {
  SimilarityKernel<A, kSet>(call, tile).column_statistics(begin, end);
}
template <class A, Set kSet>
void gradient(const InfoNce& call, const Tile& tile, int64_t begin, int64_t end) {
  const SimilarityKernel<A, kSet> kernel(call, tile);
  tile.both ? kernel.template gradient<true>(begin, end) : kernel.template gradient<false>(begin, end);
}

// The sum of x * y, in double: the error of a row's norm would be common to all of the row's similarities.
template <class T>
double product_in_double(const T* x, const T* y, int64_t size) {
  using A = typename Compute<T>::type;
  constexpr int L = lanes<A>;
  double part[L] = {};
  sweep<A>(0, size, [&](int64_t k, int, int n) __attribute__((always_inline)) {
    const Vec<A> a = load_some(x + k, n, A(0)), b = load_some(y + k, n, A(0));
    for (int i = 0; i < L; ++i) part[i] += double(a[i]) * double(b[i]);
  });
  double sum = 0;
  for (double lane : part) sum += lane;
  return sum;
}

template <class T>
void normalize(const void* x, void* u, double* norm, int64_t size, int64_t begin, int64_t end) {
  using A = typename Compute<T>::type;
  for (int64_t i = begin; i < end; ++i) {
    const T* row = static_cast<const T*>(x) + i * size;
    A* unit = static_cast<A*>(u) + i * size;
    norm[i] = __builtin_sqrt(product_in_double(row, row, size));
    const double inverse = 1 / (norm[i] < kLeastNorm ? kLeastNorm : norm[i]);
    sweep<A>(0, size, [&](int64_t k, int, int n) __attribute__((always_inline)) {
      Vec<A> v = load_some(row + k, n, A(0));
      for (int j = 0; j < lanes<A>; ++j) v[j] = A(double(v[j]) * inverse);
      store_some(unit + k, n, v);
    });
  }
}

template <class A>
void normalize_backward(void* grad, const void* u, const double* norm, int64_t size, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    A* g = static_cast<A*>(grad) + i * size;
    const A* unit = static_cast<const A*>(u) + i * size;
    const bool constant = norm[i] < kLeastNorm;  // the divisor does not depend on x
    const double radial = constant ? 0 : product_in_double(g, unit, size);
    const double inverse = 1 / (constant ? kLeastNorm : norm[i]);
    sweep<A>(0, size, [&](int64_t k, int, int n) __attribute__((always_inline)) {
      Vec<A> v = load_some(g + k, n, A(0));
      const Vec<A> direction = load_some(unit + k, n, A(0));
      for (int j = 0; j < lanes<A>; ++j) v[j] = A((double(v[j]) - double(direction[j]) * radial) * inverse);
      store_some(g + k, n, v);
    });
  }
}

template <class T, Set kSet>
InfoNceKernels select() {
  using A = typename Compute<T>::type;
  return {row_statistics<A, kSet>, column_statistics<A, kSet>, gradient<A, kSet>, normalize<T>, normalize_backward<A>};
}
template <class T>
InfoNceKernels select(Set set) {
  return set == Set::none ? select<T, Set::none>() : set == Set::all ? select<T, Set::all>() : select<T, Set::label>();
}

InfoNceKernels info_nce(Scalar features, Set set) {
  switch (features) {
    case Scalar::f64:
      return select<double>(set);
    case Scalar::f32:
      return select<float>(set);
    case Scalar::bf16:
      return select<bf16>(set);
    default:
      return select<f16>(set);
  }
}

}  // namespace TLK_ISA
}  // namespace tlk
