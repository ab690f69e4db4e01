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

// Which rows of a layer are multiplied: those that count. The others get gradient 0 and add nothing to any gradient,
// whatever they hold. Each device's LinearSweep makes it, by `count`.
struct CountedRows {
  at::Tensor numbers;     // of the rows that are multiplied, int64, ascending; undefined: all
  at::Tensor absent;      // (numbers or rows, 1), True in rows that are multiplied but do not count; or undefined
  at::Tensor miscounted;  // 0-d: whether `num_valid` is wrong, where the host does not know it; or undefined

  int64_t of(const at::Tensor& rows) const { return numbers.defined() ? numbers.size(0) : rows.size(0); }

  // Rows `begin` to `end` of those that are multiplied.
  at::Tensor part(const at::Tensor& rows, int64_t begin, int64_t end) const;
  // All rows that are multiplied.
  at::Tensor kept(const at::Tensor& rows) const { return numbers.defined() ? rows.index_select(0, numbers) : rows; }
  // The opposite of `kept`: all of `rows` rows, with zeros in those that are not multiplied.
  at::Tensor spread(const at::Tensor& kept, int64_t rows) const;
};

// The logits of a layer in chunks of rows, so that they never exist whole, and the layer's gradients. Each device has a
// class of its own, CpuLinearSweep and CudaLinearSweep, with the same interface. For each chunk in turn, call
//   logits(begin, end)          the logits, in memory that the next chunk uses again
//   take(begin, end, gradient)  the gradient of these logits, where `differentiates`
// and afterwards `gradients`. `begin` and `end` count the rows that are multiplied. The matrix products are the
// library's.
class LinearSweep {
 public:
  int64_t chunk_rows() const { return chunk_rows_; }
  bool differentiates() const { return needs_[0] || needs_[1] || needs_[2]; }

  // In the shapes and dtypes of the layer's tensors; without elements where not needed.
  LinearGradients gradients() const;

 protected:
  LinearSweep(const LinearLayer& layer, const CountedRows& counted, LinearNeeds needs, int64_t chunk_rows)
      : layer_(layer), counted_(counted), needs_(needs), chunk_rows_(chunk_rows) {}

  // Memory for the gradient of these rows of the input, in this type, and afterwards its place among all rows.
  at::Tensor input_gradient(int64_t begin, int64_t end, at::ScalarType type);
  void put_input_gradient(int64_t begin, int64_t end, const at::Tensor& gradient);

  const LinearLayer& layer_;
  const CountedRows& counted_;
  const LinearNeeds needs_;
  const int64_t chunk_rows_;
  at::Tensor grad_input_, grad_weight_, grad_bias_;  // grad_weight_ and grad_bias_ may be in the compute type
};

}  // namespace tlk
