// InfoNCE's kernels on one number per row or, in the other direction, column: they join the statistics of tiles, and
// compute losses and the coefficients of the gradient by the logits. State and sums are float64; logits are in base 2.
#pragma once
#include "kernel.h"
#include "../core/cuda/math.cuh"

namespace tlk::contrastive {

// One direction of a state (directions, kStatistics, rows): 0 for rows, 1 for columns.
TLK_DEVICE Direction direction_of(double* state, int direction, int64_t rows) {
  double* const start = state + direction * kStatistics * rows;
  return {start, start + rows, start + 2 * rows, start + 3 * rows, start + 4 * rows, start + 5 * rows};
}

// Initializes the state. A positive that no tile writes stays NaN.
__global__ void start_rows(double* state,   // (directions, kStatistics, rows): out
                           int directions,  // 1, or 2 if columns have a loss
                           int64_t rows) {  // of the batch
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows) return;
  for (int direction = 0; direction < directions; ++direction) {
    const Direction d = direction_of(state, direction, rows);
    d.peak[i] = -infinity<double>();
    d.positive[i] = nan("");
    d.sum[i] = d.moment[i] = d.set_sum[i] = d.set_count[i] = 0;
  }
}

// Arguments of fold_tiles. An item is a row or, in direction 1, a column.
struct Fold {
  const void* parts = nullptr;  // (tiles, kinds, items_stride): statistics of tiles, see TileParts; compute type
  double* state = nullptr;      // (directions, kStatistics, rows): in and out
  int direction = 0;
  int64_t rows = 0;          // of the state
  int64_t items_stride = 0;  // elements from kind to kind of `parts`
  int first = 0, items = 0;  // items first to first + items - 1 of the state are items 0 to items - 1 of `parts`
  int tiles = 0;             // of `parts`
  int first_tile = 0;        // the matrix's index of tile 0 of `parts`
  int side = 0;              // tiles that were written: 0 all, 1 from the item's diagonal tile on, -1 those before it
  int tile = 0;              // items per tile
  bool with_set = false;     // 5 kinds, else 3
};

// Statistics of some tiles: the largest peak, and sums relative to it.
template <class A>
struct Joined {
  A peak = -infinity<A>();
  double sum = 0, moment = 0, set_sum = 0, set_count = 0;

  TLK_DEVICE void join(const Joined& other) {
    const A higher = fmax(peak, other.peak), base = finite_or_zero(higher);
    const double factor = fast_exp2(peak - base), other_factor = fast_exp2(other.peak - base);
    sum = sum * factor + other.sum * other_factor;
    moment = moment * factor + other.moment * other_factor;
    set_sum += other.set_sum;
    set_count += other.set_count;
    peak = higher;
  }
};

constexpr int kFoldItems = 32, kFoldSlices = 8;  // per block; a thread for each item of each slice

// Joins the statistics of tiles into the state, always in the same order: each slice joins every kFoldSlices-th tile,
// then the slices are joined one after the other.
template <class A>
__global__ void __launch_bounds__(kFoldItems* kFoldSlices, 2) fold_tiles(const __grid_constant__ Fold p) {
  auto& slices = *shared_memory<Joined<A>[kFoldSlices][kFoldItems]>();
  const int lane = threadIdx.x % kFoldItems, slice = threadIdx.x / kFoldItems;
  const int item = blockIdx.x * kFoldItems + lane, i = p.first + item;
  if (item < p.items) {
    const int diagonal = i / p.tile - p.first_tile;
    const int begin = p.side == 1 ? diagonal : 0, end = p.side == -1 && diagonal < p.tiles ? diagonal : p.tiles;
    const int64_t kind = p.items_stride, part = kind * (p.with_set ? 5 : 3);
    const A* const parts = static_cast<const A*>(p.parts) + item;
    const int from = begin + (slice - begin % kFoldSlices + kFoldSlices) % kFoldSlices;
    Joined<A> joined;
    for (int tile = from; tile < end; tile += kFoldSlices) joined.peak = fmax(joined.peak, parts[tile * part]);
    const A base = finite_or_zero(joined.peak);
#pragma unroll 2
    for (int tile = from; tile < end; tile += kFoldSlices) {
      const A* values = parts + tile * part;
      const A factor = fast_exp2(values[0] - base);
      joined.sum += double(factor * values[kind]);
      joined.moment += double(factor * values[2 * kind]);
      if (p.with_set) {
        joined.set_sum += double(values[3 * kind]);
        joined.set_count += double(values[4 * kind]);
      }
    }
    slices[slice][lane] = joined;
  }
  __syncthreads();
  if (slice != 0 || item >= p.items) return;
  const Direction to = direction_of(p.state, p.direction, p.rows);
  Joined<A> all{A(to.peak[i]), to.sum[i], to.moment[i], to.set_sum[i], to.set_count[i]};
#pragma unroll 1
  for (int k = 0; k < kFoldSlices; ++k) all.join(slices[k][lane]);
  to.peak[i] = double(all.peak);
  to.sum[i] = all.sum;
  to.moment[i] = all.moment;
  to.set_sum[i] = all.set_sum;
  to.set_count[i] = all.set_count;
}

