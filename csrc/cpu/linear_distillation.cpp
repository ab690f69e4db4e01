// Distillation between logits that are products of features and weights, on CPU tensors: the logits of some rows at a
// time. The schemas and what they mean are in tlkernels/losses/linear_distillation/ops.py.
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "chunks.h"
#include "distillation_call.h"

namespace tlk {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Grads = std::array<Tensor, 3>;  // of input, weight, bias; undefined where not wanted

// One of the two layers.
struct Linear {
  Tensor input, weight, bias;  // (rows, depth), (classes, depth), (classes) or undefined
  at::IntArrayRef sizes;       // of the input as given
  std::array<bool, 3> needs;
  Grads grads;
  Tensor logits, part;  // of a chunk; a chunk's gradient of the weights, where it is not added up in their own dtype

  Linear(const char* name, const Tensor& input_, const Tensor& weight_, const OptionalTensor& bias_,
         std::array<bool, 3> needs_)
      : weight(weight_), sizes(input_.sizes()), needs(needs_) {
    TORCH_CHECK_VALUE(input_.dim() > 0 && weight.dim() == 2 && weight.size(1) == input_.size(-1), name,
                      "_weight: expected shape (classes, ", input_.dim() ? input_.size(-1) : 0, "), got ",
                      weight.sizes());
    TORCH_CHECK_TYPE(weight.scalar_type() == input_.scalar_type(), name, "_weight: expected the dtype of the input, ",
                     input_.scalar_type(), ", got ", weight.scalar_type());
    input = input_.reshape({c10::multiply_integers(sizes.slice(0, sizes.size() - 1)), sizes.back()});
    if (!bias_) return;
    bias = *bias_;
    TORCH_CHECK_VALUE(bias.dim() == 1 && bias.size(0) == weight.size(0), name, "_bias: expected shape (",
                      weight.size(0), ",), got ", bias.sizes());
    TORCH_CHECK_TYPE(bias.scalar_type() == input_.scalar_type(), name, "_bias: expected the dtype of the input, ",
                     input_.scalar_type(), ", got ", bias.scalar_type());
  }

  bool differentiates() const { return needs[0] || needs[1] || needs[2]; }

  void allocate(int64_t chunk) {
    const int64_t rows = input.size(0), classes = weight.size(0);
    const auto wide = input.options().dtype(compute_type(input.scalar_type()));
    // Sums over chunks are not kept in 16 bits.
    const bool one = chunk >= rows;
    logits = empty_gradient({chunk, classes}, input.options());
    if (needs[0]) grads[0] = empty_gradient(input.sizes(), input.options());
    if (needs[1]) grads[1] = empty_gradient(weight.sizes(), one ? input.options() : wide);
    if (needs[2]) grads[2] = at::zeros({classes}, wide);
    if (needs[1] && rows == 0) grads[1].zero_();
    if (needs[1] && grads[1].scalar_type() != input.scalar_type())
      part = empty_gradient(weight.sizes(), input.options());
  }

  Tensor project(int64_t begin, int64_t rows) {
    Tensor out = logits.narrow(0, 0, rows);
    const Tensor in = input.narrow(0, begin, rows);
    if (bias.defined())
      at::addmm_out(out, bias, in, weight.t());
    else
      at::mm_out(out, in, weight.t());
    return out;
  }

  void add(int64_t begin, const Tensor& grad_logits) {
    const int64_t rows = grad_logits.size(0);
    if (needs[0]) {
      Tensor out = grads[0].narrow(0, begin, rows);
      at::mm_out(out, grad_logits, weight);
    }
    if (needs[1]) {
      const Tensor left = grad_logits.t(), right = input.narrow(0, begin, rows);
      Tensor& sum = grads[1];
      if (part.defined()) {
        at::mm_out(part, left, right);
        begin ? sum.add_(part) : sum.copy_(part);
      } else if (begin) {
        at::addmm_out(sum, sum, left, right);
      } else {
        at::mm_out(sum, left, right);
      }
    }
    if (needs[2]) grads[2].add_(grad_logits.sum(0, false, grads[2].scalar_type()));
  }

  // In the dtype and shape of what they belong to; empty where not wanted.
  Tensor given(int i) const {
    if (!needs[size_t(i)]) return at::empty({0}, input.options());
    const Tensor grad = grads[size_t(i)].to(input.scalar_type());
    return i == 0 ? grad.view(sizes) : grad;
  }
};

struct Guards {  // the GEMMs in here are nobody's business
  at::AutoDispatchBelowAutograd autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::DispatchKey::AutocastCPU};
};

struct Layers {
  Guards guards;
  Linear student, teacher;
  DistillationCall call;

