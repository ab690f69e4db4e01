#include "../core/cuda/linear_sweep.h"
#include "../cross_entropy/cuda_call.h"
#include "../selective_log_softmax/cuda_call.h"
#include "ops.h"

TORCH_LIBRARY_IMPL(tlkernels, CUDA, m) {
  tlk::LinearSelectiveLogSoftmaxOps<tlk::CudaCrossEntropyCall, tlk::CudaLinearSweep, tlk::CudaSelective>::implement(m);
}
