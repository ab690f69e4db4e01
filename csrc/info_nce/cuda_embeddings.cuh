// Rows of embeddings: scaling before the products, so that they neither overflow nor underflow, and its gradient; and
// the per-query negatives.
#pragma once
#include "kernel.h"
#include "../core/cuda/math.cuh"
#include "../core/cuda/reduce.cuh"

namespace tlk::contrastive {

constexpr int kRowsOfBlock = 4;  // one warp per row

inline Grid grid_of_warps(int64_t rows) {
  Grid grid;
  grid.blocks = dim3(unsigned((rows + kRowsOfBlock - 1) / kRowsOfBlock));
  grid.threads = kWarp * kRowsOfBlock;
  return grid;
}

// Arguments of scale_rows_kernel.
struct ScaledRows {
  const void* x = nullptr;  // (rows, features), each row contiguous
  void* out = nullptr;      // (rows, out_stride): out, of x's type, padded with zeros
  void* norms = nullptr;    // (3, rows): out, compute type
  int64_t rows = 0, features = 0;
  int64_t stride = 0, out_stride = 0;  // elements from row to row of x and out
};

// Writes each row divided by the power of two below its 2-norm, which rounds nothing. A norm below kLeastNorm counts as
// kLeastNorm. Three norms per row: the inverse norm of the written row; its square, or 0 if the norm was below
// kLeastNorm and so is a constant; the inverse of the power of two.
template <class T>
__global__ void __launch_bounds__(kWarp* kRowsOfBlock) scale_rows_kernel(const __grid_constant__ ScaledRows p) {
  using A = Compute<T>;
  const int64_t i = int64_t(blockIdx.x) * kRowsOfBlock + threadIdx.x / kWarp;
  if (i >= p.rows) return;
  const int lane = threadIdx.x % kWarp;
  const T* x = static_cast<const T*>(p.x) + i * p.stride;
  double squares = 0;  // in double: the norm's error would be common to all of the row's similarities
  for (int64_t d = lane; d < p.features; d += kWarp) {
    const double value = double(widen(x[d]));
    squares += value * value;
  }
  const double norm = sqrt(reduce_warp<Sum>(squares)), divisor = norm < kLeastNorm ? kLeastNorm : norm;
  const double shrink = exp2(-floor(log2(divisor < 1e30 ? divisor : 1e30)));
  if (lane == 0) {
    const double inverse = 1 / (divisor * shrink);
    A* norms = static_cast<A*>(p.norms) + i;
    norms[0] = A(inverse);
    norms[p.rows] = norm < kLeastNorm ? A(0) : A(inverse * inverse);
    norms[2 * p.rows] = A(shrink);
  }
  T* out = static_cast<T*>(p.out) + i * p.out_stride;
  for (int64_t d = lane; d < p.out_stride; d += kWarp)
    out[d] = narrow<T>(d < p.features ? widen(x[d]) * A(shrink) : A(0));
}

template <class T>
cudaError_t scale_rows(const ScaledRows& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return launch(grid_of_warps(p.rows), stream, scale_rows_kernel<T>, p);
}

// Arguments of finish_rows_kernel.
struct FinishedRows {
  const void* total = nullptr;  // (rows, features): gradient by the operands / scale * extra, compute type
  const void* x = nullptr;      // (all_rows, features): the operands
  const void* norms = nullptr;  // (3, all_rows): see scale_rows_kernel; null: the operands are the rows as given
  void* grad = nullptr;         // (all_rows, features): out, the operands' type; may be total's memory
  const double *scale = nullptr, *extra = nullptr;       // one number each; extra null: 1
  int64_t first = 0, rows = 0, features = 0;             // total's rows are rows `first` on of x and grad
  int64_t all_rows = 0, total_stride = 0, x_stride = 0;  // strides: elements from row to row
};

// Writes the gradient by the rows as they were given, before scale_rows_kernel.
template <class T>
__global__ void __launch_bounds__(kWarp* kRowsOfBlock) finish_rows_kernel(const __grid_constant__ FinishedRows p) {
  using A = Compute<T>;
  const int64_t r = int64_t(blockIdx.x) * kRowsOfBlock + threadIdx.x / kWarp, i = p.first + r;
  if (r >= p.rows) return;
  const int lane = threadIdx.x % kWarp;
  const A* total = static_cast<const A*>(p.total) + r * p.total_stride;
  const T* x = static_cast<const T*>(p.x) + i * p.x_stride;
  const A factor = A(p.extra ? *p.scale / *p.extra : *p.scale);
  A along = 0, shrink = 1;
  if (p.norms) {  // without the component along the row: its norm does not change the loss
    const A* norms = static_cast<const A*>(p.norms) + i;
    double product = 0;
    for (int64_t d = lane; d < p.features; d += kWarp) product += double(total[d]) * double(widen(x[d]));
    along = A(reduce_warp<Sum>(product) * double(norms[p.all_rows]));
    shrink = norms[2 * p.all_rows];
  }
  T* grad = static_cast<T*>(p.grad) + i * p.features;
  for (int64_t d = lane; d < p.features; d += kWarp) {
    const A g = p.norms ? (total[d] - along * widen(x[d])) * shrink : total[d];
    grad[d] = narrow<T>(g * factor);
  }
}

template <class T>
cudaError_t finish_rows(const FinishedRows& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return launch(grid_of_warps(p.rows), stream, finish_rows_kernel<T>, p);
}

// Per-query negatives: each row has `count` of its own. Arguments of the two kernels below.
struct PerQueryNegatives {
  const void* rows = nullptr;       // (row_count, features): the operands
  const void* row_norms = nullptr;  // (row_count): their inverse norms, compute type; null: not normalized
  const void* negatives = nullptr;  // (row_count, count, features): of the operands' type, contiguous, as given
  int64_t row_stride = 0, row_count = 0, count = 0, features = 0;  // stride: elements from row to row of `rows`
  void* similarities = nullptr;                                    // (row_count, count): compute type
  void* inverse_norms = nullptr;  // (row_count, count): of the negatives, compute type; null: not normalized

