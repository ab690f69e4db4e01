// Tiles of the matrix of similarities of embeddings. A block holds one in registers, spread over its threads as the
// tensor cores' instruction spreads its sums; the kernels of a loss go on from there.
//
// 16-bit operands are multiplied here (`Products`). Other similarities are read (`Known`): float32 and float64 ones
// from a panel that the library has multiplied, which also knows whether the user lets float32 go as TF32, and those of
// a row's own negatives.
#pragma once
#include "math.cuh"

namespace tlk::contrastive {

// Some rows of a part of the columns. Rows are numbered as the matrix has them, columns from the part's first.
struct SimilarityTiles {
  const void* rows = nullptr;     // operands: contiguous in 16 bytes, `features` a multiple of 8
  const void* columns = nullptr;  // operands
  const void* known = nullptr;    // or the similarities, of first_row and so on
  int64_t row_stride = 0, column_stride = 0, known_stride = 0;
  int features = 0;
  int first_row = 0, end_row = 0;
  int column_count = 0;
  const void *row_norms = nullptr,
             *column_norms = nullptr;  // factors of the products, of the compute type; may be null
};

// A block's tile, and how its warps divide it.
template <class A_, int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_>
struct Shape {
  using A = A_;
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kThreads = 32 * kWarpRows * kWarpColumns;
  static constexpr int kM = kRows / kWarpRows / 16, kN = kColumns / kWarpColumns / 8;  // instructions of a warp
};

// What a thread has of the tile: for each instruction two rows, 8 apart, of two neighbours.
template <class S>
struct Fragment {
  using A = typename S::A;
  A x[S::kM][S::kN][4];

  TLK_DEVICE A& at(int row, int column) { return x[row / 2][column / 2][row % 2 * 2 + column % 2]; }
};

// Where it is: each row and column that a thread has by its number there.
template <class S>
struct Place {
  static constexpr int kRows = 2 * S::kM, kColumns = 2 * S::kN;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 / S::kWarpColumns,
            warp_column = threadIdx.x / 32 % S::kWarpColumns;

  TLK_DEVICE int row(int k) const { return (warp_row * S::kM + k / 2) * 16 + k % 2 * 8 + lane / 4; }
  TLK_DEVICE int column(int k) const { return (warp_column * S::kN + k / 2) * 8 + lane % 4 * 2 + k % 2; }
};

template <class S>
TLK_DEVICE void multiply_norms(Fragment<S>& x, const SimilarityTiles& t, int first_row, int first_column) {
  using A = typename S::A;
  if (!t.row_norms) return;
  const Place<S> place;
  const A *by_row = static_cast<const A*>(t.row_norms), *by_column = static_cast<const A*>(t.column_norms);
#pragma unroll
  for (int r = 0; r < place.kRows; ++r) {
    const int i = first_row + place.row(r);
    const A norm = i < t.end_row ? by_row[i] : A(0);
#pragma unroll
    for (int c = 0; c < place.kColumns; ++c) {
      const int j = first_column + place.column(c);
      // the norms first, so that a symmetric matrix is rounded symmetrically
      x.at(r, c) *= norm * (j < t.column_count ? by_column[j] : A(0));
    }
  }
}

// Reads the tile.
template <class S>
struct Known {
  using Tile = S;
  using Panel = typename S::A;  // the type that gradients are written in
  static constexpr int kBlocks = 1;
  struct Memory {};

  static TLK_DEVICE void fill(Fragment<S>& x, Memory&, const SimilarityTiles& t, int first_row, int first_column) {
    using A = typename S::A;
    const Place<S> place;
#pragma unroll
    for (int r = 0; r < place.kRows; ++r) {
      const int i = first_row + place.row(r);
      const A* from = static_cast<const A*>(t.known) + int64_t(i - t.first_row) * t.known_stride;
#pragma unroll
      for (int c = 0; c < place.kColumns; ++c) {
        const int j = first_column + place.column(c);
        x.at(r, c) = i < t.end_row && j < t.column_count ? from[j] : A(0);
      }
    }
  }
};

// Multiplies the tile from operands of type T. A step takes 32 features; what it needs comes to shared memory while the
// steps before it multiply. Three stages of a 128 x 128 tile are 48 KiB, as much as a block gets without asking, and
// two blocks fit into a multiprocessor of sm_80 and later, 2 x 49 KiB of the 100 of sm_86, sm_89 and sm_120 among them.
template <class T, class S>
struct Products {
  using Tile = S;
  using Panel = T;
  static constexpr int kBlocks = 512 / S::kThreads;  // of a multiprocessor: up to 128 registers a thread
  static constexpr int kStages = 3, kDepth = 32;
  static constexpr int kChunk = 8, kChunks = kDepth / kChunk;  // elements of 16 bytes; chunks of a row

