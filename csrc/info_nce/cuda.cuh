// InfoNCE's kernels on tiles of similarities, for one part of the columns and some rows; nt_xent and sup_con are calls
// of them too. Two sweeps: statistics of rows and columns, then gradients by the similarities. Logits are in base 2.
//
// A tile's statistics go to a place of their own, and `fold` (info_nce_rows.cuh) joins them in a fixed order: no
// atomics.
#pragma once
#include "kernel.h"
#include "../core/cuda/similarity.cuh"

namespace tlk::contrastive {

// Which entries of the part take part, beside the positive. Pointers may be null.
struct Entries {
  Set set = Set::none;
  const int64_t* target =
      nullptr;                 // the positive's column of the matrix; null: row i has column i. Not with Set::label
  int first_column = 0;        // of the matrix, where the part begins
  int own = -1;                // the column that is row 0 itself, which takes no part, and so on; -1: none
  const bool* mask = nullptr;  // of rows and columns: entries that take no part
  int64_t mask_row = 0, mask_column = 0;                    // strides
  const int64_t *row_ids = nullptr, *column_ids = nullptr;  // equal ids: in the label's set, or they take no part
};

// Where statistics of tiles go: peak, sum and moment of each row of a tile, then with a set its sum and its count.
struct TileParts {
  void* by_row = nullptr;     // (tiles of all parts, kinds, row_items), from `first_tile` on
  void* by_column = nullptr;  // (tiles of rows, kinds, column_items); null: not wanted
  int64_t row_items = 0, column_items = 0;
  int first_tile = 0;
};
__host__ __device__ constexpr int kinds_of(Set set) { return set == Set::none ? 3 : 5; }

// The gradient by the logits: factor * exp2(logit - top), less `share` in the set; `positive` at the positive. Each
// (kSlopes, items) of the compute type, in this order.
struct Slopes {
  const void *by_row = nullptr, *by_column = nullptr;  // by_column may be null
  int64_t items = 0;
};

struct InfoNceTiles {
  SimilarityTiles similarity;
  Entries entries;
  const double* scale = nullptr;
  int row_tiles = 0, skipped_tiles = 0;  // of columns: the first ones, where nothing is to be done
  bool paired = false;                   // tiles before the diagonal are left out: the matrix is symmetric

  double* positive = nullptr;  // of rows, where statistics put the positive's similarity
  TileParts parts;

  Slopes slopes;
  void* panel = nullptr;  // of the gradient, from the first row on
  int64_t panel_stride = 0;
};

template <class A>
constexpr A kOut = A(-1e38);  // in a tile: takes no part. Its logit is -inf, whatever the scale.

// As one rounded product: fused with what is done next in one kernel but not in another, it would differ between them.
template <class A>
TLK_DEVICE A logit(A x, A factor) {
  return x == kOut<A> ? -infinity<A>() : rounded_product(x, factor);
}

// A tile of one thread's block with what the entries are.
template <class S>
struct OnTile {
  using A = typename S::A;
  const SimilarityTiles& t;
  const Entries& e;
  const int first_row, first_column;
  const Place<S> place = {};

  TLK_DEVICE int row(int r) const { return first_row + place.row(r); }
  TLK_DEVICE int column(int c) const { return first_column + place.column(c); }
  TLK_DEVICE bool has_row(int i) const { return i < t.end_row; }
  TLK_DEVICE bool has_column(int j) const { return j < t.column_count; }

  // The column of the part that is the row's positive, or -1.
  TLK_DEVICE int positive(int i) const {
    if (e.set == Set::label || !has_row(i)) return -1;
    const int64_t j = (e.target ? e.target[i] : i) - e.first_column;
    return j >= 0 && j < t.column_count ? int(j) : -1;
  }

  // Calls visit(value, j) for the thread's entries of a row that exist.
  template <class Visit>
  TLK_DEVICE void each(Fragment<S>& x, int r, Visit visit) const {
#pragma unroll
    for (int c = 0; c < place.kColumns; ++c) {
      const int j = column(c);
      if (has_column(j)) visit(x.at(r, c), j);
    }
  }

