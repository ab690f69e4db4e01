// A gradient times the upstream value that it was computed without, on CUDA tensors.
#include "scale.cuh"

#include <torch/library.h>

#include "tensor.h"

namespace tlk {
namespace {

template <class T>
void run(at::Tensor& values, const at::Tensor& factor, cudaStream_t stream) {
  const auto* by = static_cast<const Compute<T>*>(factor.const_data_ptr());
  check_launch(scale(static_cast<T*>(values.mutable_data_ptr()), by, values.numel(), stream), "scale_");
}

void scale_(at::Tensor& values, const at::Tensor& factor) {
  TORCH_CHECK_VALUE(values.is_non_overlapping_and_dense(), "values: expected dense memory, got strides ",
                    values.strides());
  TORCH_CHECK_VALUE(factor.numel() == 1, "factor: expected one number, got shape ", factor.sizes());
  const OnDevice device(values);
  const at::Tensor by = factor.to(compute_type(values.scalar_type()));
  switch (scalar_of(values.scalar_type())) {
    case Scalar::f64:
      return run<double>(values, by, device.stream());
    case Scalar::f32:
      return run<float>(values, by, device.stream());
    case Scalar::bf16:
      return run<bf16>(values, by, device.stream());
    case Scalar::f16:
      return run<f16>(values, by, device.stream());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(tlkernels, CUDA, m) { m.impl("scale_", scale_); }

}  // namespace tlk
