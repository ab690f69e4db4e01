// Distillation on CPU tensors. The schemas and what they mean are in tlkernels/losses/distillation/ops.py.
#include <torch/library.h>

#include <tuple>

#include "cpu_call.h"

namespace tlk {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

CheckedDistillation checked(const DistillationLogits& logits, const OptionalTensor& target,
                            const OptionalTensor& row_weight, const DistillationOptions& options) {
  return {logits.student.sizes(), logits.student.scalar_type(), target, row_weight, options};
}

struct Gradients {
  Tensor student, teacher;  // in the common dtype; undefined where not wanted

  Gradients(const DistillationLogits& logits, bool needs_student, bool needs_teacher) {
    if (needs_student) student = empty_gradient(logits.student.sizes(), logits.student.options());
    if (needs_teacher) teacher = empty_gradient(logits.teacher.sizes(), logits.teacher.options());
  }

  void run(const CheckedDistillation& call, const DistillationLogits& logits) const {
    run_rows(call.whole(logits.student, logits.teacher, student, teacher).call, call.dtype);
  }
};

Tensor forward(const Tensor& student, const Tensor& teacher, const OptionalTensor& target,
               const OptionalTensor& row_weight, double temperature, c10::string_view divergence, double beta,
               double hard_weight, int64_t ignore_index, double label_smoothing) {
  const DistillationLogits logits(student, teacher);
  CheckedDistillation call =
      checked(logits, target, row_weight, {temperature, divergence, beta, hard_weight, ignore_index, label_smoothing});
  const Tensor losses = call.losses();
  Gradients(logits, false, false).run(call, logits);
  return losses;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_rows, const Tensor& student, const Tensor& teacher,
                                    const OptionalTensor& target, const OptionalTensor& row_weight, double temperature,
                                    c10::string_view divergence, double beta, double hard_weight, int64_t ignore_index,
                                    double label_smoothing, bool needs_student, bool needs_teacher) {
  const DistillationLogits logits(student, teacher);
  CheckedDistillation call =
      checked(logits, target, row_weight, {temperature, divergence, beta, hard_weight, ignore_index, label_smoothing});
  call.use_upstream(grad_rows);
  const Gradients grads(logits, needs_student, needs_teacher);
  grads.run(call, logits);
  return {given_gradient(grads.student, student), given_gradient(grads.teacher, teacher)};
}

std::tuple<Tensor, Tensor, Tensor> step(const Tensor& student, const Tensor& teacher, const OptionalTensor& target,
                                        const OptionalTensor& row_weight, double temperature,
                                        c10::string_view divergence, double beta, double hard_weight,
                                        int64_t ignore_index, double label_smoothing, bool mean, bool needs_student,
                                        bool needs_teacher) {
  const DistillationLogits logits(student, teacher);
  CheckedDistillation call =
      checked(logits, target, row_weight, {temperature, divergence, beta, hard_weight, ignore_index, label_smoothing});
  const double denominator = mean ? call.denominator : 1;
  call.use_upstream(1 / denominator);
  const Tensor losses = call.losses();
  const Gradients grads(logits, needs_student, needs_teacher);
  grads.run(call, logits);
  return {sum_over(losses, denominator), given_gradient(grads.student, student),
          given_gradient(grads.teacher, teacher)};
}

}  // namespace

TORCH_LIBRARY_IMPL(tlkernels, CPU, m) {
  m.impl("distillation_fwd", forward);
  m.impl("distillation_bwd", backward);
  m.impl("distillation_step", step);
}

}  // namespace tlk
