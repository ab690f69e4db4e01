// Every loss's table of kernels for the instruction set in use.
#pragma once
#include "../cross_entropy.h"
#include "../distillation.h"
#include "../info_nce.h"
#include "mse.h"
#include "sigmoid_contrastive.h"

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
