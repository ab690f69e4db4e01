// Arguments of InfoNCE's kernels, which nt_xent and sup_con call too. Without torch.
#pragma once
#include <stdint.h>

#include "../core/tile.h"
#include "../core/types.h"

namespace tlk {

// Running softmax statistics of each row of logits or, in the other direction, of each column. The positive, if there
// is one, is kept apart: neither a small loss nor its gradient is a difference of large numbers.
struct Direction {
  double* peak = nullptr;       // the largest logit but the positive's
  double* sum = nullptr;        // of exp(logit - peak) over all entries but the positive
  double* moment = nullptr;     // the same sum with each term times its similarity, for the gradient of the scale
  double* positive = nullptr;   // the positive's similarity
  double* set_sum = nullptr;    // sum of similarities over InfoNce::set
  double* set_count = nullptr;  // entries in that set
};
constexpr int64_t kStatistics = 6;

// The gradient by the logits is factor * exp(logit - top), minus `share` in the set, and `positive` at the positive.
// One number of the compute type per row or column.
struct Slope {
  const void* top = nullptr;
  const void* factor = nullptr;
  const void* share = nullptr;
  const void* positive = nullptr;
};
constexpr int64_t kSlopes = 4;

// The entries of a row whose similarities are summed. all: every entry of the softmax but the positive, for label
// smoothing; label: those of the row's label, for sup_con.
enum class Set { none, all, label };

struct InfoNce {
  double scale = 1;
  Set set = Set::none;

  const int64_t* target = nullptr;  // (rows): the positive's column; null with Set::label
  // (rows), (columns), int32 if the compute type is float, else int64. Entries of equal ids are in the set with
  // Set::label, else left out of the softmax. May be null.
  const void *row_ids = nullptr, *column_ids = nullptr;
  const bool* mask = nullptr;       // (rows, columns): True leaves the entry out of the softmax; may be null
  int64_t mask_stride = 0;          // elements from row to row
  bool mask_has_negatives = false;  // the mask covers the further negatives too, not only the keys
  int64_t self_column = -1;         // row i leaves out column i + self_column, its similarity to itself; -1: none

  Direction rows, columns;
  bool reads_positive = true;  // row_statistics writes Direction::positive; else it has been written

  Slope row_slope, column_slope;
};

// begin to end - 1 are rows or columns of the tile.
using InfoNceKernel = void (*)(const InfoNce&, const Tile&, int64_t begin, int64_t end);

constexpr double kLeastNorm = 1e-12;  // F.normalize's eps

struct InfoNceKernels {
  InfoNceKernel row_statistics;     // also marks the tile's entries that are left out
  InfoNceKernel column_statistics;  // after row_statistics of the same tile
  InfoNceKernel gradient;           // overwrites the similarities with the gradient by the logits
  // u = x / max(norm, kLeastNorm) over rows of `size` elements
  void (*normalize)(const void* x, void* u, double* norm, int64_t size, int64_t begin, int64_t end);
  // overwrites the gradient by u with the gradient by x
  void (*normalize_backward)(void* grad, const void* u, const double* norm, int64_t size, int64_t begin, int64_t end);
};

// `features` is the type of the embeddings.
using InfoNceTable = InfoNceKernels(Scalar features, Set set);

}  // namespace tlk
