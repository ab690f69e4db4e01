// Rows of embeddings: brought to a size that products do not feel, and the way back for their gradients.
#pragma once
#include "kernel.h"
#include "../core/cuda/math.cuh"
#include "../core/cuda/reduce.cuh"

namespace tlk::contrastive {

constexpr int kRowsOfBlock = 4;  // a warp each

inline Grid grid_of_warps(int64_t rows) {
  Grid grid;
  grid.blocks = dim3(unsigned((rows + kRowsOfBlock - 1) / kRowsOfBlock));
  grid.threads = kWarp * kRowsOfBlock;
  return grid;
}

struct ScaledRows {
  const void* x = nullptr;  // contiguous within a row
  void* out = nullptr;      // the same type, `out_stride` elements, with zeros as padding
  void* norms = nullptr;    // (3, rows) of the compute type, see scale_rows
  int64_t rows = 0, features = 0, stride = 0, out_stride = 0;
};

// Writes rows divided by the power of two below their 2-norm, which rounds nothing. Three norms for each: the inverse
// norm of what was written (or of the kLeastNorm that stands for a smaller one); its square, or 0 where the norm was
// smaller and so does not vary; and the inverse of the power of two.
template <class T>
__global__ void __launch_bounds__(kWarp* kRowsOfBlock) scale_rows_kernel(const __grid_constant__ ScaledRows p) {
  using A = Compute<T>;
  const int64_t i = int64_t(blockIdx.x) * kRowsOfBlock + threadIdx.x / kWarp;
  if (i >= p.rows) return;
  const int lane = threadIdx.x % kWarp;
  const T* x = static_cast<const T*>(p.x) + i * p.stride;
  double squares = 0;  // an error of a row's norm would be an error of all its similarities alike
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

struct FinishedRows {
  const void* total = nullptr;  // (rows, features) of the compute type: the gradient by rows as they were multiplied
  const void* x = nullptr;      // those rows, from `first` on
  const void* norms = nullptr;  // of all rows; may be null
  void* grad = nullptr;         // (all rows, features) of the operands' type; may be total's memory
  const double *scale = nullptr, *extra = nullptr;  // the gradient is the total times scale / extra
  int64_t first = 0, rows = 0, features = 0, all_rows = 0, total_stride = 0, x_stride = 0;
};

// Writes the gradient by rows as they were given.
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
  if (p.norms) {  // less the part along the row, whose norm does not matter
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

// A row's own negatives: (rows, count, features), contiguous.
struct OwnNegatives {
  const void *rows = nullptr, *row_norms = nullptr;  // operands, and their inverse norms or null
  const void* negatives = nullptr;                   // of the operands' type, as they were given
  int64_t row_stride = 0, row_count = 0, count = 0, features = 0;
  void *similarities = nullptr, *inverse_norms = nullptr;  // (rows, count) of the compute type; norms null without

  const void* panel = nullptr;  // the gradient by the products, over the scale, of rows from `first` on
  int64_t panel_stride = 0, first = 0, panel_rows = 0;
  void* total = nullptr;  // (rows of the panel, features): the gradient by the rows, added to; may be null
  void* grad = nullptr;   // by the negatives; may be null
  const double *scale = nullptr, *extra = nullptr;
};

// `lanes` of a warp have one negative.
template <class T>
__global__ void __launch_bounds__(kWarp* kRowsOfBlock)
    own_similarities_kernel(const __grid_constant__ OwnNegatives p, int lanes) {
  using A = Compute<T>;
  const int64_t k = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes, i = k / p.count;
  const int lane = threadIdx.x % lanes;
  const bool there = k < p.row_count * p.count;
  const T *x = static_cast<const T*>(p.rows) + i * p.row_stride,
          *y = static_cast<const T*>(p.negatives) + k * p.features;
  A product = 0;
  double squares = 0;
  for (int64_t d = lane; there && d < p.features; d += lanes) {
    const A value = widen(y[d]);
    product += widen(x[d]) * value;
    squares += double(value) * double(value);
  }
  product = reduce_warp<Sum>(product, lanes);
  if (p.row_norms) squares = reduce_warp<Sum>(squares, lanes);
  if (!there || lane != 0) return;
  if (p.row_norms) {
    const double norm = sqrt(squares);
    const A inverse = A(1 / (norm < kLeastNorm ? kLeastNorm : norm));
    product = product * static_cast<const A*>(p.row_norms)[i] * inverse;
    static_cast<A*>(p.inverse_norms)[k] = inverse;
  }
  static_cast<A*>(p.similarities)[k] = product;
}

template <class T>
cudaError_t own_similarities(const OwnNegatives& p, cudaStream_t stream) {
  const int64_t all = p.row_count * p.count;
  if (all == 0) return cudaSuccess;
  int lanes = 4;
  while (lanes < kWarp && 8 * lanes < p.features) lanes *= 2;  // some eight features each
  constexpr int kThreads = kWarp * kRowsOfBlock;
  Grid grid;
  grid.blocks = dim3(unsigned((all * lanes + kThreads - 1) / kThreads));
  grid.threads = kThreads;
  return launch(grid, stream, own_similarities_kernel<T>, p, lanes);
}

constexpr int kOwnFeatures = 128;  // of a block

// The gradients of one row's negatives, and of the row by them, a feature each thread.
template <class T>
__global__ void __launch_bounds__(kOwnFeatures) own_gradients_kernel(const __grid_constant__ OwnNegatives p) {
  using A = Compute<T>;
  const int64_t blocks = (p.features + kOwnFeatures - 1) / kOwnFeatures;
  const int64_t r = blockIdx.x / blocks, i = p.first + r, d = blockIdx.x % blocks * kOwnFeatures + threadIdx.x;
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
cudaError_t own_gradients(const OwnNegatives& p, cudaStream_t stream) {
  const int64_t blocks = p.panel_rows * ((p.features + kOwnFeatures - 1) / kOwnFeatures);
  if (blocks == 0 || (!p.total && !p.grad)) return cudaSuccess;
  Grid grid;
  grid.blocks = dim3(unsigned(blocks));
  grid.threads = kOwnFeatures;
  return launch(grid, stream, own_gradients_kernel<T>, p);
}

}  // namespace tlk::contrastive
