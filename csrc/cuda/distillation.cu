// Distillation on CUDA tensors. The schemas and what they mean are in tlkernels/losses/distillation/ops.py.
#include "distillation.cuh"

#include <torch/library.h>

#include <tuple>
#include <type_traits>

#include "../distillation_call.h"
#include "sum.cuh"
#include "tensor.h"

namespace tlk {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Call : DistillationCall {
  const DistillationLogits& logits;
  const OnDevice device;
  double factor = 1;
  Tensor divisor;  // of the mean where targets say what counts: float64, on the device

  Call(const DistillationLogits& logits_, const OptionalTensor& target_in, const OptionalTensor& row_weight_in,
       const DistillationOptions& given)
      : DistillationCall(logits_.student.sizes(), logits_.student.options(), target_in, row_weight_in, given),
        logits(logits_),
        device(logits_.student) {
    if (target) check_classes(targets, classes, ignore_index);
  }

  void use_mean() {
    if (!target) {
      factor = 1 / double(rows);
      return;
    }
    divisor = at::empty({}, options.dtype(at::kDouble));
    const Counted<float> counted{target, ignore_index, classes, nullptr};
    const double* const undivided = nullptr;
    check_launch(sum(counted, rows, 1.0, undivided, divisor.mutable_data_ptr<double>(),
                     parts().mutable_data_ptr<double>(), device.stream()),
                 "distillation: count");
  }

  // The gradients that are wanted, in the common dtype.
  std::tuple<Tensor, Tensor> run(bool needs_student, bool needs_teacher) const {
    Tensor student_grad, teacher_grad;
    if (needs_student) student_grad = at::empty(logits.student.sizes(), logits.student.options());
    if (needs_teacher) teacher_grad = at::empty(logits.teacher.sizes(), logits.teacher.options());
    const Whole of = whole(logits.student, logits.teacher, student_grad, teacher_grad);
    const DistillationOnDevice call = {of.call, factor, divisor_data()};
    check_launch(tlk::distillation(call, scalar_of(dtype), device.stream()), "distillation");
    return {student_grad, teacher_grad};
  }

  Tensor sum_of(const Tensor& losses) const {
    const Tensor result = at::empty({}, options), scratch = parts();
    const auto add = [&](auto* out) {
      using A = std::remove_pointer_t<decltype(out)>;
      const Values<A> values{static_cast<const A*>(losses.const_data_ptr())};
      return sum(values, rows, factor, divisor_data(), out, scratch.mutable_data_ptr<double>(), device.stream());
    };
    check_launch(
        compute == at::kDouble ? add(result.mutable_data_ptr<double>()) : add(result.mutable_data_ptr<float>()),
        "distillation: sum");
    return result;
  }

 private:
  const double* divisor_data() const { return divisor.defined() ? divisor.const_data_ptr<double>() : nullptr; }
  Tensor parts() const { return at::empty({kMostParts}, options.dtype(at::kDouble)); }
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
