// The sum or mean of the losses of a call, on the device: the host does not wait for the mean's divisor.
#pragma once
#include <ATen/ATen.h>
#include <cuda_runtime.h>

namespace tlk {

struct Reduction {
  double factor = 1;   // of the sum, and of the gradient
  at::Tensor divisor;  // of both, 0-d float64; undefined: 1

  const double* divisor_data() const { return divisor.defined() ? divisor.const_data_ptr<double>() : nullptr; }

  // Makes `divisor` the number of targets that are not ignored, or the sum of their classes' weights.
  // `weight`: of type `compute`, or null.
  void count(const at::Tensor& target, int64_t ignore_index, int64_t classes, const void* weight,
             at::ScalarType compute, cudaStream_t stream);

  // factor * the sum of the losses / divisor
  at::Tensor sum_of(const at::Tensor& losses, cudaStream_t stream) const;
};

}  // namespace tlk
