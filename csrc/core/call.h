// Shared by the ops of every loss, on every device.
#pragma once
#include <ATen/ATen.h>

#include "types.h"

namespace tlk {

// For an op that calls torch's ops: autocast does not change their types, and autograd does not record them, since
// Python attaches the loss's own rule.
struct Guards {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{
      c10::DispatchKeySet({c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA})};
};

// A loss's options as the arguments of its ops: torch reads an op's schema off the C++ types.
template <class... T>
struct Types {};

// The type that kernels compute in for tensors of type `dtype`.
inline at::ScalarType compute_type(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

Scalar scalar_of(at::ScalarType dtype);

// The values for a kernel: one for all positions where `values` is expanded from one, else one each. `values` may be
// replaced by a contiguous copy, and must outlive the call.
PerPosition per_position(at::Tensor& values);

// One number for all positions. A tensor would cost too much time in a small call.
class OneForAll {
 public:
  PerPosition set(double value, at::ScalarType compute) {
    double_ = value;
    float_ = float(value);
    return {compute == at::kDouble ? static_cast<const void*>(&double_) : &float_, 0};
  }

 private:
  double double_;
  float float_;
};

// `data`, which may be null, moved on by numbers of `bytes` each.
template <class T>
T* advanced(T* data, int64_t numbers, size_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data ? static_cast<T*>(static_cast<Byte*>(data) + numbers * int64_t(bytes)) : data;
}
inline PerPosition advanced(PerPosition values, int64_t positions, size_t bytes) {
  return {advanced(values.data, positions * values.stride, bytes), values.stride};
}

}  // namespace tlk
