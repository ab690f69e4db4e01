#include "../core/cuda/linear_sweep.h"
#include "../cross_entropy/cuda_call.h"
#include "ops.h"

TORCH_LIBRARY_IMPL(tlkernels, CUDA, m) {
  tlk::LinearCrossEntropyOps<tlk::CudaCrossEntropyCall, tlk::CudaLinearSweep>::implement(m);
}
