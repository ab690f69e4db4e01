// Every loss's table of kernels for the instruction set in use.
#pragma once
#include "../../cross_entropy/kernel.h"
#include "../../distillation/kernel.h"
#include "../../info_nce/kernel.h"
#include "../../mse/kernel.h"
#include "../../sigmoid_contrastive/kernel.h"

namespace tlk {

struct Kernels {
  CrossEntropyTable* cross_entropy;
  DistillationTable* distillation;
  InfoNceTable* info_nce;
  SigmoidContrastiveTable* sigmoid_contrastive;
  SquaredTable* squared;
};

const Kernels& kernels();

}  // namespace tlk
