// Every loss's table of kernels for the instruction set in use.
#pragma once
#include "cross_entropy.h"
#include "distillation.h"
#include "mse.h"

namespace tlk {

struct Kernels {
  CrossEntropyTable* cross_entropy;
  DistillationTable* distillation;
  SquaredTable* squared;
};

const Kernels& kernels();

}  // namespace tlk
