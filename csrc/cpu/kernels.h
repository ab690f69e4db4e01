// Every loss's table of kernels for the instruction set in use.
#pragma once
#include "cross_entropy.h"

namespace tlk {

struct Kernels {
  CrossEntropyTable* cross_entropy;
};

const Kernels& kernels();

}  // namespace tlk
