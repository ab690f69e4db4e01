// Arguments of the kernel of SigLIP's loss, without torch.
#pragma once
#include "../core/tile.h"

namespace tlk {

struct SigmoidContrastive {
  double scale = 1, bias = 0;   // logit = scale * similarity + bias
  int64_t positive_offset = 0;  // the positive of row i is column i + positive_offset
  double factor = 0;            // of the gradient: upstream / rows

  // (rows): each tile adds to them.
  double* loss = nullptr;
  double* scale_grad = nullptr;
  double* bias_grad = nullptr;
};

// Rows begin to end - 1 of a tile. `step` also overwrites the similarities with the gradient by the logits.
using SigmoidContrastiveKernel = void (*)(const SigmoidContrastive&, const Tile&, int64_t begin, int64_t end);

struct SigmoidContrastiveKernels {
  SigmoidContrastiveKernel loss, step;
};

using SigmoidContrastiveTable = SigmoidContrastiveKernels(bool wide);  // float64 or float32

}  // namespace tlk
