// InfoNCE's kernels on numbers for each row (or, in the other direction, column): statistics of tiles joined, losses,
// what the gradient by the logits is made of. State and sums are float64; logits are in base 2.
#pragma once
#include "kernel.h"
#include "../core/cuda/math.cuh"

namespace tlk::contrastive {

constexpr double kLn2 = 0.693147180559945309417;

// Of a state (directions, kStatistics, rows).
TLK_DEVICE Direction direction_of(double* state, int direction, int64_t rows) {
  double* const at = state + direction * kStatistics * rows;
  return {at, at + rows, at + 2 * rows, at + 3 * rows, at + 4 * rows, at + 5 * rows};
}

// Statistics of nothing; a positive that no tile has is NaN.
__global__ void start_rows(double* state, int directions, int64_t rows) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows) return;
  for (int direction = 0; direction < directions; ++direction) {
    const Direction d = direction_of(state, direction, rows);
    d.peak[i] = -infinity<double>();
    d.positive[i] = nan("");
    d.sum[i] = d.moment[i] = d.set_sum[i] = d.set_count[i] = 0;
  }
}

struct Fold {
  const void* parts = nullptr;  // (tiles, kinds, items_stride)
  double* state = nullptr;
  int direction = 0;
  int64_t rows = 0;  // of the state
  int64_t items_stride = 0;
  int first = 0, items = 0;
  int tiles = 0, first_tile = 0;
  int side = 0;  // 0, or 1: only tiles from the item's own on were written, or -1: only those before it
  int tile = 0;  // items of a tile
  bool with_set = false;
};

// Of some tiles: the largest peak and, relative to it, sums.
template <class A>
struct Joined {
  A peak = -infinity<A>();
  double sum = 0, moment = 0, set_sum = 0, set_count = 0;

  TLK_DEVICE void join(const Joined& other) {
    const A higher = larger(peak, other.peak), base = finite_or_zero(higher);
    const double mine = exp2_of(peak - base), others = exp2_of(other.peak - base);
    sum = sum * mine + other.sum * others;
    moment = moment * mine + other.moment * others;
    set_sum += other.set_sum;
    set_count += other.set_count;
    peak = higher;
  }
};

constexpr int kFoldItems = 32, kFoldSlices = 8;  // of a block

