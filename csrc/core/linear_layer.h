// A linear layer as the losses on features take it, and the sweep over chunks of its rows, on every device.
#pragma once
#include <ATen/ATen.h>

#include <array>
#include <optional>

namespace tlk {

// A linear layer, checked.
struct LinearLayer {
  // Errors name the tensors `prefix` + "_input" (for the prefix "linear": "input"), "_weight", "_bias".
  LinearLayer(const char* prefix, const at::Tensor& input, const at::Tensor& weight,
              const std::optional<at::Tensor>& bias);

  at::Tensor input, weight, bias;  // (rows, features), (classes, features), (classes) or undefined
  c10::DimVector shape;            // of the rows, before they were flattened

  int64_t rows() const { return input.size(0); }
  int64_t classes() const { return weight.size(0); }
};

// The gradients of input, weight and bias that are needed.
using LinearNeeds = std::array<bool, 3>;
using LinearGradients = std::array<at::Tensor, 3>;

// The logits of a layer in chunks of rows, so that they never exist whole, and the layer's gradients. Each device has a
// class of its own, CpuLinearSweep and CudaLinearSweep, with the same interface. For each chunk in turn, call
//   logits(begin, end)          the logits, in memory that the next chunk uses again
//   take(begin, end, gradient)  the gradient of these logits, where `differentiates`
// and afterwards `gradients`. The matrix products are the library's.
class LinearSweep {
 public:
  int64_t chunk_rows() const { return chunk_rows_; }
  bool differentiates() const { return needs_[0] || needs_[1] || needs_[2]; }

  // In the shapes and dtypes of the layer's tensors; without elements where not needed.
  LinearGradients gradients() const;

 protected:
  LinearSweep(const LinearLayer& layer, LinearNeeds needs, int64_t chunk_rows)
      : layer_(layer), needs_(needs), chunk_rows_(chunk_rows) {}

  const LinearLayer& layer_;
  const LinearNeeds needs_;
  const int64_t chunk_rows_;
  at::Tensor grad_input_, grad_weight_, grad_bias_;  // grad_weight_ and grad_bias_ may be in the compute type
};

}  // namespace tlk
