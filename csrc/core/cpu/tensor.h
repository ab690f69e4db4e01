// Shared by the CPU ops: memory for gradients, deterministic sums, the loss's kernels.
#pragma once
#include <ATen/ATen.h>

#include "../call.h"
#include "isa.h"

namespace tlk {

// Uninitialised, as at::empty_like(like); a large one is in pooled memory (pool.h).
at::Tensor empty_gradient(const at::Tensor& like);

// Uninitialised and contiguous; a large one is in pooled memory.
at::Tensor empty_gradient(at::IntArrayRef sizes, const at::TensorOptions& options);

// The sum in float64, in an order that does not depend on the number of threads.
double sum_in_order(const at::Tensor& values);

// The sum divided by `denominator`, 0-d. It is written directly: filling a tensor costs too much in a small call.
at::Tensor sum_over(const at::Tensor& values, double denominator);

}  // namespace tlk
