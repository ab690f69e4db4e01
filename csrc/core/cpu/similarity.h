// The matrix of similarities of embeddings, tile by tile: it never exists whole.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "../tile.h"

namespace tlk {

// Some columns of the matrix: the keys, or further negatives. Tensors are contiguous and of the compute type.
struct Part {
  at::Tensor x;       // (columns, D), or (rows, columns, D): each row has its own
  at::Tensor grad;    // of x; accumulate() adds to it. Undefined where not needed
  int64_t first = 0;  // column of the matrix
  bool keys = true;

  int64_t columns() const { return x.size(-2); }
};

class Similarity {
 public:
  // `both`: the columns have a loss too. `paired`: the only part's x is `rows` itself. The matrix is then symmetric:
  // only the tiles from the diagonal on are visited, and those beyond it have Tile::both.
  Similarity(at::Tensor rows, std::vector<Part> parts, bool paired, bool both);

  at::Tensor rows;       // (N, D)
  at::Tensor rows_grad;  // of rows; accumulate() adds to it. Undefined where not needed. With `paired` also the part's
  std::vector<Part> parts;

  // Whether the whole matrix is one tile, which stays in memory from one sweep to the next.
  bool one_tile() const;

  // Calls visit(part, tile) for every tile, always in the same order.
  template <class Visit>
  void each_tile(Visit visit) {
    for (int64_t i = 0; i < rows.size(0); i += kTile)
      for (const Part& part : parts)
        for (int64_t j = paired_ ? i : 0; j < part.columns(); j += kTile) {
          Tile tile;
          tile.c = memory_.mutable_data_ptr();
          tile.stride = memory_.size(1);
          tile.row = i, tile.rows = std::min(kTile, rows.size(0) - i);
          tile.column = part.first + j, tile.columns = std::min(kTile, part.columns() - j);
          tile.keys = part.keys;
          tile.both = paired_ ? j > i : both_ && part.keys;
          visit(part, tile);
        }
  }

  // Fills a tile with the similarities.
  void product(const Part& part, const Tile& tile);

  // Adds to the gradients of the rows and of the part, where needed. The tile holds the gradient of the logits, which
  // are `scale` times the similarities.
  void accumulate(const Part& part, const Tile& tile, double scale);

 private:
  // Rows and columns of a tile. Measured (2 cores, 1 MB of second-level cache each, D = 384, float32): 256 takes
  // 1.14 times as long, 1024 and 2048 from 0.93 to 0.98 at 4 and 16 times the memory.
  static constexpr int64_t kTile = 512;
  // Elements between rows, so that a column does not fall into one set of the cache; 0.95 of the time without it.
  static constexpr int64_t kPadding = 16;

  at::Tensor view(const Tile& tile) const;

  bool paired_, both_;
  at::Tensor memory_;
};

// Calls body(begin, end) over parts of [0, n), on threads where there is work for them: `each` elements per item.
template <class Body>
void in_parallel(int64_t n, int64_t each, Body body) {
  constexpr int64_t kGrain = 1 << 14;  // elements for which a second thread is worth its start
  at::parallel_for(0, n, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, each)), body);
}

}  // namespace tlk