// Joins the parts of tiles into the state, always in the same order: each slice those at a distance of kFoldSlices,
// then the slices one after the other.
template <class A>
__global__ void __launch_bounds__(kFoldItems* kFoldSlices, 2) fold_tiles(const __grid_constant__ Fold p) {
  auto& slices = *shared_memory<Joined<A>[kFoldSlices][kFoldItems]>();
  const int lane = threadIdx.x % kFoldItems, slice = threadIdx.x / kFoldItems;
  const int item = blockIdx.x * kFoldItems + lane, i = p.first + item;
  if (item < p.items) {
    const int own = i / p.tile - p.first_tile;
    const int begin = p.side == 1 ? own : 0, end = p.side == -1 && own < p.tiles ? own : p.tiles;
    const int64_t kind = p.items_stride, part = kind * (p.with_set ? 5 : 3);
    const A* const parts = static_cast<const A*>(p.parts) + item;
    const int from = begin + (slice - begin % kFoldSlices + kFoldSlices) % kFoldSlices;
    Joined<A> joined;
    for (int tile = from; tile < end; tile += kFoldSlices) joined.peak = larger(joined.peak, parts[tile * part]);
    const A base = finite_or_zero(joined.peak);
#pragma unroll 2
    for (int tile = from; tile < end; tile += kFoldSlices) {
      const A* at = parts + tile * part;
      const A factor = exp2_of(at[0] - base);
      joined.sum += double(factor * at[kind]);
      joined.moment += double(factor * at[2 * kind]);
      if (p.with_set) {
        joined.set_sum += double(at[3 * kind]);
        joined.set_count += double(at[4 * kind]);
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

// Numbers of each row, from the state.
struct InfoNceRows {
  int64_t rows = 0, classes = 0;
  Set set = Set::none;
  bool symmetric = false;
  double smoothing = 0;
  const double* scale = nullptr;
  const int64_t* target = nullptr;  // null: the row's own number
  double* state = nullptr;

  void* loss = nullptr;  // of the compute type

  const void* upstream = nullptr;  // of the compute type
  int64_t upstream_stride = 0;
  const double* extra = nullptr;                 // a factor of all slopes; may be null
  void *by_row = nullptr, *by_column = nullptr;  // slopes; by_column null: not wanted
  double* by_scale = nullptr;                    // (directions, rows): what each adds to the gradient of the scale
};

// What the statistics of a row say: exponentials relative to `top`.
struct Softmax {
  double top, others, moment, own, logit, share_count;  // own, logit: the positive's; share_count has the positive too
  TLK_DEVICE double total() const { return others + own; }
};

template <class A>
TLK_DEVICE Softmax softmax_of(const Direction& d, double positive, int64_t i, Set set, A factor) {
  if (set == Set::label) return {d.peak[i], d.sum[i], d.moment[i], 0, 0, d.set_count[i]};
  const double logit = double(rounded_product(A(positive), factor)), top = larger(d.peak[i], logit);
  const double shrink = exp2(d.peak[i] - top);
  return {top, d.sum[i] * shrink, d.moment[i] * shrink, exp2(logit - top), logit, d.set_count[i] + 1};
}

template <class A>
TLK_DEVICE double loss_of(const InfoNceRows& p, const Direction& d, double positive, int64_t i, A factor) {
  const Softmax s = softmax_of(d, positive, i, p.set, factor);
  if (p.set == Set::label) {
    if (s.share_count == 0) return 0;
    // The sum is rounded as logits are, so that of a row's only other entry nothing is left.
    const double mean = double(rounded_product(A(d.set_sum[i]), factor)) / s.share_count;
    return log(s.others) + (s.top - mean) * kLn2;
  }
  const double loss = s.others <= s.own ? log1p(s.others / s.own) : log(s.total()) + (s.top - s.logit) * kLn2;
  if (p.smoothing == 0) return loss;
  const double mean = (d.set_sum[i] + positive) / s.share_count;
  return loss + p.smoothing * (positive - mean) * *p.scale;
}

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

template <class A>
TLK_DEVICE void slope_of(const InfoNceRows& p, int direction, int64_t i, void* to, A factor) {
  const Direction d = direction_of(p.state, direction, p.rows);
  const double positive = direction_of(p.state, 0, p.rows).positive[i];
  const Softmax s = softmax_of(d, positive, i, p.set, factor);
  A *const top = static_cast<A*>(to) + i, *const each = top + p.rows, *const share = each + p.rows,
           *const own = share + p.rows;
  const int64_t target = p.target ? p.target[i] : i;
  if (p.set == Set::label ? s.share_count == 0 : target < 0 || target >= p.classes) {
    // no part in anything; a top above all logits, so that no exponential overflows
    *top = A(1e30), *each = *share = *own = A(0);
    p.by_scale[direction * p.rows + i] = 0;
    return;
  }
  const double g = double(static_cast<const A*>(p.upstream)[i * p.upstream_stride]) / (p.symmetric ? 2 : 1);
  const double extra = p.extra ? *p.extra : 1;
  const double of_set = p.set == Set::label ? 1 : p.set == Set::all ? p.smoothing : 0;
  const double of_each = of_set == 0 ? 0 : of_set / s.share_count;
  const double of_own = p.set == Set::label ? 0 : p.smoothing - of_each - s.others / s.total();
  *top = A(s.top);
  *each = A(g * extra / s.total());
  *share = A(g * extra * of_each);
  *own = A(g * extra * of_own);
  p.by_scale[direction * p.rows + i] =
      g * (s.moment / s.total() - of_each * d.set_sum[i] + (p.set == Set::label ? 0 : of_own * positive));
}

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
