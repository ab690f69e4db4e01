// Every loss's table of kernels for the instruction set in use.
#pragma once
#include "cross_entropy.h"
#include "info_nce.h"
#include "sigmoid_contrastive.h"

namespace tlk {

struct Kernels {
  CrossEntropyTable* cross_entropy;
  InfoNceTable* info_nce;
  SigmoidContrastiveTable* sigmoid_contrastive;
};

const Kernels& kernels();

}  // namespace tlk