// Arguments of losses_of_rows and slopes_of_rows.
struct InfoNceRows {
  int64_t rows = 0, classes = 0;
  Set set = Set::none;
  bool symmetric = false;  // columns have a loss too
  double smoothing = 0;
  const double* scale = nullptr;    // one number: logit = scale * similarity
  const int64_t* target = nullptr;  // (rows): the positive's column; null: row i's is i
  double* state = nullptr;          // (directions, kStatistics, rows)

  // losses_of_rows:
  void* loss = nullptr;  // (rows): out, compute type

  // slopes_of_rows:
  const void* upstream = nullptr;                // (rows): gradient by the loss, compute type
  int64_t upstream_stride = 0;                   // in elements
  const double* extra = nullptr;                 // one number, a factor of all slopes; null: 1
  void *by_row = nullptr, *by_column = nullptr;  // (kSlopes, rows): out, compute type; by_column null: not wanted
  double* by_scale = nullptr;                    // (directions, rows): out, each row's part of the scale's gradient
};

// A row's softmax. Exponentials are relative to `top`, the largest logit.
struct Softmax {
  double top;
  double others;       // sum of exponentials but the positive's
  double moment;       // the sum `others` with each term times its similarity
  double positive;     // the positive's exponential
  double logit;        // the positive's logit
  double share_count;  // entries of the set, and the positive
  TLK_DEVICE double total() const { return others + positive; }
};

template <class A>
TLK_DEVICE Softmax softmax_of(const Direction& d, double positive, int64_t i, Set set, A factor) {
  if (set == Set::label) return {d.peak[i], d.sum[i], d.moment[i], 0, 0, d.set_count[i]};
  const double logit = double(rounded_product(A(positive), factor)), top = fmax(d.peak[i], logit);
  const double shrink = exp2(d.peak[i] - top);
  return {top, d.sum[i] * shrink, d.moment[i] * shrink, exp2(logit - top), logit, d.set_count[i] + 1};
}

template <class A>
TLK_DEVICE double loss_of(const InfoNceRows& p, const Direction& d, double positive, int64_t i, A factor) {
  const Softmax s = softmax_of(d, positive, i, p.set, factor);
  if (p.set == Set::label) {
    if (s.share_count == 0) return 0;
    // The sum is rounded as logits are: with a single entry in the softmax, the loss is exactly 0.
    const double mean = double(rounded_product(A(d.set_sum[i]), factor)) / s.share_count;
    return log(s.others) + (s.top - mean) * kLn2;
  }
  const double loss = s.others <= s.positive ? log1p(s.others / s.positive) : log(s.total()) + (s.top - s.logit) * kLn2;
  if (p.smoothing == 0) return loss;
  const double mean = (d.set_sum[i] + positive) / s.share_count;
  return loss + p.smoothing * (positive - mean) * *p.scale;
}

