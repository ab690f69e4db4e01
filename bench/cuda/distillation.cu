// The launcher of distillation for C, without torch.
#include "../../csrc/distillation/cuda.cuh"

extern "C" int tlk_distillation(const tlk::DistillationOnDevice* call, int logits, cudaStream_t stream) {
  return int(tlk::distillation(*call, tlk::Scalar(logits), stream));
}
