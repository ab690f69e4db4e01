// The op scale_ on CUDA tensors: multiplies a gradient by an upstream value that stays on the device.
#include "scale.cuh"

#include <torch/library.h>

#include "dtype.h"
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
  with_type(values.scalar_type(), [&](auto type) {
    auto* const data = static_cast<typename decltype(type)::T*>(values.mutable_data_ptr());
    check_launch(scale(data, by, values.numel(), device.stream()), "scale_");
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(tlkernels, CUDA, m) { m.impl("scale_", scale_); }

}  // namespace tlk
