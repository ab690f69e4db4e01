#include "../core/cpu/linear_sweep.h"
#include "../cross_entropy/cpu_call.h"
#include "../selective_log_softmax/cpu_call.h"
#include "ops.h"

TORCH_LIBRARY_IMPL(tlkernels, CPU, m) {
  tlk::LinearSelectiveLogSoftmaxOps<tlk::CpuCrossEntropyCall, tlk::CpuLinearSweep, tlk::CpuSelective>::implement(m);
}
