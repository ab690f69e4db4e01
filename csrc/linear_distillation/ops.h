// The ops of linear distillation, the same on every device. Their schemas, with what they return, are in
// tlkernels/losses/linear_distillation/ops.py.
#pragma once
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "../core/linear_layer.h"
#include "../distillation/call.h"

namespace tlk {

// The linear layers of student and teacher, checked against each other.
struct TwoLayers {
  const LinearLayer student_layer, teacher_layer;

  TwoLayers(const LinearLayer& student, const LinearLayer& teacher) : student_layer(student), teacher_layer(teacher) {
    TORCH_CHECK_VALUE(teacher.shape == student.shape, "teacher_input: expected the rows of student_input ",
                      at::IntArrayRef(student.shape), ", got ", at::IntArrayRef(teacher.shape));
    TORCH_CHECK_VALUE(teacher.classes() == student.classes(), "teacher_weight: expected ", student.classes(),
                      " classes as in student_weight, got ", teacher.weight.sizes());
  }

  c10::DimVector logits_sizes() const {
    c10::DimVector sizes = student_layer.shape;
    sizes.push_back(student_layer.classes());
    return sizes;
  }
};

// A call on features: `Sweep` makes the logits of a chunk of rows, and the kernel of distillation turns them into
// losses and, in the logits' place, their gradients. `DeviceCall` is CpuDistillationCall or CudaDistillationCall,
// `Sweep` CpuLinearSweep or CudaLinearSweep.
template <class DeviceCall, class Sweep>
struct DistillationOnFeatures : TwoLayers, DeviceCall {
  DistillationOnFeatures(const TwoLayers& layers, const DistillationOptions& options)
      : TwoLayers(layers),
        DeviceCall(student_layer.input.device(),
                   at::promote_types(Sweep::logits_type(student_layer.input.scalar_type()),
                                     Sweep::logits_type(teacher_layer.input.scalar_type())),
                   logits_sizes(), options) {}

  // Leaves out the rows that are ignored or of weight 0, before upstreams are given and outputs made.
  void select() {
    const at::Tensor valid = this->target ? this->targets.flatten().ne(this->ignore_index) : at::Tensor();
    const at::Tensor used = this->row_weight.data ? this->row_weight_.flatten().ne(0) : at::Tensor();
    counted_ = Sweep::count(this->rows, valid, used, {});
    if (!counted_.numbers.defined()) return;
    this->rows = counted_.of(student_layer.input);
    this->shape = {this->rows};
    if (this->target) {
      this->targets = counted_.kept(this->targets.flatten());
      this->target = this->targets.template const_data_ptr<int64_t>();
    }
    if (!used.defined()) return;
    this->row_weight_ = counted_.kept(this->row_weight_.flatten());
    this->row_weight = per_position(this->row_weight_);
  }

  // The values of the rows that count, and the opposite: those of all rows, with 0 in the others.
  at::Tensor kept(const at::Tensor& values) const {
    return counted_.numbers.defined() ? counted_.kept(values.flatten()) : values;
  }
  at::Tensor spread(const at::Tensor& values) const {
    return counted_.spread(values, student_layer.rows()).view(student_layer.shape);
  }

  // Returns the gradients of student and teacher.
  std::array<LinearGradients, 2> run(LinearNeeds of_student, LinearNeeds of_teacher) {
    const int64_t chunk =
        std::min(Sweep::rows_of_a_chunk(student_layer, counted_, of_student[1], Sweep::row_bytes(teacher_layer)),
                 Sweep::rows_of_a_chunk(teacher_layer, counted_, of_teacher[1], Sweep::row_bytes(student_layer)));
    Sweep sweep[2] = {{student_layer, counted_, of_student, chunk}, {teacher_layer, counted_, of_teacher, chunk}};
    for (int64_t begin = 0; begin < this->rows; begin += chunk) {
      const int64_t end = std::min(this->rows, begin + chunk);
      at::Tensor logits[2], common[2];
      for (int i = 0; i < 2; ++i) {
        logits[i] = sweep[i].logits(begin, end);
        common[i] = logits[i].to(this->dtype);
      }
      this->launch(
          this->in_place(begin, end, common[0], common[1], sweep[0].differentiates(), sweep[1].differentiates()));
      for (int i = 0; i < 2; ++i)
        if (sweep[i].differentiates()) sweep[i].take(begin, end, common[i].to(logits[i].scalar_type()));
    }
    return {sweep[0].gradients(), sweep[1].gradients()};
  }

 private:
  CountedRows counted_;
};

template <class DeviceCall, class Sweep, class Options = DistillationOptions::ArgumentTypes>
struct LinearDistillationOps;

template <class DeviceCall, class Sweep, class... Options>
struct LinearDistillationOps<DeviceCall, Sweep, Types<Options...>> {
  using Tensor = at::Tensor;
  using OptionalTensor = std::optional<Tensor>;
  using Call = DistillationOnFeatures<DeviceCall, Sweep>;
  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  static Tensor forward(const Tensor& student_input, const Tensor& student_weight, const OptionalTensor& student_bias,
                        const Tensor& teacher_input, const Tensor& teacher_weight, const OptionalTensor& teacher_bias,
                        Options... options) {
    const Guards guards;
    Call call({{"student", student_input, student_weight, student_bias},
               {"teacher", teacher_input, teacher_weight, teacher_bias}},
              {options...});
    call.select();
    const Tensor losses = call.losses();
    call.run({}, {});
    return call.spread(losses);
  }

  static Gradients backward(const Tensor& grad_rows, const Tensor& student_input, const Tensor& student_weight,
                            const OptionalTensor& student_bias, const Tensor& teacher_input,
                            const Tensor& teacher_weight, const OptionalTensor& teacher_bias, Options... options,
                            std::array<bool, 6> needs) {
    const Guards guards;
    Call call({{"student", student_input, student_weight, student_bias},
               {"teacher", teacher_input, teacher_weight, teacher_bias}},
              {options...});
    call.select();
    call.use_upstream(call.kept(grad_rows));
    return gradients(call, needs);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> step(
      const Tensor& student_input, const Tensor& student_weight, const OptionalTensor& student_bias,
      const Tensor& teacher_input, const Tensor& teacher_weight, const OptionalTensor& teacher_bias, Options... options,
      bool mean, std::array<bool, 6> needs) {
    const Guards guards;
    Call call({{"student", student_input, student_weight, student_bias},
               {"teacher", teacher_input, teacher_weight, teacher_bias}},
              {options...});
    if (mean) call.use_mean();
    call.select();
    const Tensor losses = call.losses();
    const Gradients grads = gradients(call, needs);
    return std::tuple_cat(std::make_tuple(call.sum_of(losses)), grads);
  }

  static void implement(torch::Library& m) {
    m.impl("linear_distillation_fwd", forward);
    m.impl("linear_distillation_bwd", backward);
    m.impl("linear_distillation_step", step);
  }

 private:
  static Gradients gradients(Call& call, std::array<bool, 6> needs) {
    const auto [student, teacher] = call.run({needs[0], needs[1], needs[2]}, {needs[3], needs[4], needs[5]});
    return {student[0], student[1], student[2], teacher[0], teacher[1], teacher[2]};
  }
};

}  // namespace tlk
