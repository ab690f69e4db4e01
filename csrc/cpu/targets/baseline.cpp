// The kernels for one instruction set; setup.py gives this file its own compiler flags.
#define TLK_ISA baseline
#include "../kernels.h"
#include "../cross_entropy.inl"

namespace tlk {
extern const Kernels kernels_baseline = {baseline::cross_entropy};
}
