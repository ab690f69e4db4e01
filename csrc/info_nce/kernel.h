// One call of InfoNCE's kernels (nt_xent and sup_con are calls of them too): plain pointers and numbers.
#pragma once
#include <stdint.h>

#include "../core/tile.h"
#include "../core/types.h"

namespace tlk {

// What a row of logits, or in the other direction a column, has come to so far. The positive is kept apart where there
// is one, so that neither a small loss nor its gradient is a difference of large numbers.
struct Direction {
  double* peak = nullptr;      // the largest logit but the positive's
  double* sum = nullptr;       // of exp(logit - peak) over all but the positive
  double* moment = nullptr;    // the same sum with each term times its similarity, for the gradient of the scale
  double* positive = nullptr;  // the positive's similarity
  double* set_sum = nullptr;   // of similarities over the set that InfoNce::set says
  double* set_count = nullptr;
};
constexpr int64_t kStatistics = 6;

// The gradient by the logits: factor * exp(logit - top), less `share` in the set; `positive` at the positive. Compute
// type.
struct Slope {
  const void* top = nullptr;
  const void* factor = nullptr;
  const void* share = nullptr;
  const void* positive = nullptr;
};
constexpr int64_t kSlopes = 4;

// Entries of a row whose similarities are summed: for label smoothing all that take part but the positive, for sup_con
// those of the row's label.
enum class Set { none, all, label };

struct InfoNce {
  double scale = 1;
  Set set = Set::none;

  const int64_t* target = nullptr;   // the positive's column of each row; null with Set::label
  const void* row_ids = nullptr;     // int32 where the compute type is float, else int64: an entry of equal ids
  const void* column_ids = nullptr;  // has the row's label, or without Set::label takes no part. May be null.
  const bool* mask = nullptr;        // entries that take no part, with this many elements from row to row. May be null.
  int64_t mask_stride = 0;
  bool mask_has_negatives = false;  // else it covers the keys alone
  int64_t own = -1;                 // the column of row 0 itself, which takes no part, and so on; -1: none

  Direction rows, columns;
  bool reads_positive = true;  // from the tile; else `positive` is known

  Slope row_slope, column_slope;
};

// [begin, end) are rows or columns of the tile.
using InfoNceKernel = void (*)(const InfoNce&, const Tile&, int64_t begin, int64_t end);

constexpr double kLeastNorm = 1e-12;  // F.normalize's eps

struct InfoNceKernels {
  InfoNceKernel row_statistics;     // of similarities. Marks what takes no part in the tile.
  InfoNceKernel column_statistics;  // after row_statistics, of the same tile
  InfoNceKernel gradient;           // puts the gradient by the logits in the place of similarities
  // u = x / max(norm, kLeastNorm) over rows of `size` elements
  void (*normalize)(const void* x, void* u, double* norm, int64_t size, int64_t begin, int64_t end);
  // turns the gradient by u into that by x, in its place
  void (*normalize_backward)(void* grad, const void* u, const double* norm, int64_t size, int64_t begin, int64_t end);
};

// `features` is the type of the embeddings.
using InfoNceTable = InfoNceKernels(Scalar features, Set set);

}  // namespace tlk