// Writes the loss of each row. One thread per row.
template <class A>
__global__ void losses_of_rows(const __grid_constant__ InfoNceRows p) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.rows) return;
  const A factor = logit_factor<A>(p.scale);
  const Direction rows = direction_of(p.state, 0, p.rows);
  double loss = loss_of(p, rows, rows.positive[i], i, factor);
  if (p.symmetric) loss = (loss + loss_of(p, direction_of(p.state, 1, p.rows), rows.positive[i], i, factor)) / 2;
  static_cast<A*>(p.loss)[i] = A(loss);
}

// Writes one row's slopes in one direction.
template <class A>
TLK_DEVICE void slope_of(const InfoNceRows& p, int direction, int64_t i, void* to, A factor) {
  const Direction d = direction_of(p.state, direction, p.rows);
  const double positive = direction_of(p.state, 0, p.rows).positive[i];
  const Softmax s = softmax_of(d, positive, i, p.set, factor);
  A *const top = static_cast<A*>(to) + i, *const slope = top + p.rows, *const share = slope + p.rows,
           *const positive_slope = share + p.rows;
  const int64_t target = p.target ? p.target[i] : i;
  if (p.set == Set::label ? s.share_count == 0 : target < 0 || target >= p.classes) {
    // The row has no loss. Its top is above all logits, so that no exponential overflows.
    *top = A(1e30), *slope = *share = *positive_slope = A(0);
    p.by_scale[direction * p.rows + i] = 0;
    return;
  }
  const double g = double(static_cast<const A*>(p.upstream)[i * p.upstream_stride]) / (p.symmetric ? 2 : 1);
  const double extra = p.extra ? *p.extra : 1;
  const double set_weight = p.set == Set::label ? 1 : p.set == Set::all ? p.smoothing : 0;
  const double entry_weight = set_weight == 0 ? 0 : set_weight / s.share_count;
  const double by_positive = p.set == Set::label ? 0 : p.smoothing - entry_weight - s.others / s.total();
  *top = A(s.top);
  *slope = A(g * extra / s.total());
  *share = A(g * extra * entry_weight);
  *positive_slope = A(g * extra * by_positive);
  p.by_scale[direction * p.rows + i] =
      g * (s.moment / s.total() - entry_weight * d.set_sum[i] + (p.set == Set::label ? 0 : by_positive * positive));
}

// Writes the slopes of each row and column. One thread per row.
template <class A>
__global__ void slopes_of_rows(const __grid_constant__ InfoNceRows p) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.rows) return;
  const A factor = logit_factor<A>(p.scale);
  slope_of(p, 0, i, p.by_row, factor);
  if (p.symmetric) slope_of(p, 1, i, p.by_column, factor);
}

// ---- launches ----

constexpr int kRowThreads = 128;

inline Grid grid_of_rows(int64_t rows, int each, int threads) {
  Grid grid;
  grid.blocks = dim3(unsigned((rows + each - 1) / each));
  grid.threads = threads;
  return grid;
}

inline cudaError_t info_nce_start(double* state, int directions, int64_t rows, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return launch(grid_of_rows(rows, kRowThreads, kRowThreads), stream, start_rows, state, directions, rows);
}

template <class A>
cudaError_t info_nce_fold(const Fold& p, cudaStream_t stream) {
  if (p.items == 0) return cudaSuccess;
  Grid grid = grid_of_rows(p.items, kFoldItems, kFoldItems * kFoldSlices);
  grid.shared = sizeof(Joined<A>[kFoldSlices][kFoldItems]);
  return launch(grid, stream, fold_tiles<A>, p);
}

template <class A>
cudaError_t info_nce_losses(const InfoNceRows& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return launch(grid_of_rows(p.rows, kRowThreads, kRowThreads), stream, losses_of_rows<A>, p);
}

template <class A>
cudaError_t info_nce_slopes(const InfoNceRows& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return launch(grid_of_rows(p.rows, kRowThreads, kRowThreads), stream, slopes_of_rows<A>, p);
}

}  // namespace tlk::contrastive
