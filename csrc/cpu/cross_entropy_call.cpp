#include "cross_entropy_call.h"

#include <utility>

namespace tlk {

using at::Tensor;

CrossEntropyCall::CrossEntropyCall(at::ScalarType dtype, at::IntArrayRef logits, PositionSizes shape_, int64_t classes_,
                                   const Tensor& target_, const CrossEntropyOptions& options)
    : compute(compute_type(dtype)), shape(std::move(shape_)), target(target_) {
  classes = classes_;
  rows = c10::multiply_integers(shape);
  ignore_index = options.ignore_index;
  smoothing = options.label_smoothing;
  inv_temperature = 1 / options.temperature;
  softcap = options.softcap.value_or(0);
  z_loss = options.z_loss;
  weight_sum = double(classes);
  if (options.weight) {
    TORCH_CHECK_VALUE(options.weight->dim() == 1 && options.weight->size(0) == classes, "weight: expected ", classes,
                      " numbers, one per class, got shape ", options.weight->sizes());
    weight_ = options.weight->to(compute).contiguous();
    weight = weight_.const_data_ptr();
    weight_sum = sum_in_order(weight_);
  }
  if (target.is_floating_point()) {
    TORCH_CHECK_VALUE(target.sizes() == logits, "target: expected probabilities of the logits' shape ", logits,
                      ", got ", target.sizes());
    denominator = double(rows);
    return;
  }
  TORCH_CHECK_VALUE(target.sizes() == at::IntArrayRef(shape), "target: expected class indices of shape ",
                    at::IntArrayRef(shape), ", got ", target.sizes());
  target = target.to(at::kLong).contiguous();
  indices = target.const_data_ptr<int64_t>();
  compute == at::kDouble ? check_indices<double>() : check_indices<float>();
}

template <class A>
void CrossEntropyCall::check_indices() {
  const A* w = static_cast<const A*>(weight);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t y = indices[i];
    if (y == ignore_index) continue;
    TORCH_CHECK_INDEX(y >= 0 && y < classes, "target: expected class indices in [0, ", classes, ") or ignore_index (",
                      ignore_index, "), got ", y, " at position ", i);
    denominator += w ? double(w[y]) : 1.0;
  }
}

Tensor CrossEntropyCall::output(void*& slot, at::ScalarType dtype) const {
  Tensor t = at::empty(shape, target.options().dtype(dtype));
  slot = t.data_ptr();
  return t;
}

void CrossEntropyCall::use_upstream(const Tensor& by_loss, const std::optional<Tensor>& by_lse) {
  const auto use = [&](const char* name, const Tensor& given, Tensor& kept) {
    TORCH_CHECK_VALUE(given.sizes() == at::IntArrayRef(shape), name, ": expected shape ", at::IntArrayRef(shape),
                      ", got ", given.sizes());
    kept = given.to(compute);
    return per_position(kept);
  };
  grad_loss = use("grad_loss", by_loss, upstream_);
  if (by_lse) grad_lse = use("grad_lse", *by_lse, upstream_lse_);
}

void CrossEntropyCall::use_upstream(double by_loss) {
  upstream_double_ = by_loss;
  upstream_float_ = float(by_loss);
  grad_loss = {compute == at::kDouble ? static_cast<const void*>(&upstream_double_) : &upstream_float_, 0};
}

}  // namespace tlk
