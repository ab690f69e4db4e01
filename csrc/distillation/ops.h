// The ops of distillation on logits, the same on every device. Their schemas, with what they return, are in
// tlkernels/losses/distillation/ops.py.
#pragma once
#include <torch/library.h>

#include <array>
#include <tuple>

#include "call.h"

namespace tlk {

// The logits, in the dtype that torch promotes both to.
struct CommonLogits {
  at::Tensor student_logits, teacher_logits;

  CommonLogits(const at::Tensor& student, const at::Tensor& teacher) {
    TORCH_CHECK_VALUE(student.dim() > 0 && student.sizes() == teacher.sizes(),
                      "teacher_logits: expected the shape of student_logits ", student.sizes(), ", got ",
                      teacher.sizes());
    const at::ScalarType dtype = at::promote_types(student.scalar_type(), teacher.scalar_type());
    student_logits = student.to(dtype), teacher_logits = teacher.to(dtype);
  }
};

// A call on logits in memory. `DeviceCall` is CpuDistillationCall or CudaDistillationCall.
template <class DeviceCall>
struct DistillationOnLogits : CommonLogits, DeviceCall {
  DistillationOnLogits(const at::Tensor& student, const at::Tensor& teacher, const DistillationOptions& options)
      : CommonLogits(student, teacher),
        DeviceCall(student_logits.device(), student_logits.scalar_type(), student_logits.sizes(), options) {}

  // Returns the gradients, undefined where not needed.
  std::tuple<at::Tensor, at::Tensor> run(std::array<bool, 2> needs) const {
    const auto [needs_student, needs_teacher] = needs;
    at::Tensor student_grad, teacher_grad;
    if (needs_student) student_grad = this->empty_gradient(student_logits);
    if (needs_teacher) teacher_grad = this->empty_gradient(teacher_logits);
    this->launch(this->whole(student_logits, teacher_logits, student_grad, teacher_grad).call);
    return {student_grad, teacher_grad};
  }
};

template <class DeviceCall, class Options = DistillationOptions::ArgumentTypes>
struct DistillationOps;

template <class DeviceCall, class... Options>
struct DistillationOps<DeviceCall, Types<Options...>> {
  using Tensor = at::Tensor;
  using Call = DistillationOnLogits<DeviceCall>;

  static Tensor forward(const Tensor& student, const Tensor& teacher, Options... options) {
    const Guards guards;
    Call call(student, teacher, {options...});
    const Tensor losses = call.losses();
    call.run({});
    return losses;
  }

  static std::tuple<Tensor, Tensor> backward(const Tensor& grad_rows, const Tensor& student, const Tensor& teacher,
                                             Options... options, std::array<bool, 2> needs) {
    const Guards guards;
    Call call(student, teacher, {options...});
    call.use_upstream(grad_rows);
    const auto [student_grad, teacher_grad] = call.run(needs);
    return {returned(student_grad, student), returned(teacher_grad, teacher)};
  }

  static std::tuple<Tensor, Tensor, Tensor> step(const Tensor& student, const Tensor& teacher, Options... options,
                                                 bool mean, std::array<bool, 2> needs) {
    const Guards guards;
    Call call(student, teacher, {options...});
    if (mean) call.use_mean();
    const Tensor losses = call.losses();
    const auto [student_grad, teacher_grad] = call.run(needs);
    return {call.sum_of(losses), returned(student_grad, student), returned(teacher_grad, teacher)};
  }

  static void implement(torch::Library& m) {
    m.impl("distillation_fwd", forward);
    m.impl("distillation_bwd", backward);
    m.impl("distillation_step", step);
  }

 private:
  // A gradient in its logits' dtype; without elements where not needed.
  static Tensor returned(const Tensor& grad, const Tensor& logits) {
    return grad.defined() ? grad.to(logits.scalar_type()) : at::empty({0}, logits.options());
  }
};

}  // namespace tlk
