// Arguments of the squared-error kernel. Without torch: every instruction set's translation unit includes this.
#pragma once
#include <stdint.h>

#include "../core/types.h"

namespace tlk {

// Elements per partial sum. The blocks are fixed, so the result has the same bits with any number of threads.
constexpr int64_t kSquaredBlock = 4096;

struct Squared {
  int64_t size = 0;  // elements of every tensor, contiguous
  const void *x = nullptr, *t = nullptr;
  const void* weight = nullptr;  // may be null

  // Results; null: not wanted.
  double* sums = nullptr;                     // (blocks): sums of weight * (x - t)^2
  void* values = nullptr;                     // (size): weight * (x - t)^2, compute type
  void *grad_x = nullptr, *grad_t = nullptr;  // 2 * grad * weight * (x - t), and its negative

  PerPosition grad;  // upstream gradient, compute type; null if no gradient is wanted
};

using SquaredBlocks = void (*)(const Squared&, int64_t first_block, int64_t last_block);
using SquaredTable = SquaredBlocks(Scalar type);

}  // namespace tlk
