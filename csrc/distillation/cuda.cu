// Distillation on CUDA tensors. The schemas and what they mean are in tlkernels/losses/distillation/ops.py.
#include "cuda.cuh"

#include <torch/library.h>

#include <tuple>
#include <type_traits>

#include "cuda_call.h"
#include "../core/cuda/sum.cuh"

namespace tlk {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

DistillationOnTensors::DistillationOnTensors(const Tensor& tensor, at::IntArrayRef logits,
                                             const at::TensorOptions& logits_options, const OptionalTensor& target_in,
                                             const OptionalTensor& row_weight_in, const DistillationOptions& given)
    : DistillationCall(logits, logits_options, target_in, row_weight_in, given), device_(tensor) {
  if (target) check_classes(targets, classes, ignore_index);
}

Tensor DistillationOnTensors::parts() const { return at::empty({kMostParts}, options.dtype(at::kDouble)); }

void DistillationOnTensors::use_mean() {
  if (!target) {
    factor_ = 1 / double(rows);
    return;
  }
  divisor_ = at::empty({}, options.dtype(at::kDouble));
  const Counted<float> counted{target, ignore_index, classes, nullptr};
  const double* const undivided = nullptr;
  const Tensor scratch = parts();
  check_launch(sum(counted, rows, 1.0, undivided, divisor_.mutable_data_ptr<double>(),
                   scratch.mutable_data_ptr<double>(), device_.stream()),
               "distillation: count");
}

void DistillationOnTensors::launch(const Distillation& of) const {
  check_launch(distillation({of, factor_, divisor()}, scalar_of(dtype), device_.stream()), "distillation");
}

Tensor DistillationOnTensors::sum_of(const Tensor& losses) const {
  const Tensor result = at::empty({}, options), scratch = parts();
  const auto add = [&](auto* out) {
    using A = std::remove_pointer_t<decltype(out)>;
    const Values<A> values{static_cast<const A*>(losses.const_data_ptr())};
    return sum(values, rows, factor_, divisor(), out, scratch.mutable_data_ptr<double>(), device_.stream());
  };
  check_launch(compute == at::kDouble ? add(result.mutable_data_ptr<double>()) : add(result.mutable_data_ptr<float>()),
               "distillation: sum");
  return result;
}

namespace {

struct Call : DistillationOnTensors {
  const DistillationLogits& logits;

  Call(const DistillationLogits& of, const OptionalTensor& target_in, const OptionalTensor& row_weight_in,
       const DistillationOptions& given)
      : DistillationOnTensors(of.student, of.student.sizes(), of.student.options(), target_in, row_weight_in, given),
        logits(of) {}

  // The gradients that are wanted, in the common dtype.
  std::tuple<Tensor, Tensor> run(bool needs_student, bool needs_teacher) const {
    Tensor student_grad, teacher_grad;
    if (needs_student) student_grad = at::empty(logits.student.sizes(), logits.student.options());
    if (needs_teacher) teacher_grad = at::empty(logits.teacher.sizes(), logits.teacher.options());
    launch(whole(logits.student, logits.teacher, student_grad, teacher_grad).call);
    return {student_grad, teacher_grad};
  }
};

Tensor forward(const Tensor& student, const Tensor& teacher, const OptionalTensor& target,
               const OptionalTensor& row_weight, double temperature, c10::string_view divergence, double beta,
               double hard_weight, int64_t ignore_index, double label_smoothing) {
  const Guards guards;
  const DistillationLogits logits(student, teacher);
  Call call(logits, target, row_weight, {temperature, divergence, beta, hard_weight, ignore_index, label_smoothing});
  const Tensor losses = call.losses();
  call.run(false, false);
  return losses;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_rows, const Tensor& student, const Tensor& teacher,
                                    const OptionalTensor& target, const OptionalTensor& row_weight, double temperature,
                                    c10::string_view divergence, double beta, double hard_weight, int64_t ignore_index,
                                    double label_smoothing, bool needs_student, bool needs_teacher) {
  const Guards guards;
  const DistillationLogits logits(student, teacher);
  Call call(logits, target, row_weight, {temperature, divergence, beta, hard_weight, ignore_index, label_smoothing});
  call.use_upstream(grad_rows);
  const auto [of_student, of_teacher] = call.run(needs_student, needs_teacher);
  return {given_gradient(of_student, student), given_gradient(of_teacher, teacher)};
}

std::tuple<Tensor, Tensor, Tensor> step(const Tensor& student, const Tensor& teacher, const OptionalTensor& target,
                                        const OptionalTensor& row_weight, double temperature,
                                        c10::string_view divergence, double beta, double hard_weight,
                                        int64_t ignore_index, double label_smoothing, bool mean, bool needs_student,
                                        bool needs_teacher) {
  const Guards guards;
  const DistillationLogits logits(student, teacher);
  Call call(logits, target, row_weight, {temperature, divergence, beta, hard_weight, ignore_index, label_smoothing});
  if (mean) call.use_mean();
  const Tensor losses = call.losses();
  const auto [of_student, of_teacher] = call.run(needs_student, needs_teacher);
  return {call.sum_of(losses), given_gradient(of_student, student), given_gradient(of_teacher, teacher)};
}

}  // namespace

TORCH_LIBRARY_IMPL(tlkernels, CUDA, m) {
  m.impl("distillation_fwd", forward);
  m.impl("distillation_bwd", backward);
  m.impl("distillation_step", step);
}

}  // namespace tlk
