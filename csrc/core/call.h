// What the calls of every loss's ops share, on every device.
#pragma once
#include <ATen/ATen.h>

#include "types.h"

namespace tlk {

// While an op runs that uses torch's own: products are in the type that the op says whatever autocast does, and
// autograd is attached in Python.
struct Guards {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{
      c10::DispatchKeySet({c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA})};
};

// The type that `dtype` is computed in.
inline at::ScalarType compute_type(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

Scalar scalar_of(at::ScalarType dtype);

// One value for all positions where `values` is expanded from one, else one each. The tensor kept must outlive the
// call.
PerPosition per_position(at::Tensor& values);

}  // namespace tlk