  // Marks what takes no part. `positives`, where given, takes the similarities of rows' positives; with `of_columns`
  // also those of columns, whose positives the rows are.
  TLK_DEVICE void mark(Fragment<S>& x, double* positives, bool of_columns) const {
#pragma unroll
    for (int r = 0; r < place.kRows; ++r) {
      const int i = row(r);
      const int positive_column = positive(i), own = e.own >= 0 ? i + e.own : -1;
      const bool there = has_row(i);
#pragma unroll
      for (int c = 0; c < place.kColumns; ++c) {
        const int j = column(c);
        A& value = x.at(r, c);
        const bool is_positive = there && j == positive_column;
        if (is_positive && positives) {
          positives[i] = double(value);
          if (of_columns) positives[j] = double(value);
        }
        if (!there || !has_column(j) || is_positive || j == own) value = kOut<A>;
      }
      if (there && e.mask) {
        const bool* out = e.mask + i * e.mask_row;
        each(x, r, [&](A& value, int j) { value = out[j * e.mask_column] ? kOut<A> : value; });
      }
      if (there && e.row_ids && e.set != Set::label) {
        const int64_t id = e.row_ids[i];
        each(x, r, [&](A& value, int j) { value = e.column_ids[j] == id ? kOut<A> : value; });
      }
    }
  }

  // Whether the set has an entry, which exists.
  TLK_DEVICE bool in_set(A value, int i, int j) const {
    return value != kOut<A> && (e.set != Set::label || e.row_ids[i] == e.column_ids[j]);
  }
};

// What threads find of their rows, or columns, on the way to the tile's.
template <class A, int kParts, int kItems>
struct Exchange {
  A kinds[5][kParts][kItems];
};
template <class S>
struct Exchanges {
  Exchange<typename S::A, S::kWarpColumns, S::kRows> rows;
  Exchange<typename S::A, S::kWarpRows, S::kColumns> columns;
};

template <class A>
struct Statistics {
  A peak = -infinity<A>(), sum = 0, moment = 0, set_sum = 0, set_count = 0;

  // Takes in an entry; the peak is known.
  TLK_DEVICE void add(A x, A factor, bool in_set) {
    const A e = exp2_of(logit(x, factor) - finite_or_zero(peak));
    sum += e;
    moment += e * x;
    set_sum += in_set ? x : A(0);
    set_count += in_set ? A(1) : A(0);
  }

  // Joins those of lanes whose numbers differ in the bits from `first` to `last`.
  template <int kFirst, int kLast>
  TLK_DEVICE void join_lanes(bool with_set) {
#pragma unroll
    for (int lane = kFirst; lane <= kLast; lane *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, lane);
      moment += __shfl_xor_sync(0xffffffffu, moment, lane);
      if (with_set) {
        set_sum += __shfl_xor_sync(0xffffffffu, set_sum, lane);
        set_count += __shfl_xor_sync(0xffffffffu, set_count, lane);
      }
    }
  }

  template <int kParts, int kItems>
  TLK_DEVICE void put(Exchange<A, kParts, kItems>& to, int part, int item) const {
    to.kinds[0][part][item] = peak, to.kinds[1][part][item] = sum, to.kinds[2][part][item] = moment;
    to.kinds[3][part][item] = set_sum, to.kinds[4][part][item] = set_count;
  }

  template <int kParts, int kItems>
  TLK_DEVICE void join(const Exchange<A, kParts, kItems>& from, int item) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) peak = larger(peak, from.kinds[0][part][item]);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const A factor = exp2_of(from.kinds[0][part][item] - finite_or_zero(peak));
      sum += factor * from.kinds[1][part][item];
      moment += factor * from.kinds[2][part][item];
      set_sum += from.kinds[3][part][item];
      set_count += from.kinds[4][part][item];
    }
  }

  TLK_DEVICE void write(A* to, int64_t items, bool with_set) const {
    to[0] = peak, to[items] = sum, to[2 * items] = moment;
    if (with_set) to[3 * items] = set_sum, to[4 * items] = set_count;
  }
};

template <int kFirst, int kLast, class A>
TLK_DEVICE A largest_of_lanes(A value) {
#pragma unroll
  for (int lane = kFirst; lane <= kLast; lane *= 2) value = larger(value, __shfl_xor_sync(0xffffffffu, value, lane));
  return value;
}

template <class Source>
union StatisticsMemory {
  typename Source::Memory source;
  Exchanges<typename Source::Tile> found;
};