  Layers(const Tensor& student_input, const Tensor& student_weight, const OptionalTensor& student_bias,
         const Tensor& teacher_input, const Tensor& teacher_weight, const OptionalTensor& teacher_bias,
         const OptionalTensor& target, const OptionalTensor& row_weight, const DistillationOptions& options,
         std::array<bool, 6> needs)
      : student("student", student_input, student_weight, student_bias, {needs[0], needs[1], needs[2]}),
        teacher("teacher", teacher_input, teacher_weight, teacher_bias, {needs[3], needs[4], needs[5]}),
        call(logits_sizes(), at::promote_types(student_input.scalar_type(), teacher_input.scalar_type()), target,
             row_weight, options) {
    const auto rows = [](const Linear& side) { return side.sizes.slice(0, side.sizes.size() - 1); };
    TORCH_CHECK_VALUE(rows(teacher) == rows(student), "teacher_input: expected the rows of student_input ",
                      student.sizes, ", got ", teacher.sizes);
    TORCH_CHECK_VALUE(teacher.weight.size(0) == student.weight.size(0), "teacher_weight: expected ",
                      student.weight.size(0), " classes as in student_weight, got ", teacher.weight.sizes());
  }

  c10::DimVector logits_sizes() const {
    c10::DimVector sizes(student.sizes.begin(), student.sizes.end());
    sizes.back() = student.weight.size(0);
    return sizes;
  }

  void run() {
    const int64_t row_bytes = call.classes * int64_t(student.input.element_size() + teacher.input.element_size());
    const int64_t chunk = std::max<int64_t>(1, rows_per_chunk(call.rows, row_bytes));
    student.allocate(chunk), teacher.allocate(chunk);
    for (int64_t begin = 0; begin < call.rows; begin += chunk) {
      const int64_t end = std::min(begin + chunk, call.rows);
      Linear* sides[2] = {&student, &teacher};
      Tensor logits[2], common[2];
      for (int i = 0; i < 2; ++i) {
        logits[i] = sides[i]->project(begin, end - begin);
        common[i] = logits[i].to(call.dtype);
      }
      call.run_in_place(begin, end, common[0], common[1], student.differentiates(), teacher.differentiates());
      for (int i = 0; i < 2; ++i)
        if (sides[i]->differentiates()) sides[i]->add(begin, common[i].to(logits[i].scalar_type()));
    }
  }
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients gradients(const Layers& layers) {
  const Linear &s = layers.student, &t = layers.teacher;
  return {s.given(0), s.given(1), s.given(2), t.given(0), t.given(1), t.given(2)};
}

Tensor forward(const Tensor& student_input, const Tensor& student_weight, const OptionalTensor& student_bias,
               const Tensor& teacher_input, const Tensor& teacher_weight, const OptionalTensor& teacher_bias,
               const OptionalTensor& target, const OptionalTensor& row_weight, double temperature,
               c10::string_view divergence, double beta, double hard_weight, int64_t ignore_index,
               double label_smoothing) {
  Layers layers(student_input, student_weight, student_bias, teacher_input, teacher_weight, teacher_bias, target,
                row_weight, {temperature, divergence, beta, hard_weight, ignore_index, label_smoothing}, {});
  const Tensor losses = layers.call.losses();
  layers.run();
  return losses;
}

Gradients backward(const Tensor& grad_rows, const Tensor& student_input, const Tensor& student_weight,
                   const OptionalTensor& student_bias, const Tensor& teacher_input, const Tensor& teacher_weight,
                   const OptionalTensor& teacher_bias, const OptionalTensor& target, const OptionalTensor& row_weight,
                   double temperature, c10::string_view divergence, double beta, double hard_weight,
                   int64_t ignore_index, double label_smoothing, std::array<bool, 6> needs) {
  Layers layers(student_input, student_weight, student_bias, teacher_input, teacher_weight, teacher_bias, target,
                row_weight, {temperature, divergence, beta, hard_weight, ignore_index, label_smoothing}, needs);
  layers.call.use_upstream(grad_rows);
  layers.run();
  return gradients(layers);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> step(
    const Tensor& student_input, const Tensor& student_weight, const OptionalTensor& student_bias,
    const Tensor& teacher_input, const Tensor& teacher_weight, const OptionalTensor& teacher_bias,
    const OptionalTensor& target, const OptionalTensor& row_weight, double temperature, c10::string_view divergence,
    double beta, double hard_weight, int64_t ignore_index, double label_smoothing, bool mean,
    std::array<bool, 6> needs) {
  Layers layers(student_input, student_weight, student_bias, teacher_input, teacher_weight, teacher_bias, target,
                row_weight, {temperature, divergence, beta, hard_weight, ignore_index, label_smoothing}, needs);
  const double denominator = mean ? layers.call.denominator : 1;
  layers.call.use_upstream(1 / denominator);
  const Tensor losses = layers.call.losses();
  layers.run();
  return std::tuple_cat(std::make_tuple(sum_over(losses, denominator)), gradients(layers));
}

}  // namespace

TORCH_LIBRARY_IMPL(tlkernels, CPU, m) {
  m.impl("linear_distillation_fwd", forward);
  m.impl("linear_distillation_bwd", backward);
  m.impl("linear_distillation_step", step);
}

}  // namespace tlk