  struct alignas(16) Chunk {
    uint32_t words[4];
  };
  struct Memory {
    Chunk stages[kStages][(S::kRows + S::kColumns) * kChunks];  // rows, then columns
  };

  // Where a chunk of a row lies: eight rows' chunks of one number are in different banks.
  static TLK_DEVICE int slot(int row, int chunk) { return row * kChunks + (chunk ^ (row / 2 % kChunks)); }

  // Begins to copy what step `step` needs; zeros stand for what is not there.
  static TLK_DEVICE void fetch(Chunk* stage, const SimilarityTiles& t, int first_row, int first_column, int step) {
    const T *rows = static_cast<const T*>(t.rows), *columns = static_cast<const T*>(t.columns);
#pragma unroll
    for (int k = threadIdx.x; k < (S::kRows + S::kColumns) * kChunks; k += S::kThreads) {
      const int r = k / kChunks, chunk = k % kChunks, feature = step * kDepth + chunk * kChunk;
      const bool of_rows = r < S::kRows;
      const int i = of_rows ? first_row + r : first_column + r - S::kRows;
      const bool there = i < (of_rows ? t.end_row : t.column_count) && feature < t.features;
      const T* from = of_rows ? rows : columns;
      if (there) from += int64_t(i) * (of_rows ? t.row_stride : t.column_stride) + feature;
      cp_async_16(stage + slot(r, chunk), from, there);
    }
  }

  static TLK_DEVICE void multiply(Fragment<S>& x, const Chunk* stage) {
    const Place<S> place;
    const Chunk* columns = stage + S::kRows * kChunks;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += 2) {
      uint32_t a[S::kM][4], b[S::kN / 2][4];
#pragma unroll
      for (int m = 0; m < S::kM; ++m) {  // rows 0-7 and 8-15 of 8 features, then of the next 8
        const int row = (place.warp_row * S::kM + m) * 16 + place.lane % 16;
        ldmatrix_x4(a[m], stage + slot(row, chunk + place.lane / 16));
      }
#pragma unroll
      for (int n = 0; n < S::kN / 2; ++n) {  // columns 0-7 of 8 features and of the next 8, then columns 8-15
        const int column = (place.warp_column * S::kN / 2 + n) * 16 + place.lane / 16 * 8 + place.lane % 8;
        ldmatrix_x4(b[n], columns + slot(column, chunk + place.lane / 8 % 2));
      }
#pragma unroll
      for (int m = 0; m < S::kM; ++m)
#pragma unroll
        for (int n = 0; n < S::kN; ++n) mma_16x8x16<T>(x.x[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }

  static TLK_DEVICE void fill(Fragment<S>& x, Memory& memory, const SimilarityTiles& t, int first_row,
                              int first_column) {
#pragma unroll
    for (int m = 0; m < S::kM; ++m)
#pragma unroll
      for (int n = 0; n < S::kN; ++n)
#pragma unroll
        for (float& sum : x.x[m][n]) sum = 0;
    const int steps = (t.features + kDepth - 1) / kDepth;
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) fetch(memory.stages[step], t, first_row, first_column, step);
      cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the step's operands are here, and all have done with the stage that is filled next
      const int next = step + kStages - 1;
      if (next < steps) fetch(memory.stages[next % kStages], t, first_row, first_column, next);
      cp_async_commit();
      multiply(x, memory.stages[step % kStages]);
    }
    cp_async_wait<0>();
    __syncthreads();  // the memory may be used for something else
  }
};

}  // namespace tlk::contrastive