template <class Source>
__global__ void __launch_bounds__(Source::Tile::kThreads, Source::kBlocks)
    statistics_of_tiles(const __grid_constant__ InfoNceTiles p) {
  using S = typename Source::Tile;
  using A = typename S::A;
  StatisticsMemory<Source>& memory = *shared_memory<StatisticsMemory<Source>>();
  const int tile_row = blockIdx.x % p.row_tiles, tile_column = blockIdx.x / p.row_tiles + p.skipped_tiles;
  const int first_row = p.similarity.first_row + tile_row * S::kRows, first_column = tile_column * S::kColumns;
  if (p.paired && first_column < first_row) return;
  Fragment<S> x;
  Source::fill(x, memory.source, p.similarity, first_row, first_column);
  multiply_norms(x, p.similarity, first_row, first_column);
  const OnTile<S> tile{p.similarity, p.entries, first_row, first_column};
  tile.mark(x, p.positive, p.paired && first_column > first_row);

  const A factor = logit_factor<A>(p.scale);
  const bool with_set = p.entries.set != Set::none;
  const Place<S> place;
#pragma unroll
  for (int r = 0; r < place.kRows; ++r) {
    const int i = tile.row(r);
    Statistics<A> found;
#pragma unroll
    for (int c = 0; c < place.kColumns; ++c) found.peak = larger(found.peak, logit(x.at(r, c), factor));
    found.peak = largest_of_lanes<1, 2>(found.peak);
#pragma unroll
    for (int c = 0; c < place.kColumns; ++c)
      found.add(x.at(r, c), factor, with_set && tile.in_set(x.at(r, c), i, tile.column(c)));
    found.template join_lanes<1, 2>(with_set);
    if (place.lane % 4 == 0) found.put(memory.found.rows, place.warp_column, place.row(r));
  }
  if (p.parts.by_column) {
#pragma unroll
    for (int c = 0; c < place.kColumns; ++c) {
      const int j = tile.column(c);
      Statistics<A> found;
#pragma unroll
      for (int r = 0; r < place.kRows; ++r) found.peak = larger(found.peak, logit(x.at(r, c), factor));
      found.peak = largest_of_lanes<4, 16>(found.peak);
#pragma unroll
      for (int r = 0; r < place.kRows; ++r)
        found.add(x.at(r, c), factor, with_set && tile.in_set(x.at(r, c), tile.row(r), j));
      found.template join_lanes<4, 16>(with_set);
      if (place.lane < 4) found.put(memory.found.columns, place.warp_row, place.column(c));
    }
  }
  __syncthreads();
  const int kinds = kinds_of(p.entries.set);
  A *by_row = static_cast<A*>(p.parts.by_row), *by_column = static_cast<A*>(p.parts.by_column);
  for (int k = threadIdx.x; k < S::kRows + S::kColumns; k += S::kThreads) {
    const bool of_rows = k < S::kRows;
    const int item = of_rows ? k : k - S::kRows;
    Statistics<A> found;
    if (of_rows && tile.has_row(first_row + item)) {
      found.join(memory.found.rows, item);
      const int64_t to = int64_t(p.parts.first_tile + tile_column) * kinds * p.parts.row_items;
      found.write(by_row + to + tile_row * S::kRows + item, p.parts.row_items, with_set);
    } else if (!of_rows && by_column && tile.has_column(first_column + item)) {
      found.join(memory.found.columns, item);
      const int64_t to = int64_t(tile_row) * kinds * p.parts.column_items;
      found.write(by_column + to + first_column + item, p.parts.column_items, with_set);
    }
  }
}

