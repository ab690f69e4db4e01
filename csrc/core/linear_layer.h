// A linear layer as the losses on its features take it, on every device.
#pragma once
#include <ATen/ATen.h>

#include <optional>

namespace tlk {

// A linear layer, checked.
struct LinearLayer {
  // Errors name the tensors `prefix` + "_input" (for the prefix "linear": "input"), "_weight", "_bias".
  LinearLayer(const char* prefix, const at::Tensor& input, const at::Tensor& weight,
              const std::optional<at::Tensor>& bias);

  at::Tensor input, weight, bias;  // (rows, features), (classes, features), (classes) or undefined
  c10::DimVector shape;            // of the rows as they came
};

}  // namespace tlk
