// How many rows of logits a loss of features and weights holds at once.
#pragma once
#include <stdint.h>

namespace tlk {

// Every chunk reads and writes the whole gradient of the weights, classes x depth: beside its GEMM of
// 2 * rows * classes * depth operations that is 4 * (operations per byte of memory traffic) / rows of its time, for
// some 10 operations per byte 8 % at 512 rows and 30 % at 128. So a chunk takes as many rows as its memory allows. That
// is not the cache's: V logits of a row are larger than its share of any cache, and the GEMMs stream.
constexpr int64_t kChunkBytes = int64_t(128) << 20;  // for all logits of the chunk together
constexpr int64_t kLeastChunk = 64;                  // rows: below this the GEMMs themselves become slow

// `row_bytes` are those of all logits of one row. Chunks are of equal size but for the last.
inline int64_t rows_per_chunk(int64_t rows, int64_t row_bytes) {
  const int64_t fitting = kChunkBytes / (row_bytes > 0 ? row_bytes : 1);
  const int64_t most = fitting > kLeastChunk ? fitting : kLeastChunk;
  const int64_t chunks = (rows + most - 1) / most;
  if (chunks <= 1) return rows;
  return ((rows + chunks - 1) / chunks + 15) / 16 * 16;  // whole tiles of the GEMMs
}

}  // namespace tlk
