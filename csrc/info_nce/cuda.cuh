// InfoNCE's kernels on tiles of similarities, for a panel (some rows) of one part of the columns; nt_xent and sup_con
// call them too. Two sweeps: the softmax statistics of rows and columns, then the gradient by the similarities. Logits
// are in base 2.
//
// Each tile writes its statistics to memory of its own, and `fold_tiles` (cuda_rows.cuh) joins them in a fixed order,
// without atomics.
#pragma once
#include "kernel.h"
#include "../core/cuda/similarity.cuh"

namespace tlk::contrastive {

// Which entries of the part are left out of the softmax, and which are in the set. Pointers may be null.
struct Entries {
  Set set = Set::none;
  const int64_t* target = nullptr;        // (rows): the positive's column of the matrix; null: i. Not with Set::label
  int first_column = 0;                   // the part's first column of the matrix
  int self_column = -1;                   // row i leaves out column i + self_column of the part, itself; -1: none
  const bool* mask = nullptr;             // (rows, columns): True leaves the entry out
  int64_t mask_row = 0, mask_column = 0;  // strides of the mask, in elements
  // (rows), (columns): entries of equal ids are in the set with Set::label, else left out
  const int64_t *row_ids = nullptr, *column_ids = nullptr;
};

// The statistics of tiles, compute type. Kinds: peak, sum, moment, and with a set its sum and count; so 3 or 5.
struct TileParts {
  void* by_row = nullptr;                   // (column tiles of all parts, kinds, row_items)
  void* by_column = nullptr;                // (row tiles, kinds, column_items); null: not wanted
  int64_t row_items = 0, column_items = 0;  // rows of a panel and columns, at the most
  int first_tile = 0;                       // of by_row: the first tile of this part
};
__host__ __device__ constexpr int kinds_of(Set set) { return set == Set::none ? 3 : 5; }

// The gradient by the logits is factor * exp2(logit - top), minus `share` in the set, and `positive` at the positive.
// (kSlopes, items) of the compute type: top, factor, share, positive.
struct Slopes {
  const void *by_row = nullptr, *by_column = nullptr;  // by_column: null if columns have no loss
  int64_t items = 0;                                   // rows of the matrix
};

// Arguments of both kernels on tiles.
struct InfoNceTiles {
  SimilarityTiles similarity;
  Entries entries;
  const double* scale = nullptr;  // one number: logit = scale * similarity
  int row_tiles = 0;              // tiles of the panel's rows
  int skipped_tiles = 0;          // the first column tiles, which are not launched
  bool paired = false;            // the matrix is symmetric: tiles below the diagonal are left out

  // statistics_of_tiles:
  double* positive = nullptr;  // (rows): out, the positive's similarity
  TileParts parts;             // out

  // gradient_of_tiles:
  Slopes slopes;
  void* panel = nullptr;     // (rows of the panel, columns): out, the gradient; Source::Gradient
  int64_t panel_stride = 0;  // elements from row to row
};

template <class A>
constexpr A kOut = A(-1e38);  // in a tile: an entry that is left out. Its logit is -inf at any scale.

// The product is rounded on its own: fused with what follows in one kernel but not in the other, it would differ.
template <class A>
TLK_DEVICE A logit(A x, A factor) {
  return x == kOut<A> ? -infinity<A>() : rounded_product(x, factor);
}

// The block's tile: its rows, columns, positives and left-out entries.
template <class S>
struct TileEntries {
  using A = typename S::A;
  const SimilarityTiles& t;
  const Entries& e;
  const int first_row, first_column;
  const Layout<S> layout = {};

  TLK_DEVICE int row(int r) const { return first_row + layout.row(r); }
  TLK_DEVICE int column(int c) const { return first_column + layout.column(c); }
  TLK_DEVICE bool has_row(int i) const { return i < t.end_row; }
  TLK_DEVICE bool has_column(int j) const { return j < t.column_count; }

  // The part's column of the row's positive, or -1.
  TLK_DEVICE int positive(int i) const {
    if (e.set == Set::label || !has_row(i)) return -1;
    const int64_t j = (e.target ? e.target[i] : i) - e.first_column;
    return j >= 0 && j < t.column_count ? int(j) : -1;
  }

  // Calls visit(value, j) for the thread's entries of its row r, up to the last column.
  template <class Visit>
  TLK_DEVICE void each(Fragment<S>& x, int r, Visit visit) const {
#pragma unroll
    for (int c = 0; c < layout.kColumns; ++c) {
      const int j = column(c);
      if (has_column(j)) visit(x.at(r, c), j);
    }
  }

