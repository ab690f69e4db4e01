// A gradient times the upstream value that it was computed without, on CUDA tensors.
#include "scale.cuh"

#include <torch/library.h>

#include "tensor.h"

namespace tlk {
namespace {

void scale_(at::Tensor& values, const at::Tensor& factor) {
  TORCH_CHECK_VALUE(values.is_non_overlapping_and_dense(), "values: expected dense memory, got strides ",
                    values.strides());
  TORCH_CHECK_VALUE(factor.numel() == 1, "factor: expected one number, got shape ", factor.sizes());
  TORCH_CHECK_VALUE(factor.device() == values.device(), "factor: expected a tensor on ", values.device(),
                    ", got one on ", factor.device());
  const OnDevice device(values);
  const Factor by{factor.const_data_ptr(), scalar_of(factor.scalar_type())};
  const auto run = [&](auto* data) { check_launch(scale(data, by, values.numel(), device.stream()), "scale_"); };
  void* const data = values.mutable_data_ptr();
  switch (scalar_of(values.scalar_type())) {
    case Scalar::f64:
      return run(static_cast<double*>(data));
    case Scalar::f32:
      return run(static_cast<float*>(data));
    case Scalar::bf16:
      return run(static_cast<bf16*>(data));
    case Scalar::f16:
      return run(static_cast<f16*>(data));
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(tlkernels, CUDA, m) { m.impl("scale_", scale_); }

}  // namespace tlk
