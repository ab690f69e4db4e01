// Distillation between logits that are products of features and weights, on CPU tensors: the logits of some rows at a
// time. The schemas and what they mean are in tlkernels/losses/linear_distillation/ops.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "../distillation/cpu_call.h"
#include "../core/cpu/linear_sweep.h"

namespace tlk {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Call {
  const LinearLayer student, teacher;
  CheckedDistillation rows;

  Call(const Tensor& student_input, const Tensor& student_weight, const OptionalTensor& student_bias,
       const Tensor& teacher_input, const Tensor& teacher_weight, const OptionalTensor& teacher_bias,
       const OptionalTensor& target, const OptionalTensor& row_weight, const DistillationOptions& options)
      : student("student", student_input, student_weight, student_bias),
        teacher("teacher", teacher_input, teacher_weight, teacher_bias),
        rows(logits_sizes(student), logits_type(), target, row_weight, options) {
    TORCH_CHECK_VALUE(teacher.shape == student.shape, "teacher_input: expected the rows of student_input ",
                      at::IntArrayRef(student.shape), ", got ", at::IntArrayRef(teacher.shape));
    TORCH_CHECK_VALUE(teacher.weight.size(0) == student.weight.size(0), "teacher_weight: expected ",
                      student.weight.size(0), " classes as in student_weight, got ", teacher.weight.sizes());
  }

  // The gradients of student and teacher.
  std::array<std::array<Tensor, 3>, 2> run(std::array<bool, 3> of_student, std::array<bool, 3> of_teacher) {
    const auto row_bytes = [](const LinearLayer& layer) {
      return layer.weight.size(0) * int64_t(c10::elementSize(product_type(layer.input.scalar_type())));
    };
    LinearSweep of[2] = {{student, of_student, row_bytes(teacher), rows.absent()},
                         {teacher, of_teacher, row_bytes(student), rows.absent()}};
    for (int64_t begin = 0; begin < rows.rows; begin += of[0].chunk_rows()) {
      const int64_t end = std::min(rows.rows, begin + of[0].chunk_rows());
      Tensor logits[2], common[2];
      for (int i = 0; i < 2; ++i) {
        logits[i] = of[i].logits(begin, end);
        common[i] = logits[i].to(rows.dtype);
      }
      run_rows(rows.in_place(begin, end, common[0], common[1], of[0].differentiates(), of[1].differentiates()),
               rows.dtype);
      for (int i = 0; i < 2; ++i)
        if (of[i].differentiates()) of[i].take(begin, end, common[i].to(logits[i].scalar_type()));
    }
    return {of[0].gradients(), of[1].gradients()};
  }

 private:
  static c10::DimVector logits_sizes(const LinearLayer& layer) {
    c10::DimVector sizes = layer.shape;
    sizes.push_back(layer.weight.size(0));
    return sizes;
  }

  at::ScalarType logits_type() const {
    return at::promote_types(product_type(student.input.scalar_type()), product_type(teacher.input.scalar_type()));
  }
};

#define TLK_PARAMETERS                                                                                                 \
  const Tensor &student_input, const Tensor &student_weight, const OptionalTensor &student_bias,                       \
      const Tensor &teacher_input, const Tensor &teacher_weight, const OptionalTensor &teacher_bias,                   \
      const OptionalTensor &target, const OptionalTensor &row_weight, double temperature, c10::string_view divergence, \
      double beta, double hard_weight, int64_t ignore_index, double label_smoothing
#define TLK_ARGUMENTS                                                                                             \
  student_input, student_weight, student_bias, teacher_input, teacher_weight, teacher_bias, target, row_weight, { \
    temperature, divergence, beta, hard_weight, ignore_index, label_smoothing                                     \
  }

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients gradients(Call& call, std::array<bool, 6> needs) {
  const auto [s, t] = call.run({needs[0], needs[1], needs[2]}, {needs[3], needs[4], needs[5]});
  return {s[0], s[1], s[2], t[0], t[1], t[2]};
}

Tensor forward(TLK_PARAMETERS) {
  const Guards guards;
  Call call(TLK_ARGUMENTS);
  const Tensor losses = call.rows.losses();
  call.run({}, {});
  return losses;
}

Gradients backward(const Tensor& grad_rows, TLK_PARAMETERS, std::array<bool, 6> needs) {
  const Guards guards;
  Call call(TLK_ARGUMENTS);
  call.rows.use_upstream(grad_rows);
  return gradients(call, needs);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> step(TLK_PARAMETERS, bool mean,
                                                                        std::array<bool, 6> needs) {
  const Guards guards;
  Call call(TLK_ARGUMENTS);
  const double denominator = mean ? call.rows.denominator : 1;
  call.rows.use_upstream(1 / denominator);
  const Tensor losses = call.rows.losses();
  const Gradients grads = gradients(call, needs);
  return std::tuple_cat(std::make_tuple(sum_over(losses, denominator)), grads);
}

}  // namespace

TORCH_LIBRARY_IMPL(tlkernels, CPU, m) {
  m.impl("linear_distillation_fwd", forward);
  m.impl("linear_distillation_bwd", backward);
  m.impl("linear_distillation_step", step);
}

}  // namespace tlk
