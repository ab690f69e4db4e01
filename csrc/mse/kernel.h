// One call of the squared-error kernel: plain pointers and numbers, no torch header, so that every instruction set's
// translation unit can include it.
#pragma once
#include <stdint.h>

#include "../core/types.h"

namespace tlk {

// Sums of so many elements each are part of the result: it has the same bits however the blocks are shared out.
constexpr int64_t kSquaredBlock = 4096;

struct Squared {
  int64_t size = 0;  // elements of every tensor, contiguous
  const void *x = nullptr, *t = nullptr;
  const void* weight = nullptr;  // may be null

  // Results; a null pointer is not written.
  double* sums = nullptr;                     // of weight * (x - t)^2, one per block
  void* values = nullptr;                     // of the same, compute type
  void *grad_x = nullptr, *grad_t = nullptr;  // 2 * grad * weight * (x - t), and its negative

  PerPosition grad;  // upstream, compute type, one for each element or one for all; null where no gradient is written
};

using SquaredBlocks = void (*)(const Squared&, int64_t first_block, int64_t last_block);
using SquaredTable = SquaredBlocks(Scalar type);

}  // namespace tlk
