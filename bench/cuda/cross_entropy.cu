// The launchers of cross entropy and of the sums of losses, with C linkage and without torch.
#include "../../csrc/cross_entropy/cuda.cuh"
#include "../../csrc/core/cuda/sum.cuh"

using namespace tlk;

extern "C" int tlk_cross_entropy(const CrossEntropyOnDevice* call, int logits, cudaStream_t stream) {
  switch (Scalar(logits)) {
    case Scalar::f64:
      return int(cross_entropy<double>(*call, stream));
    case Scalar::f32:
      return int(cross_entropy<float>(*call, stream));
    case Scalar::bf16:
      return int(cross_entropy<bf16>(*call, stream));
    case Scalar::f16:
      return int(cross_entropy<f16>(*call, stream));
  }
  return int(cudaErrorInvalidValue);
}

extern "C" int tlk_sum_float(const float* values, int64_t n, double factor, const double* divisor, float* out,
                             double* parts, cudaStream_t stream) {
  return int(sum(Values<float>{values}, n, factor, divisor, out, parts, stream));
}
extern "C" int tlk_sum_double(const double* values, int64_t n, double factor, const double* divisor, double* out,
                              double* parts, cudaStream_t stream) {
  return int(sum(Values<double>{values}, n, factor, divisor, out, parts, stream));
}
extern "C" int tlk_count_float(const int64_t* target, int64_t n, int64_t ignore_index, int64_t classes,
                               const float* weight, double* out, double* parts, cudaStream_t stream) {
  return int(sum(Counted<float>{target, ignore_index, classes, weight}, n, 1.0, nullptr, out, parts, stream));
}
extern "C" int tlk_count_double(const int64_t* target, int64_t n, int64_t ignore_index, int64_t classes,
                                const double* weight, double* out, double* parts, cudaStream_t stream) {
  return int(sum(Counted<double>{target, ignore_index, classes, weight}, n, 1.0, nullptr, out, parts, stream));
}
