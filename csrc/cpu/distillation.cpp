// Distillation on CPU tensors. The schemas and what they mean are in tlkernels/losses/distillation/ops.py.
#include <torch/library.h>

#include <tuple>

#include "distillation_call.h"

namespace tlk {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Both logits in one dtype, that of torch's promotion.
struct Logits {
  Tensor student, teacher;

  Logits(const Tensor& student_, const Tensor& teacher_) {
    TORCH_CHECK_VALUE(student_.dim() > 0 && student_.sizes() == teacher_.sizes(),
                      "teacher_logits: expected the shape of student_logits ", student_.sizes(), ", got ",
                      teacher_.sizes());
    const at::ScalarType dtype = at::promote_types(student_.scalar_type(), teacher_.scalar_type());
    student = student_.to(dtype), teacher = teacher_.to(dtype);
  }

  DistillationCall call(const OptionalTensor& target, const OptionalTensor& row_weight,
                        const DistillationOptions& options) const {
    return {student.sizes(), student.scalar_type(), target, row_weight, options};
  }
};

struct Gradients {
  Tensor student, teacher;  // in the common dtype; undefined where not wanted

  Gradients(const Logits& logits, bool needs_student, bool needs_teacher) {
    if (needs_student) student = empty_gradient(logits.student.sizes(), logits.student.options());
    if (needs_teacher) teacher = empty_gradient(logits.teacher.sizes(), logits.teacher.options());
  }

  // In their logits' dtype; empty where not wanted.
  static Tensor given(const Tensor& grad, const Tensor& logits) {
    return grad.defined() ? grad.to(logits.scalar_type()) : at::empty({0}, logits.options());
  }
};

Tensor forward(const Tensor& student, const Tensor& teacher, const OptionalTensor& target,
               const OptionalTensor& row_weight, double temperature, c10::string_view divergence, double beta,
               double hard_weight, int64_t ignore_index, double label_smoothing) {
  const Logits logits(student, teacher);
  DistillationCall call =
      logits.call(target, row_weight, {temperature, divergence, beta, hard_weight, ignore_index, label_smoothing});
  const Tensor losses = call.losses();
  call.run(logits.student, logits.teacher, {}, {});
  return losses;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_rows, const Tensor& student, const Tensor& teacher,
                                    const OptionalTensor& target, const OptionalTensor& row_weight, double temperature,
                                    c10::string_view divergence, double beta, double hard_weight, int64_t ignore_index,
                                    double label_smoothing, bool needs_student, bool needs_teacher) {
  const Logits logits(student, teacher);
  DistillationCall call =
      logits.call(target, row_weight, {temperature, divergence, beta, hard_weight, ignore_index, label_smoothing});
  call.use_upstream(grad_rows);
  const Gradients grads(logits, needs_student, needs_teacher);
  call.run(logits.student, logits.teacher, grads.student, grads.teacher);
  return {Gradients::given(grads.student, student), Gradients::given(grads.teacher, teacher)};
}

std::tuple<Tensor, Tensor, Tensor> step(const Tensor& student, const Tensor& teacher, const OptionalTensor& target,
                                        const OptionalTensor& row_weight, double temperature,
                                        c10::string_view divergence, double beta, double hard_weight,
                                        int64_t ignore_index, double label_smoothing, bool mean, bool needs_student,
                                        bool needs_teacher) {
  const Logits logits(student, teacher);
  DistillationCall call =
      logits.call(target, row_weight, {temperature, divergence, beta, hard_weight, ignore_index, label_smoothing});
  const double denominator = mean ? call.denominator : 1;
  call.use_upstream(1 / denominator);
  const Tensor losses = call.losses();
  const Gradients grads(logits, needs_student, needs_teacher);
  call.run(logits.student, logits.teacher, grads.student, grads.teacher);
  return {sum_over(losses, denominator), Gradients::given(grads.student, student),
          Gradients::given(grads.teacher, teacher)};
}

}  // namespace

TORCH_LIBRARY_IMPL(tlkernels, CPU, m) {
  m.impl("distillation_fwd", forward);
  m.impl("distillation_bwd", backward);
  m.impl("distillation_step", step);
}

}  // namespace tlk
