// What the CPU ops share: memory for results, positions of a tensor, deterministic sums.
#pragma once
#include <ATen/ATen.h>

#include <initializer_list>

#include "kernels.h"

namespace tlk {

// While an op runs that uses torch's own: products are in the type that the op says whatever autocast does, and
// autograd is attached in Python.
struct Guards {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKeySet(c10::DispatchKey::AutocastCPU)};
};

// The type that `dtype` is computed in.
inline at::ScalarType compute_type(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

Scalar scalar_of(at::ScalarType dtype);

// Uninitialised, of the sizes and (where they are dense) strides of `like`; a large one in pooled memory (pool.h).
at::Tensor empty_gradient(const at::Tensor& like);

// The same, contiguous.
at::Tensor empty_gradient(at::IntArrayRef sizes, const at::TensorOptions& options);

// The same bits at any number of threads.
double sum_in_order(const at::Tensor& values);

// The sum over `denominator`, 0-d. The memory is written directly, since filling a tensor is dear in a small call.
at::Tensor sum_over(const at::Tensor& values, double denominator);

// One value for all positions where `values` is expanded from one, else one each. The tensor kept must outlive the
// call.
PerPosition per_position(at::Tensor& values);

}  // namespace tlk
