#include "linear_layer.h"

#include <string>

namespace tlk {

using at::Tensor;

LinearLayer::LinearLayer(const char* prefix, const Tensor& features, const Tensor& weight_,
                         const std::optional<Tensor>& bias_)
    : weight(weight_) {
  const std::string name = prefix, input_name = name == "linear" ? "input" : name + "_input";
  TORCH_CHECK_VALUE(features.dim() > 0, input_name, ": expected features in the last dimension, got a 0-d tensor");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == features.size(-1) && weight.size(0) > 0, name,
                    "_weight: expected shape (classes, ", features.size(-1), "), got ", weight.sizes());
  TORCH_CHECK_TYPE(weight.scalar_type() == features.scalar_type(), name, "_weight: expected the dtype of ", input_name,
                   ", ", features.scalar_type(), ", got ", weight.scalar_type());
  shape = c10::DimVector(features.sizes().begin(), features.sizes().end() - 1);
  input = features.reshape({c10::multiply_integers(shape), features.size(-1)});
  if (!bias_) return;
  bias = *bias_;
  TORCH_CHECK_VALUE(bias.dim() == 1 && bias.size(0) == weight.size(0), name, "_bias: expected shape (", weight.size(0),
                    ",), got ", bias.sizes());
  TORCH_CHECK_TYPE(bias.scalar_type() == input.scalar_type(), name, "_bias: expected the dtype of ", input_name, ", ",
                   input.scalar_type(), ", got ", bias.scalar_type());
}

Tensor CountedRows::part(const Tensor& rows, int64_t begin, int64_t end) const {
  return numbers.defined() ? rows.index_select(0, numbers.narrow(0, begin, end - begin))
                           : rows.narrow(0, begin, end - begin);
}

Tensor CountedRows::spread(const Tensor& kept, int64_t rows) const {
  if (!numbers.defined()) return kept;
  c10::DimVector sizes(kept.sizes().begin(), kept.sizes().end());
  sizes[0] = rows;
  return at::zeros(sizes, kept.options()).index_copy_(0, numbers, kept);
}

Tensor LinearSweep::input_gradient(int64_t begin, int64_t end, at::ScalarType type) {
  if (!counted_.numbers.defined() && grad_input_.scalar_type() == type)
    return grad_input_.narrow(0, begin, end - begin);
  return at::empty({end - begin, layer_.input.size(1)}, layer_.input.options().dtype(type));
}

void LinearSweep::put_input_gradient(int64_t begin, int64_t end, const Tensor& gradient) {
  if (counted_.numbers.defined())
    grad_input_.index_copy_(0, counted_.numbers.narrow(0, begin, end - begin), gradient.to(grad_input_.scalar_type()));
  else if (Tensor part = grad_input_.narrow(0, begin, end - begin); !part.is_alias_of(gradient))
    part.copy_(gradient);
}

LinearGradients LinearSweep::gradients() const {
  LinearGradients grads = {grad_input_, grad_weight_, grad_bias_};
  for (Tensor& grad : grads)
    grad = grad.defined() ? grad.to(layer_.input.scalar_type()) : at::empty({0}, layer_.input.options());
  if (needs_[0]) {
    c10::DimVector sizes = layer_.shape;
    sizes.push_back(layer_.input.size(1));
    grads[0] = grads[0].view(sizes);
  }
  return grads;
}

}  // namespace tlk
