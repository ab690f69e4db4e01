#include "../core/cpu/linear_sweep.h"
#include "../cross_entropy/cpu_call.h"
#include "ops.h"

TORCH_LIBRARY_IMPL(tlkernels, CPU, m) {
  tlk::LinearCrossEntropyOps<tlk::CpuCrossEntropyCall, tlk::CpuLinearSweep>::implement(m);
}
