// The kernels for one instruction set; setup.py gives this file its own compiler flags.
#define TLK_ISA avx2
#include "../kernels.h"
#include "../cross_entropy.inl"

namespace tlk {
extern const Kernels kernels_avx2 = {avx2::cross_entropy};
}