  // per_query_gradients_kernel:
  const void* panel = nullptr;  // (panel_rows, count): gradient by the similarities / scale * extra, compute type
  int64_t panel_stride = 0, first = 0, panel_rows = 0;  // the panel's rows are rows `first` on
  void* total = nullptr;  // (panel_rows, features): in and out, gradient by the rows / scale * extra; may be null
  void* grad = nullptr;   // (row_count, count, features): out, gradient by the negatives; may be null
  const double *scale = nullptr, *extra = nullptr;  // one number each; extra null: 1
};

// Writes the similarities and, if rows are normalized, the negatives' inverse norms.
template <class T>
__global__ void __launch_bounds__(kWarp* kRowsOfBlock)
    per_query_similarities_kernel(const __grid_constant__ PerQueryNegatives p,
                                  int lanes) {  // of a warp per negative, a power of two
  using A = Compute<T>;
  const int64_t k = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes, i = k / p.count;
  const int lane = threadIdx.x % lanes;
  const bool valid = k < p.row_count * p.count;
  const T *x = static_cast<const T*>(p.rows) + i * p.row_stride,
          *y = static_cast<const T*>(p.negatives) + k * p.features;
  A product = 0;
  double squares = 0;
  for (int64_t d = lane; valid && d < p.features; d += lanes) {
    const A value = widen(y[d]);
    product += widen(x[d]) * value;
    squares += double(value) * double(value);
  }
  product = reduce_warp<Sum>(product, lanes);
  if (p.row_norms) squares = reduce_warp<Sum>(squares, lanes);
  if (!valid || lane != 0) return;
  if (p.row_norms) {
    const double norm = sqrt(squares);
    const A inverse = A(1 / (norm < kLeastNorm ? kLeastNorm : norm));
    product = product * static_cast<const A*>(p.row_norms)[i] * inverse;
    static_cast<A*>(p.inverse_norms)[k] = inverse;
  }
  static_cast<A*>(p.similarities)[k] = product;
}

template <class T>
cudaError_t per_query_similarities(const PerQueryNegatives& p, cudaStream_t stream) {
  const int64_t all = p.row_count * p.count;
  if (all == 0) return cudaSuccess;
  int lanes = 4;
  while (lanes < kWarp && 8 * lanes < p.features) lanes *= 2;  // about eight features per lane
  constexpr int kThreads = kWarp * kRowsOfBlock;
  Grid grid;
  grid.blocks = dim3(unsigned((all * lanes + kThreads - 1) / kThreads));
  grid.threads = kThreads;
  return launch(grid, stream, per_query_similarities_kernel<T>, p, lanes);
}

constexpr int kFeatureThreads = 128;  // per block, one feature each

// Writes the gradient by one row's negatives, and adds theirs to the row's. One thread per feature.
template <class T>
__global__ void __launch_bounds__(kFeatureThreads)
    per_query_gradients_kernel(const __grid_constant__ PerQueryNegatives p) {
  using A = Compute<T>;
  const int64_t blocks = (p.features + kFeatureThreads - 1) / kFeatureThreads;
  const int64_t r = blockIdx.x / blocks, i = p.first + r, d = blockIdx.x % blocks * kFeatureThreads + threadIdx.x;
  if (d >= p.features) return;
  const A x = widen(static_cast<const T*>(p.rows)[i * p.row_stride + d]);
  const A row_norm = p.row_norms ? static_cast<const A*>(p.row_norms)[i] : A(1);
  const A factor = A(p.extra ? *p.scale / *p.extra : *p.scale);
  const A* panel = static_cast<const A*>(p.panel) + r * p.panel_stride;
  double by_row = 0;
  for (int64_t m = 0; m < p.count; ++m) {
    const int64_t k = i * p.count + m;
    const A y = widen(static_cast<const T*>(p.negatives)[k * p.features + d]);
    const A inverse = p.row_norms ? static_cast<const A*>(p.inverse_norms)[k] : A(1);
    const A by_product = panel[m] * row_norm * inverse;
    by_row += double(by_product) * double(y);
    if (!p.grad) continue;
    A by_y = by_product * x;
    if (p.row_norms && inverse < A(1 / kLeastNorm))  // a norm below kLeastNorm does not vary
      by_y -= panel[m] * static_cast<const A*>(p.similarities)[k] * inverse * inverse * y;
    static_cast<T*>(p.grad)[k * p.features + d] = narrow<T>(by_y * factor);
  }
  if (p.total) static_cast<A*>(p.total)[r * p.features + d] += A(by_row);
}

template <class T>
cudaError_t per_query_gradients(const PerQueryNegatives& p, cudaStream_t stream) {
  const int64_t blocks = p.panel_rows * ((p.features + kFeatureThreads - 1) / kFeatureThreads);
  if (blocks == 0 || (!p.total && !p.grad)) return cudaSuccess;
  Grid grid;
  grid.blocks = dim3(unsigned(blocks));
  grid.threads = kFeatureThreads;
  return launch(grid, stream, per_query_gradients_kernel<T>, p);
}

}  // namespace tlk::contrastive
