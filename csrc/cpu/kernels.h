// Every loss's table of kernels for the instruction set in use.
#pragma once
#include "cross_entropy.h"
#include "distillation.h"

namespace tlk {

struct Kernels {
  CrossEntropyTable* cross_entropy;
  DistillationTable* distillation;
};

const Kernels& kernels();

}  // namespace tlk
