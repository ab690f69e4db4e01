#include "distillation_call.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

namespace tlk {
namespace {

using at::Tensor;

// Which of the two sides is which, and the shares of the js mixture.
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

void run_rows(const Distillation& call, at::ScalarType dtype) {
  if (call.rows == 0) return;
  const DistillationRows rows = kernels().distillation(scalar_of(dtype), call.divergence, call.hard != 0);
  struct alignas(64) Line {
    char bytes[64];
  };
  const size_t bytes = size_t(kept_numbers(call.classes)) * c10::elementSize(compute_type(dtype));
  constexpr int64_t kGrain = 1 << 13;  // elements for which a second thread is worth its start
  at::parallel_for(0, call.rows, std::max<int64_t>(1, kGrain / call.classes), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Line[]> kept(new Line[(bytes + sizeof(Line) - 1) / sizeof(Line)]);
    rows(call, begin, end, kept.get());
  });
}

}  // namespace

DistillationCall::DistillationCall(at::IntArrayRef logits, at::ScalarType dtype_,
                                   const std::optional<Tensor>& target_in, const std::optional<Tensor>& row_weight_in,
                                   const DistillationOptions& options)
    : dtype(dtype_), compute(compute_type(dtype_)), shape(logits.begin(), logits.end() - 1) {
  classes = logits.back();
  TORCH_CHECK_VALUE(classes > 0, "student_logits: expected at least one class, got shape ", logits);
  rows = c10::multiply_integers(shape);
  inner = shape.empty() ? 1 : shape.back();
  denominator = double(rows);
  use_divergence(*this, options.divergence, options.beta);
  inv_temperature = 1 / options.temperature;
  soft = (1 - options.hard_weight) * options.temperature * options.temperature;
  hard = options.hard_weight;
  smoothing = options.label_smoothing;
  ignore_index = options.ignore_index;
  if (row_weight_in) {
    TORCH_CHECK_VALUE(row_weight_in->sizes() == at::IntArrayRef(shape), "row_weight: expected shape ",
                      at::IntArrayRef(shape), ", got ", row_weight_in->sizes());
    row_weight_ = row_weight_in->to(compute);
    row_weight = per_position(row_weight_);
  }
  TORCH_CHECK_VALUE(target_in || hard == 0, "target: expected class indices with hard_weight above 0, got None");
  if (!target_in) return;
  TORCH_CHECK_VALUE(target_in->sizes() == at::IntArrayRef(shape), "target: expected class indices of shape ",
                    at::IntArrayRef(shape), ", got ", target_in->sizes());
  target_ = target_in->to(at::kLong).contiguous();
  target = target_.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t y = target[i];
    if (y == ignore_index)
      denominator -= 1;
    else
      TORCH_CHECK_INDEX(y >= 0 && y < classes, "target: expected class indices in [0, ", classes, ") or ignore_index (",
                        ignore_index, "), got ", y, " at row ", i);
  }
}

void DistillationCall::use_upstream(const Tensor& grad_rows) {
  TORCH_CHECK_VALUE(grad_rows.sizes() == at::IntArrayRef(shape), "grad_rows: expected shape ", at::IntArrayRef(shape),
                    ", got ", grad_rows.sizes());
  upstream_ = grad_rows.to(compute);
  grad_loss = per_position(upstream_);
}

void DistillationCall::use_upstream(double grad_row) {
  upstream_ = at::scalar_tensor(grad_row, at::TensorOptions().dtype(compute));
  grad_loss = {upstream_.const_data_ptr(), 0};
}

Tensor DistillationCall::losses() {
  Tensor losses = at::empty(shape, at::TensorOptions().dtype(compute));
  loss = losses.mutable_data_ptr();
  return losses;
}

void DistillationCall::run(const Tensor& student_logits, const Tensor& teacher_logits, const Tensor& student_grad,
                           const Tensor& teacher_grad) const {
  if (rows == 0) return;
  Distillation call = *this;
  const Tensor logits[2] = {in_rows(student_logits, inner), in_rows(teacher_logits, inner)};
  const Tensor* grads[2] = {&student_grad, &teacher_grad};
  for (int i = 0; i < 2; ++i) {
    Side& to = call.side[i == 0 ? student : 1 - student];
    to.x = logits[i].const_data_ptr();
    to.stride[0] = logits[i].stride(0), to.stride[1] = logits[i].stride(1);
    to.grad = grads[i]->defined() ? grads[i]->mutable_data_ptr() : nullptr;
    to.grad_stride[0] = inner * classes, to.grad_stride[1] = classes;
  }
  run_rows(call, dtype);
}

void DistillationCall::run_in_place(int64_t begin, int64_t end, const Tensor& student_logits,
                                    const Tensor& teacher_logits, bool student_grad, bool teacher_grad) const {
  const size_t size = c10::elementSize(compute);
  const auto skip = [&](auto* data, int64_t numbers) {
    return static_cast<const char*>(data) + numbers * int64_t(size);
  };
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
  for (PerPosition* value : {&call.row_weight, &call.grad_loss})
    if (value->data) value->data = skip(value->data, begin * value->stride);
  if (loss) call.loss = const_cast<char*>(skip(loss, begin));
  run_rows(call, dtype);
}

}  // namespace tlk
