#include "../core/cpu/linear_sweep.h"
#include "../distillation/cpu_call.h"
#include "ops.h"

TORCH_LIBRARY_IMPL(tlkernels, CPU, m) {
  tlk::LinearDistillationOps<tlk::CpuDistillationCall, tlk::CpuLinearSweep>::implement(m);
}
