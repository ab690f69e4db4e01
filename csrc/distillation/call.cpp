#include "call.h"

namespace tlk {
namespace {

using at::Tensor;

// Which side the student is, and the shares of the js mixture.
void use_divergence(Distillation& call, c10::string_view name, double beta) {
  call.divergence = name == "js" ? Divergence::js : name == "tv" ? Divergence::tv : Divergence::kl;
  TORCH_CHECK_VALUE(call.divergence != Divergence::kl || name == "forward_kl" || name == "reverse_kl",
                    "divergence: expected forward_kl, reverse_kl, js or tv, got ", name);
  call.student = name == "reverse_kl" ? 0 : 1;
  call.side[call.student].share = 1 - beta;
  call.side[1 - call.student].share = beta;
}

// As (outer, inner, classes) with contiguous classes: a view where the strides allow it.
Tensor in_rows(const Tensor& logits, int64_t inner) {
  const int64_t classes = logits.size(-1);
  const bool dense = logits.stride(-1) == 1 || classes == 1;
  return (dense ? logits : logits.contiguous()).reshape({logits.numel() / (inner * classes), inner, classes});
}

}  // namespace

DistillationCall::DistillationCall(c10::Device device, at::ScalarType dtype_, at::IntArrayRef logits,
                                   const DistillationOptions& given)
    : dtype(dtype_),
      compute(compute_type(dtype)),
      shape(logits.begin(), logits.end() - 1),
      options(at::TensorOptions().dtype(compute).device(device)) {
  classes = logits.back();
  TORCH_CHECK_VALUE(classes > 0, "student_logits: expected at least one class, got shape ", logits);
  rows = c10::multiply_integers(shape);
  inner = shape.empty() ? 1 : shape.back();
  use_divergence(*this, given.divergence, given.beta);
  side[student].softcap = given.student_softcap.value_or(0);
  side[1 - student].softcap = given.teacher_softcap.value_or(0);
  inv_temperature = 1 / given.temperature;
  soft = (1 - given.hard_weight) * given.temperature * given.temperature;
  hard = given.hard_weight;
  smoothing = given.label_smoothing;
  ignore_index = given.ignore_index;
  if (given.row_weight) {
    TORCH_CHECK_VALUE(given.row_weight->sizes() == at::IntArrayRef(shape), "row_weight: expected shape ",
                      at::IntArrayRef(shape), ", got ", given.row_weight->sizes());
    row_weight_ = given.row_weight->to(compute);
    row_weight = per_position(row_weight_);
  }
  TORCH_CHECK_VALUE(given.target || hard == 0, "target: expected class indices with hard_weight above 0, got None");
  if (!given.target) return;
  TORCH_CHECK_VALUE(given.target->sizes() == at::IntArrayRef(shape), "target: expected class indices of shape ",
                    at::IntArrayRef(shape), ", got ", given.target->sizes());
  targets = given.target->to(at::kLong).contiguous();
  target = targets.const_data_ptr<int64_t>();
}

void DistillationCall::use_upstream(const Tensor& grad_rows) {
  TORCH_CHECK_VALUE(grad_rows.sizes() == at::IntArrayRef(shape), "grad_rows: expected shape ", at::IntArrayRef(shape),
                    ", got ", grad_rows.sizes());
  upstream_ = grad_rows.to(compute);
  grad_loss = per_position(upstream_);
}

Tensor DistillationCall::losses() {
  Tensor losses = at::empty(shape, options);
  loss = losses.mutable_data_ptr();
  return losses;
}

DistillationCall::Whole DistillationCall::whole(const Tensor& student_logits, const Tensor& teacher_logits,
                                                const Tensor& student_grad, const Tensor& teacher_grad) const {
  Whole all = {*this, {}};
  if (rows == 0) return all;
  const Tensor* logits[2] = {&student_logits, &teacher_logits};
  const Tensor* grads[2] = {&student_grad, &teacher_grad};
  for (int i = 0; i < 2; ++i) {
    const Tensor x = all.logits[i] = in_rows(*logits[i], inner);
    Side& to = all.call.side[i == 0 ? student : 1 - student];
    to.x = x.const_data_ptr();
    to.stride[0] = x.stride(0), to.stride[1] = x.stride(1);
    to.grad = grads[i]->defined() ? grads[i]->mutable_data_ptr() : nullptr;
    to.grad_stride[0] = inner * classes, to.grad_stride[1] = classes;
  }
  return all;
}

Distillation DistillationCall::in_place(int64_t begin, int64_t end, const Tensor& student_logits,
                                        const Tensor& teacher_logits, bool student_grad, bool teacher_grad) const {
  const size_t bytes = c10::elementSize(compute);
  Distillation call = *this;
  call.rows = call.inner = end - begin;
  const Tensor* logits[2] = {&student_logits, &teacher_logits};
  const bool wanted[2] = {student_grad, teacher_grad};
  for (int i = 0; i < 2; ++i) {
    Side& to = call.side[i == 0 ? student : 1 - student];
    void* const data = logits[i]->mutable_data_ptr();
    to.x = data;
    to.grad = wanted[i] ? data : nullptr;
    to.stride[1] = to.grad_stride[1] = classes;
  }
  if (target) call.target += begin;
  call.row_weight = advanced(row_weight, begin, bytes);
  call.grad_loss = advanced(grad_loss, begin, bytes);
  call.loss = advanced(loss, begin, bytes);
  return call;
}

}  // namespace tlk