// Writes a tile of the gradient by the products of rows as they are, over the scale.
template <class Source>
__global__ void __launch_bounds__(Source::Tile::kThreads, Source::kBlocks)
    gradient_of_tiles(const __grid_constant__ InfoNceTiles p) {
  using S = typename Source::Tile;
  using A = typename S::A;
  using Panel = typename Source::Panel;
  auto& memory = *shared_memory<typename Source::Memory>();
  const int tile_row = blockIdx.x % p.row_tiles, tile_column = blockIdx.x / p.row_tiles;
  const int first_row = p.similarity.first_row + tile_row * S::kRows, first_column = tile_column * S::kColumns;
  Fragment<S> x;
  Source::fill(x, memory, p.similarity, first_row, first_column);
  multiply_norms(x, p.similarity, first_row, first_column);
  const OnTile<S> tile{p.similarity, p.entries, first_row, first_column};
  tile.mark(x, nullptr, false);

  const A factor = logit_factor<A>(p.scale);
  const int64_t items = p.slopes.items;
  const A *by_row = static_cast<const A*>(p.slopes.by_row), *by_column = static_cast<const A*>(p.slopes.by_column);
  const A *row_norms = static_cast<const A*>(p.similarity.row_norms),
          *column_norms = static_cast<const A*>(p.similarity.column_norms);
  const bool with_set = p.entries.set != Set::none;
  const Place<S> place;
#pragma unroll
  for (int r = 0; r < place.kRows; ++r) {
    const int i = tile.row(r);
    if (!tile.has_row(i)) continue;
    const int positive = tile.positive(i);
    const A top = by_row[i], slope = by_row[items + i], share = with_set ? by_row[2 * items + i] : A(0);
    Panel* to = static_cast<Panel*>(p.panel) + int64_t(i - p.similarity.first_row) * p.panel_stride;
    tile.each(x, r, [&](A& value, int j) {
      const A t = logit(value, factor);
      A g = slope * exp2_of(t - top), shares = share;
      if (by_column) {
        g += by_column[items + j] * exp2_of(t - by_column[j]);
        if (with_set) shares += by_column[2 * items + j];
      }
      if (with_set && tile.in_set(value, i, j)) g -= shares;
      if (value == kOut<A>) g = 0;
      if (j == positive) g = by_row[3 * items + i] + (by_column ? by_column[3 * items + j] : A(0));
      if (row_norms) g *= row_norms[i] * column_norms[j];
      to[j] = narrow<Panel>(g);
    });
  }
}

// ---- launches ----

// Where there are few tiles they are small, so that there is one for each place on a multiprocessor.
template <class T>
using LargeProducts = Products<T, Shape<float, 128, 128, 2, 4>>;
template <class T>
using SmallProducts = Products<T, Shape<float, 64, 64, 2, 2>>;
constexpr int kLargeTile = 128, kSmallTile = 64;  // rows, and columns

// How the similarities of a part come about.
enum class Way { known_f64, known_f32, small_bf16, large_bf16, small_f16, large_f16 };
inline int tile_of(Way way) { return way == Way::large_bf16 || way == Way::large_f16 ? kLargeTile : kSmallTile; }

template <class Run>
cudaError_t with_source(Way way, Run run) {
  switch (way) {
    case Way::known_f64:
      return run(Known<Shape<double, kSmallTile, kSmallTile, 2, 4>>());
    case Way::known_f32:
      return run(Known<Shape<float, kSmallTile, kSmallTile, 2, 2>>());
    case Way::small_bf16:
      return run(SmallProducts<bf16>());
    case Way::large_bf16:
      return run(LargeProducts<bf16>());
    case Way::small_f16:
      return run(SmallProducts<f16>());
    case Way::large_f16:
      return run(LargeProducts<f16>());
  }
  return cudaErrorInvalidValue;
}

// Tiles of the rows, and of the columns from the first that is not skipped on.
inline Grid grid_of(InfoNceTiles& p, Way way) {
  const int tile = tile_of(way);
  const auto tiles = [&](int items) { return (items + tile - 1) / tile; };
  p.row_tiles = tiles(p.similarity.end_row - p.similarity.first_row);
  Grid grid;
  grid.blocks = dim3(unsigned(p.row_tiles) * unsigned(tiles(p.similarity.column_count) - p.skipped_tiles));
  return grid;
}

inline cudaError_t info_nce_statistics(InfoNceTiles p, Way way, cudaStream_t stream) {
  Grid grid = grid_of(p, way);
  if (grid.blocks.x == 0) return cudaSuccess;
  return with_source(way, [&](auto source) {
    using Source = decltype(source);
    grid.threads = Source::Tile::kThreads;
    grid.shared = sizeof(StatisticsMemory<Source>);
    return launch(grid, stream, statistics_of_tiles<Source>, p);
  });
}

inline cudaError_t info_nce_gradient(InfoNceTiles p, Way way, cudaStream_t stream) {
  Grid grid = grid_of(p, way);
  if (grid.blocks.x == 0) return cudaSuccess;
  return with_source(way, [&](auto source) {
    using Source = decltype(source);
    grid.threads = Source::Tile::kThreads;
    grid.shared = sizeof(typename Source::Memory);
    return launch(grid, stream, gradient_of_tiles<Source>, p);
  });
}

}  // namespace tlk::contrastive