  // Sets entries that are left out, and the positives, to kOut. Writes the positives' similarities to `positives`,
  // which may be null: those of rows and, with `mirrored`, also those of columns, whose positives the rows are.
  TLK_DEVICE void mark(Fragment<S>& x, double* positives, bool mirrored) const {
#pragma unroll
    for (int r = 0; r < layout.kRows; ++r) {
      const int i = row(r);
      const int positive_column = positive(i), self_column = e.self_column >= 0 ? i + e.self_column : -1;
      const bool valid = has_row(i);
#pragma unroll
      for (int c = 0; c < layout.kColumns; ++c) {
        const int j = column(c);
        A& value = x.at(r, c);
        const bool is_positive = valid && j == positive_column;
        if (is_positive && positives) {
          positives[i] = double(value);
          if (mirrored) positives[j] = double(value);
        }
        if (!valid || !has_column(j) || is_positive || j == self_column) value = kOut<A>;
      }
      if (valid && e.mask) {
        const bool* mask = e.mask + i * e.mask_row;
        each(x, r, [&](A& value, int j) { value = mask[j * e.mask_column] ? kOut<A> : value; });
      }
      if (valid && e.row_ids && e.set != Set::label) {
        const int64_t id = e.row_ids[i];
        each(x, r, [&](A& value, int j) { value = e.column_ids[j] == id ? kOut<A> : value; });
      }
    }
  }

  // Whether an entry, within the rows and columns, is in the set.
  TLK_DEVICE bool in_set(A value, int i, int j) const {
    return value != kOut<A> && (e.set != Set::label || e.row_ids[i] == e.column_ids[j]);
  }
};

// Shared memory in which warps exchange their statistics of the tile's rows, or columns.
template <class A, int kParts, int kItems>
struct Exchange {
  A kinds[5][kParts][kItems];  // kParts: warps that share an item; kItems: rows, or columns, of the tile
};
template <class S>
struct Exchanges {
  Exchange<typename S::A, S::kWarpColumns, S::kRows> rows;
  Exchange<typename S::A, S::kWarpRows, S::kColumns> columns;
};

// Softmax statistics of some entries of a row or column.
template <class A>
struct Statistics {
  A peak = -infinity<A>(), sum = 0, moment = 0, set_sum = 0, set_count = 0;

  // Adds an entry. The peak must be final.
  TLK_DEVICE void add(A x, A factor, bool in_set) {
    const A e = fast_exp2(logit(x, factor) - finite_or_zero(peak));
    sum += e;
    moment += e * x;
    set_sum += in_set ? x : A(0);
    set_count += in_set ? A(1) : A(0);
  }

  // Adds up the sums of lanes whose indices differ in the bits kFirst to kLast.
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
    for (int part = 0; part < kParts; ++part) peak = fmax(peak, from.kinds[0][part][item]);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const A factor = fast_exp2(from.kinds[0][part][item] - finite_or_zero(peak));
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
  for (int lane = kFirst; lane <= kLast; lane *= 2) value = fmax(value, __shfl_xor_sync(0xffffffffu, value, lane));
  return value;
}

// Shared memory of statistics_of_tiles: the operands, then the exchange.
template <class Source>
union StatisticsMemory {
  typename Source::Memory source;
  Exchanges<typename Source::Tile> exchange;
};

// Writes the softmax statistics of a tile's rows and, if wanted, columns. One block per tile.
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
  const TileEntries<S> tile{p.similarity, p.entries, first_row, first_column};
  tile.mark(x, p.positive, p.paired && first_column > first_row);

