#include "call.h"

#include <algorithm>
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
  spread_over = double(options.num_classes.value_or(classes));
  elsewhere = options.num_classes.has_value();
  TORCH_CHECK_VALUE(spread_over >= classes, "num_classes: expected at least the ", classes,
                    " classes of the logits, got ", *options.num_classes);
  if (options.weight) {
    TORCH_CHECK_VALUE(options.weight->dim() == 1 && options.weight->size(0) == classes, "weight: expected ", classes,
                      " numbers, one per class, got shape ", options.weight->sizes());
    weight_ = options.weight->to(compute).contiguous();
    weight = weight_.const_data_ptr();
  }
  if (target.is_floating_point()) {
    TORCH_CHECK_VALUE(target.sizes() == logits, "target: expected probabilities of the logits' shape ", logits,
                      ", got ", target.sizes());
    return;
  }
  TORCH_CHECK_VALUE(target.sizes() == at::IntArrayRef(shape), "target: expected class indices of shape ",
                    at::IntArrayRef(shape), ", got ", target.sizes());
  target = target.to(at::kLong).contiguous();
  indices = target.const_data_ptr<int64_t>();
}

PerPosition CrossEntropyCall::position_values(const char* name, const Tensor& given, Tensor& kept) const {
  TORCH_CHECK_VALUE(given.sizes() == at::IntArrayRef(shape), name, ": expected shape ", at::IntArrayRef(shape),
                    ", got ", given.sizes());
  kept = given.to(compute);
  return per_position(kept);
}

void CrossEntropyCall::use_upstream(const Tensor& by_loss, const std::optional<Tensor>& by_lse,
                                    const std::optional<Tensor>& by_entropy) {
  grad_loss = position_values("grad_loss", by_loss, upstream_);
  if (by_lse) grad_lse = position_values("grad_lse", *by_lse, upstream_lse_);
  if (by_entropy) grad_entropy = position_values("grad_entropy", *by_entropy, upstream_entropy_);
}

void CrossEntropyCall::use_row_weight(const std::optional<Tensor>& given) {
  if (given) row_weight = position_values("row_weight", *given, row_weight_);
}

void CrossEntropyCall::use_normaliser(const Tensor& given_peak, const Tensor& given_log_sum,
                                      const std::optional<Tensor>& given_entropy) {
  TORCH_CHECK_VALUE(given_entropy || !grad_entropy.data, "entropy: expected it with grad_entropy");
  const auto use = [&](const char* name, const Tensor& given, Tensor& kept, void*& slot) {
    position_values(name, given, kept);
    kept = kept.contiguous();
    slot = const_cast<void*>(kept.const_data_ptr());
  };
  normaliser_given = true;
  use("peak", given_peak, peak_, peak);
  use("log_sum", given_log_sum, log_sum_, log_sum);
  if (grad_entropy.data) use("entropy", *given_entropy, entropy_, entropy);
}

int64_t class_axis(const Tensor& logits) {
  TORCH_CHECK_VALUE(logits.dim() > 0, "input: expected a class dimension, got a 0-d tensor");
  return logits.dim() == 1 ? 0 : 1;
}

PositionSizes positions(const Tensor& logits) {
  PositionSizes sizes(logits.sizes().begin(), logits.sizes().end());
  sizes.erase(sizes.begin() + class_axis(logits));
  return sizes;
}

template <class Pointer>
static void place(Strided<Pointer>& to, const Tensor& t, Pointer data, const PositionSizes& axes, int64_t classes_at) {
  to.data = data;
  for (size_t i = 0; i < axes.size(); ++i) to.stride[i] = t.stride(axes[i]);
  to.class_stride = t.stride(classes_at);
}

bool lay_out(CrossEntropyCall& call, const Tensor& input, const Tensor& grad) {
  const int64_t classes_at = class_axis(input);
  c10::SmallVector<const Tensor*, 3> tensors = {&input};
  if (!call.indices) tensors.push_back(&call.target);
  if (grad.defined()) tensors.push_back(&grad);
  PositionSizes last;  // the innermost axis of each merged axis, whose stride is the merged axis's
  PositionSizes sizes;
  for (int64_t axis = 0; axis < input.dim(); ++axis) {
    if (axis == classes_at || input.size(axis) == 1) continue;
    const bool merges = !last.empty() && std::all_of(tensors.begin(), tensors.end(), [&](const Tensor* t) {
      return t->stride(last.back()) == t->stride(axis) * t->size(axis);
    });
    if (merges) {
      last.back() = axis;
      sizes.back() *= input.size(axis);
    } else {
      last.push_back(axis);
      sizes.push_back(input.size(axis));
    }
  }
  if (last.size() > size_t(kMaxAxes)) return false;
  call.axes = std::max<int>(1, int(last.size()));
  call.size[0] = 1;
  std::copy(sizes.begin(), sizes.end(), call.size);
  place<const void*>(call.x, input, input.const_data_ptr(), last, classes_at);
  if (!call.indices)
    place<const void*>(call.probabilities, call.target, call.target.const_data_ptr(), last, classes_at);
  if (grad.defined()) place<void*>(call.grad, grad, grad.mutable_data_ptr(), last, classes_at);
  return true;
}

}  // namespace tlk
