// Distillation on CUDA tensors: the launch of its kernel.
#include "cuda.cuh"

#include "cuda_call.h"
#include "ops.h"

namespace tlk {

CudaDistillationCall::CudaDistillationCall(c10::Device device, at::ScalarType dtype_, at::IntArrayRef logits,
                                           const DistillationOptions& given)
    : DistillationCall(device, dtype_, logits, given), device_(device) {
  if (target) check_classes(targets, classes, ignore_index);
}

void CudaDistillationCall::use_mean() {
  if (target)
    reduction_.count(targets, ignore_index, classes, nullptr, compute, device_.stream());
  else
    reduction_.factor = 1 / double(rows);
}

void CudaDistillationCall::launch(const Distillation& part) const {
  const DistillationOnDevice call{part, reduction_.factor, reduction_.divisor_data()};
  check_launch(distillation(call, scalar_of(dtype), device_.stream()), "distillation");
}

TORCH_LIBRARY_IMPL(tlkernels, CUDA, m) { DistillationOps<CudaDistillationCall>::implement(m); }

}  // namespace tlk
