#include "call.h"

namespace tlk {

using at::Tensor;

SelectiveCall::SelectiveCall(at::ScalarType dtype, const Tensor& index_given, int64_t rows_, int64_t classes_,
                             double temperature, std::optional<double> softcap_)
    : compute(compute_type(dtype)), temperature_(temperature) {
  TORCH_CHECK_VALUE(index_given.dim() == 2 && index_given.size(0) == rows_, "index: expected shape (", rows_,
                    ", K), got ", index_given.sizes());
  TORCH_CHECK_TYPE(index_given.scalar_type() == at::kLong, "index: expected int64, got ", index_given.scalar_type());
  index_ = index_given.contiguous();
  index = index_.const_data_ptr<int64_t>();
  rows = rows_, count = index_.size(1), classes = classes_;
  target = at::empty({rows}, index_.options());
  SelectedClasses::target = target.mutable_data_ptr<int64_t>();
  inv_temperature = 1 / temperature;
  softcap = softcap_.value_or(0);
}

CrossEntropyOptions SelectiveCall::options() const {
  const std::optional<double> cap = softcap != 0 ? std::optional<double>(softcap) : std::nullopt;
  return {no_weight_, kNoClass, /*label_smoothing=*/0, temperature_, cap, /*z_loss=*/0, /*num_classes=*/classes};
}

void SelectiveCall::use_upstream(const Tensor& by_log_probs, const std::optional<Tensor>& by_entropy) {
  TORCH_CHECK_VALUE(by_log_probs.sizes() == index_.sizes(), "grad_log_probs: expected shape ", index_.sizes(), ", got ",
                    by_log_probs.sizes());
  upstream_ = by_log_probs.to(compute).contiguous();
  upstream_sum_ = at::empty({rows}, upstream_.options());
  x_ = at::empty(index_.sizes(), upstream_.options());
  grad_log_probs = upstream_.const_data_ptr();
  grad_lse = upstream_sum_.mutable_data_ptr();
  x = x_.mutable_data_ptr();
  if (!by_entropy) return;
  TORCH_CHECK_VALUE(by_entropy->sizes() == target.sizes(), "grad_entropy: expected shape ", target.sizes(), ", got ",
                    by_entropy->sizes());
  upstream_entropy_ = by_entropy->to(compute).contiguous();
  grad_entropy = {upstream_entropy_->const_data_ptr(), 1};
}

void SelectiveCall::use_normaliser(const Tensor& given_peak, const Tensor& given_log_sum, const Tensor& given_entropy) {
  const auto use = [&](const char* name, const Tensor& given, Tensor& kept, const void*& slot) {
    TORCH_CHECK_VALUE(given.sizes() == target.sizes(), name, ": expected shape ", target.sizes(), ", got ",
                      given.sizes());
    kept = given.to(compute).contiguous();
    slot = kept.const_data_ptr();
  };
  use("peak", given_peak, peak_, peak);
  use("log_sum", given_log_sum, log_sum_, log_sum);
  if (grad_entropy.data) use("entropy", given_entropy, entropy_, entropy);
}

void SelectiveCall::pass_on(CrossEntropyCall& call) const {
  call.use_upstream(upstream_sum_, upstream_sum_,
                    upstream_entropy_);  // the loss has no terms: its upstream is not used
  call.use_normaliser(peak_, log_sum_, entropy_.defined() ? std::optional<Tensor>(entropy_) : std::nullopt);
}

Tensor SelectiveCall::output() {
  Tensor values = at::empty(index_.sizes(), index_.options().dtype(compute));
  log_probs = values.mutable_data_ptr();
  return values;
}

void SelectiveCall::check_index() const {
  const Tensor bad = index_.lt(-1).logical_or_(index_.ge(classes));
  TORCH_CHECK_INDEX(!bad.any().item<bool>(), "index: expected class indices in [0, ", classes, ") or -1, got ",
                    index_.masked_select(bad)[0].item<int64_t>());
}

SelectedClasses SelectiveCall::of(const Tensor& memory, int64_t begin) const {
  const size_t bytes = c10::elementSize(compute);
  SelectedClasses part = *this;
  part.logits = const_cast<void*>(memory.const_data_ptr());
  part.row_stride = memory.stride(0), part.class_stride = memory.stride(1);
  part.rows = memory.size(0);
  part.index += begin * count;
  part.target += begin;
  for (const void** rows_of : {&part.peak, &part.log_sum, &part.entropy}) *rows_of = advanced(*rows_of, begin, bytes);
  for (void** selected : {&part.x, &part.log_probs}) *selected = advanced(*selected, begin * count, bytes);
  part.grad_log_probs = advanced(part.grad_log_probs, begin * count, bytes);
  part.grad_lse = advanced(part.grad_lse, begin, bytes);
  part.grad_entropy = advanced(part.grad_entropy, begin, bytes);
  return part;
}

}  // namespace tlk
