// Every loss's kernels for one instruction set, and the table in use.
#pragma once
#include "cross_entropy.h"

namespace tlk {

struct Kernels {
  CrossEntropyTable cross_entropy;
};

const Kernels& kernels();

}  // namespace tlk
