// Tiles of the matrix of similarities between embeddings. A block has one tile in registers, distributed over its
// threads as mma.m16n8k16 distributes its sums; a loss's kernel works on it there.
//
// `Products` multiplies 16-bit operands. `Known` reads similarities: those of a row's per-query negatives, and float32
// and float64 ones from a panel that cuBLAS has multiplied, which also respects the user's choice of TF32.
#pragma once
#include "math.cuh"

namespace tlk::contrastive {

// A panel (rows first_row to end_row - 1) of the similarities with one part of the columns. Row indices are the
// matrix's; column indices count from the part's first column.
struct SimilarityTiles {
  const void* rows = nullptr;     // Products: (all rows, features), 16-bit, aligned to 16 bytes
  const void* columns = nullptr;  // Products: (column_count, features), as rows
  const void* known = nullptr;    // Known: (end_row - first_row, column_count), the similarities, compute type
  int64_t row_stride = 0, column_stride = 0, known_stride = 0;  // elements from row to row of the three
  int features = 0;                                             // a multiple of 8
  int first_row = 0, end_row = 0;
  int column_count = 0;
  // (all rows) and (column_count): factors of the products, compute type; both null: none
  const void *row_norms = nullptr, *column_norms = nullptr;
};

// A block's tile: its size, and the grid of warps that divides it.
template <class A_, int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_>
struct Shape {
  using A = A_;
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kThreads = 32 * kWarpRows * kWarpColumns;
  static constexpr int kM = kRows / kWarpRows / 16, kN = kColumns / kWarpColumns / 8;  // mma instructions per warp
};

// A thread's entries of the tile. For each mma instruction: two neighbouring columns of two rows, 8 apart.
template <class S>
struct Fragment {
  using A = typename S::A;
  A x[S::kM][S::kN][4];

  TLK_DEVICE A& at(int row, int column) { return x[row / 2][column / 2][row % 2 * 2 + column % 2]; }
};

// The rows and columns of a thread's entries: Fragment::at(r, c) is entry (row(r), column(c)) of the tile.
template <class S>
struct Layout {
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
  const Layout<S> layout;
  const A *by_row = static_cast<const A*>(t.row_norms), *by_column = static_cast<const A*>(t.column_norms);
#pragma unroll
  for (int r = 0; r < layout.kRows; ++r) {
    const int i = first_row + layout.row(r);
    const A norm = i < t.end_row ? by_row[i] : A(0);
#pragma unroll
    for (int c = 0; c < layout.kColumns; ++c) {
      const int j = first_column + layout.column(c);
      // the product of the norms first, so that a symmetric matrix is rounded symmetrically
      x.at(r, c) *= norm * (j < t.column_count ? by_column[j] : A(0));
    }
  }
}

// Reads a tile of known similarities.
template <class S>
struct Known {
  using Tile = S;
  using Gradient = typename S::A;    // the type of the panel of gradients
  static constexpr int kBlocks = 1;  // per multiprocessor, at the least
  struct Memory {};

  static TLK_DEVICE void fill(Fragment<S>& x, Memory&, const SimilarityTiles& t, int first_row, int first_column) {
    using A = typename S::A;
    const Layout<S> layout;
#pragma unroll
    for (int r = 0; r < layout.kRows; ++r) {
      const int i = first_row + layout.row(r);
      const A* from = static_cast<const A*>(t.known) + int64_t(i - t.first_row) * t.known_stride;
#pragma unroll
      for (int c = 0; c < layout.kColumns; ++c) {
        const int j = first_column + layout.column(c);
        x.at(r, c) = i < t.end_row && j < t.column_count ? from[j] : A(0);
      }
    }
  }
};

// Multiplies a tile from operands of type T, 32 features per step; the operands of later steps are copied to shared
// memory while earlier steps multiply. The three stages of a 128 x 128 tile take 48 KiB, which needs no opt-in, and two
// blocks fit on a multiprocessor of sm_80 and later: 2 x 49 KiB of 100 KiB on sm_86, sm_89 and sm_120.
template <class T, class S>
struct Products {
  using Tile = S;
  using Gradient = T;
  static constexpr int kBlocks = 512 / S::kThreads;  // per multiprocessor: up to 128 registers a thread
  static constexpr int kStages = 3, kDepth = 32;
  static constexpr int kChunk = 8, kChunks = kDepth / kChunk;  // elements of a 16-byte chunk; chunks of a row per step

  struct alignas(16) Chunk {
    uint32_t words[4];
  };
  struct Memory {
    Chunk stages[kStages][(S::kRows + S::kColumns) * kChunks];  // rows, then columns
  };

  // The slot of a row's chunk in a stage: chunks of the same index of eight rows are in different banks.
  static TLK_DEVICE int slot(int row, int chunk) { return row * kChunks + (chunk ^ (row / 2 % kChunks)); }

  // Starts the copies for a step; rows, columns and features out of range are zeros.
  static TLK_DEVICE void fetch(Chunk* stage, const SimilarityTiles& t, int first_row, int first_column, int step) {
    const T *rows = static_cast<const T*>(t.rows), *columns = static_cast<const T*>(t.columns);
#pragma unroll
    for (int k = threadIdx.x; k < (S::kRows + S::kColumns) * kChunks; k += S::kThreads) {
      const int r = k / kChunks, chunk = k % kChunks, feature = step * kDepth + chunk * kChunk;
      const bool is_row = r < S::kRows;
      const int i = is_row ? first_row + r : first_column + r - S::kRows;
      const bool valid = i < (is_row ? t.end_row : t.column_count) && feature < t.features;
      const T* from = is_row ? rows : columns;
      if (valid) from += int64_t(i) * (is_row ? t.row_stride : t.column_stride) + feature;
      cp_async_16(stage + slot(r, chunk), from, valid);
    }
  }

  static TLK_DEVICE void multiply(Fragment<S>& x, const Chunk* stage) {
    const Layout<S> layout;
    const Chunk* columns = stage + S::kRows * kChunks;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += 2) {
      uint32_t a[S::kM][4], b[S::kN / 2][4];
#pragma unroll
      for (int m = 0; m < S::kM; ++m) {  // rows 0-7 and 8-15 of 8 features, then of the next 8
        const int row = (layout.warp_row * S::kM + m) * 16 + layout.lane % 16;
        ldmatrix_x4(a[m], stage + slot(row, chunk + layout.lane / 16));
      }
#pragma unroll
      for (int n = 0; n < S::kN / 2; ++n) {  // columns 0-7 of 8 features and of the next 8, then columns 8-15
        const int column = (layout.warp_column * S::kN / 2 + n) * 16 + layout.lane / 16 * 8 + layout.lane % 8;
        ldmatrix_x4(b[n], columns + slot(column, chunk + layout.lane / 8 % 2));
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
      __syncthreads();  // the step's operands have arrived, and no thread reads the stage that is filled next
      const int next = step + kStages - 1;
      if (next < steps) fetch(memory.stages[next % kStages], t, first_row, first_column, next);
      cp_async_commit();
      multiply(x, memory.stages[step % kStages]);
    }
    cp_async_wait<0>();
    __syncthreads();  // the caller may reuse the memory
  }
};

}  // namespace tlk::contrastive
