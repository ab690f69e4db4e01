// The launcher of distillation, with C linkage and without torch.
#include "../../csrc/distillation/cuda.cuh"

extern "C" int tlk_distillation(const tlk::DistillationOnDevice* call, int logits, cudaStream_t stream) {
  return int(tlk::distillation(*call, tlk::Scalar(logits), stream));
}
