// Distillation on CUDA tensors. The schemas and what they mean are in tlkernels/losses/distillation/ops.py.
#include "distillation.cuh"

#include <torch/library.h>

#include <tuple>

#include "../distillation_call.h"
#include "tensor.h"

namespace tlk {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Call : DistillationCall {
  const DistillationLogits& logits;

  Call(const DistillationLogits& logits_, const OptionalTensor& target_in, const OptionalTensor& row_weight_in,
       const DistillationOptions& given)
      : DistillationCall(logits_.student.sizes(), logits_.student.options(), target_in, row_weight_in, given),
        logits(logits_) {
    if (target) check_classes(targets, classes, ignore_index);
  }

  // The gradients that are wanted, in the common dtype.
  std::tuple<Tensor, Tensor> run(bool needs_student, bool needs_teacher) const {
    Tensor student_grad, teacher_grad;
    if (needs_student) student_grad = at::empty(logits.student.sizes(), logits.student.options());
    if (needs_teacher) teacher_grad = at::empty(logits.teacher.sizes(), logits.teacher.options());
    const OnDevice device(logits.student);
    const Whole of = whole(logits.student, logits.teacher, student_grad, teacher_grad);
    check_launch(tlk::distillation(of.call, scalar_of(dtype), device.stream()), "distillation");
    return {student_grad, teacher_grad};
  }

  // What the mean divides by, in float64 on the device.
  Tensor denominator() const {
    const at::TensorOptions wide = options.dtype(at::kDouble);
    return target ? targets.ne(ignore_index).sum().to(at::kDouble) : at::full({}, double(rows), wide);
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

// The denominator stays on the device: it is the upstream gradient of every row, and then divides their sum.
std::tuple<Tensor, Tensor, Tensor> step(const Tensor& student, const Tensor& teacher, const OptionalTensor& target,
                                        const OptionalTensor& row_weight, double temperature,
                                        c10::string_view divergence, double beta, double hard_weight,
                                        int64_t ignore_index, double label_smoothing, bool mean, bool needs_student,
                                        bool needs_teacher) {
  const Guards guards;
  const DistillationLogits logits(student, teacher);
  Call call(logits, target, row_weight, {temperature, divergence, beta, hard_weight, ignore_index, label_smoothing});
  Tensor denominator;
  if (mean) {
    denominator = call.denominator();
    call.use_upstream(denominator.reciprocal().expand(call.shape));
  }
  const Tensor losses = call.losses();
  const auto [of_student, of_teacher] = call.run(needs_student, needs_teacher);
  Tensor loss = losses.sum(at::kDouble);
  if (mean) loss.div_(denominator);
  return {loss.to(call.compute), given_gradient(of_student, student), given_gradient(of_teacher, teacher)};
}

}  // namespace

TORCH_LIBRARY_IMPL(tlkernels, CUDA, m) {
  m.impl("distillation_fwd", forward);
  m.impl("distillation_bwd", backward);
  m.impl("distillation_step", step);
}

}  // namespace tlk
