// What the CPU ops share: memory for results, positions of a tensor, deterministic sums.
#pragma once
#include <ATen/ATen.h>

#include <initializer_list>

#include "../call.h"
#include "kernels.h"

namespace tlk {

// Uninitialised, of the sizes and (where they are dense) strides of `like`; a large one in pooled memory (pool.h).
at::Tensor empty_gradient(const at::Tensor& like);

// The same, contiguous.
at::Tensor empty_gradient(at::IntArrayRef sizes, const at::TensorOptions& options);

// The same bits at any number of threads.
double sum_in_order(const at::Tensor& values);

// The sum over `denominator`, 0-d. The memory is written directly, since filling a tensor is dear in a small call.
at::Tensor sum_over(const at::Tensor& values, double denominator);

}  // namespace tlk
