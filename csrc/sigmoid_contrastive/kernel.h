// One call of the kernel of SigLIP's loss: plain pointers and numbers.
#pragma once
#include "../core/tile.h"

namespace tlk {

struct SigmoidContrastive {
  double scale = 1, bias = 0;  // logit = scale * similarity + bias
  int64_t own = 0;             // the positive's column of row 0, and so on along the rows
  double factor = 0;           // of the gradient

  // One per row, added to.
  double* loss = nullptr;
  double* scale_grad = nullptr;
  double* bias_grad = nullptr;
};

// Rows [begin, end) of a tile. `step` also puts the gradient by the logits in the place of the similarities.
using SigmoidContrastiveKernel = void (*)(const SigmoidContrastive&, const Tile&, int64_t begin, int64_t end);

struct SigmoidContrastiveKernels {
  SigmoidContrastiveKernel loss, step;
};

using SigmoidContrastiveTable = SigmoidContrastiveKernels(bool wide);  // float64 or float32

}  // namespace tlk