  const A factor = logit_factor<A>(p.scale);
  const bool with_set = p.entries.set != Set::none;
  const Layout<S> layout;
#pragma unroll
  for (int r = 0; r < layout.kRows; ++r) {
    const int i = tile.row(r);
    Statistics<A> row;
#pragma unroll
    for (int c = 0; c < layout.kColumns; ++c) row.peak = fmax(row.peak, logit(x.at(r, c), factor));
    row.peak = largest_of_lanes<1, 2>(row.peak);
#pragma unroll
    for (int c = 0; c < layout.kColumns; ++c)
      row.add(x.at(r, c), factor, with_set && tile.in_set(x.at(r, c), i, tile.column(c)));
    row.template join_lanes<1, 2>(with_set);
    if (layout.lane % 4 == 0) row.put(memory.exchange.rows, layout.warp_column, layout.row(r));
  }
  if (p.parts.by_column) {
#pragma unroll
    for (int c = 0; c < layout.kColumns; ++c) {
      const int j = tile.column(c);
      Statistics<A> column;
#pragma unroll
      for (int r = 0; r < layout.kRows; ++r) column.peak = fmax(column.peak, logit(x.at(r, c), factor));
      column.peak = largest_of_lanes<4, 16>(column.peak);
#pragma unroll
      for (int r = 0; r < layout.kRows; ++r)
        column.add(x.at(r, c), factor, with_set && tile.in_set(x.at(r, c), tile.row(r), j));
      column.template join_lanes<4, 16>(with_set);
      if (layout.lane < 4) column.put(memory.exchange.columns, layout.warp_row, layout.column(c));
    }
  }
  __syncthreads();
  const int kinds = kinds_of(p.entries.set);
  A *by_row = static_cast<A*>(p.parts.by_row), *by_column = static_cast<A*>(p.parts.by_column);
  for (int k = threadIdx.x; k < S::kRows + S::kColumns; k += S::kThreads) {
    const bool is_row = k < S::kRows;
    const int item = is_row ? k : k - S::kRows;
    Statistics<A> joined;
    if (is_row && tile.has_row(first_row + item)) {
      joined.join(memory.exchange.rows, item);
      const int64_t to = int64_t(p.parts.first_tile + tile_column) * kinds * p.parts.row_items;
      joined.write(by_row + to + tile_row * S::kRows + item, p.parts.row_items, with_set);
    } else if (!is_row && by_column && tile.has_column(first_column + item)) {
      joined.join(memory.exchange.columns, item);
      const int64_t to = int64_t(tile_row) * kinds * p.parts.column_items;
      joined.write(by_column + to + first_column + item, p.parts.column_items, with_set);
    }
  }
}

// Writes a tile of the gradient by the products of operands, before norms, divided by the scale. One block per tile.
template <class Source>
__global__ void __launch_bounds__(Source::Tile::kThreads, Source::kBlocks)
    gradient_of_tiles(const __grid_constant__ InfoNceTiles p) {
  using S = typename Source::Tile;
  using A = typename S::A;
  using Gradient = typename Source::Gradient;
  auto& memory = *shared_memory<typename Source::Memory>();
  const int tile_row = blockIdx.x % p.row_tiles, tile_column = blockIdx.x / p.row_tiles;
  const int first_row = p.similarity.first_row + tile_row * S::kRows, first_column = tile_column * S::kColumns;
  Fragment<S> x;
  Source::fill(x, memory, p.similarity, first_row, first_column);
  multiply_norms(x, p.similarity, first_row, first_column);
  const TileEntries<S> tile{p.similarity, p.entries, first_row, first_column};
  tile.mark(x, nullptr, /*mirrored=*/false);

  const A factor = logit_factor<A>(p.scale);
  const int64_t items = p.slopes.items;
  const A *by_row = static_cast<const A*>(p.slopes.by_row), *by_column = static_cast<const A*>(p.slopes.by_column);
  const A *row_norms = static_cast<const A*>(p.similarity.row_norms),
          *column_norms = static_cast<const A*>(p.similarity.column_norms);
  const bool with_set = p.entries.set != Set::none;
  const Layout<S> layout;
#pragma unroll
  for (int r = 0; r < layout.kRows; ++r) {
    const int i = tile.row(r);
    if (!tile.has_row(i)) continue;
    const int positive = tile.positive(i);
    const A top = by_row[i], slope = by_row[items + i], share = with_set ? by_row[2 * items + i] : A(0);
    Gradient* to = static_cast<Gradient*>(p.panel) + int64_t(i - p.similarity.first_row) * p.panel_stride;
    tile.each(x, r, [&](A& value, int j) {
      const A t = logit(value, factor);
      A g = slope * fast_exp2(t - top), shares = share;
      if (by_column) {
        g += by_column[items + j] * fast_exp2(t - by_column[j]);
        if (with_set) shares += by_column[2 * items + j];
      }
      if (with_set && tile.in_set(value, i, j)) g -= shares;
      if (value == kOut<A>) g = 0;
      if (j == positive) g = by_row[3 * items + i] + (by_column ? by_column[3 * items + j] : A(0));
      if (row_norms) g *= row_norms[i] * column_norms[j];
      to[j] = narrow<Gradient>(g);
    });
  }
}

// ---- launches ----

// Small tiles if large ones would be too few to fill the multiprocessors.
template <class T>
using LargeProducts = Products<T, Shape<float, 128, 128, 2, 4>>;
template <class T>
using SmallProducts = Products<T, Shape<float, 64, 64, 2, 2>>;
constexpr int kLargeTile = 128, kSmallTile = 64;  // rows and columns of a tile

// How a part's similarities are computed.
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

// One block for each tile of the panel, without the skipped ones. Fills in row_tiles.
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
