#include "../core/cuda/linear_sweep.h"
#include "../distillation/cuda_call.h"
#include "ops.h"

TORCH_LIBRARY_IMPL(tlkernels, CUDA, m) {
  tlk::LinearDistillationOps<tlk::CudaDistillationCall, tlk::CudaLinearSweep>::implement(m);
}
