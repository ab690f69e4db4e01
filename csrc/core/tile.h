// A tile of the matrix of similarities <query_i, key_j>: plain pointers and numbers, for the kernels.
#pragma once
#include <stdint.h>

namespace tlk {

struct Tile {
  void* c = nullptr;  // rows x columns of the compute type, `stride` elements from row to row
  int64_t stride = 0;
  int64_t row = 0, rows = 0;        // of the matrix
  int64_t column = 0, columns = 0;  // of the matrix
  bool keys = true;                 // the columns are keys; if not, further negatives
  bool both = false;                // the columns have a loss of their own, over the rows
};

}  // namespace tlk
