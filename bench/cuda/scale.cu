// The launcher that multiplies stored gradients by the upstream gradient, with C linkage and without torch.
#include "../../csrc/core/cuda/scale.cuh"

using namespace tlk;

extern "C" int tlk_scale(void* values, int scalar, const Factor* factor, int64_t n, cudaStream_t stream) {
  const auto run = [&](auto* typed) { return int(scale(typed, *factor, n, stream)); };
  switch (Scalar(scalar)) {
    case Scalar::f64:
      return run(static_cast<double*>(values));
    case Scalar::f32:
      return run(static_cast<float*>(values));
    case Scalar::bf16:
      return run(static_cast<bf16*>(values));
    case Scalar::f16:
      return run(static_cast<f16*>(values));
  }
  return int(cudaErrorInvalidValue);
}
