// The ops of linear cross entropy, the same on every device. Their schemas, with what they return, are in
// tlkernels/losses/linear_cross_entropy/ops.py.
#pragma once
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../core/linear_layer.h"
#include "../cross_entropy/call.h"

namespace tlk {

// A call on features: `Sweep` makes the logits of a chunk of rows, and the kernels of cross entropy turn them into
// losses and, in the logits' place, their gradient. `DeviceCall` is CpuCrossEntropyCall or CudaCrossEntropyCall,
// `Sweep` CpuLinearSweep or CudaLinearSweep. The kernel's pointers are those of the first row.
template <class DeviceCall, class Sweep>
struct CrossEntropyOnFeatures : DeviceCall {
  using DeviceCall::classes;
  using DeviceCall::compute;
  using DeviceCall::target;
  const LinearLayer layer;

  CrossEntropyOnFeatures(const at::Tensor& input, const at::Tensor& linear_weight,
                         const std::optional<at::Tensor>& linear_bias, const at::Tensor& target_,
                         const CrossEntropyOptions& options)
      : DeviceCall(input, logits_sizes(input, linear_weight), {input.size(0)}, linear_weight.size(0), target_, options),
        layer("linear", input, linear_weight, linear_bias) {
    this->axes = 1;
  }

  // Leaves out the rows that do not count, before upstreams are given and outputs made, and after `use_mean`.
  void select(const std::optional<at::Tensor>& row_weight, std::optional<int64_t> num_valid) {
    const at::Tensor valid = this->indices ? target.ne(this->ignore_index) : at::Tensor();
    counted_ = Sweep::count(this->rows, valid, row_weight ? row_weight->ne(0) : at::Tensor(), num_valid);
    if (this->indices) target = counted_.kept(target);
    // With a class out of range every row is NaN.
    if (counted_.miscounted.defined())
      target = target.masked_fill(counted_.miscounted, classes + (classes == this->ignore_index));
    if (this->indices) this->indices = target.template const_data_ptr<int64_t>();
    this->rows = counted_.of(layer.input);
    this->shape = {this->rows};
    this->use_row_weight(kept(row_weight));
  }

  // The values of the rows that count, and the opposite: those of all rows, with 0 in the others.
  at::Tensor kept(const at::Tensor& values) const { return counted_.kept(values); }
  std::optional<at::Tensor> kept(const std::optional<at::Tensor>& values) const {
    return values ? std::optional(kept(*values)) : std::nullopt;
  }
  at::Tensor spread(const at::Tensor& values) const { return counted_.spread(values, layer.rows()); }

  LinearGradients run(LinearNeeds needs) {
    const auto nothing = [](int64_t, const at::Tensor&) {};
    return run(needs, nothing, nothing);
  }
  // Also calls before(begin, logits) and after(begin, logits) for each chunk, before and after its kernels.
  template <class Before, class After>
  LinearGradients run(LinearNeeds needs, Before before, After after) {
    const int64_t copy_bytes = copies_probabilities() ? classes * int64_t(c10::elementSize(probabilities_type())) : 0;
    Sweep sweep(layer, counted_, needs, Sweep::rows_of_a_chunk(layer, counted_, needs[1], copy_bytes));
    for (int64_t begin = 0; begin < this->rows; begin += sweep.chunk_rows()) {
      const int64_t end = std::min(this->rows, begin + sweep.chunk_rows());
      at::Tensor logits = sweep.logits(begin, end);
      before(begin, logits);
      run_chunk(begin, logits, sweep.differentiates());
      after(begin, logits);
      if (sweep.differentiates()) sweep.take(begin, end, logits);
    }
    return sweep.gradients();
  }

 private:
  static std::array<int64_t, 2> logits_sizes(const at::Tensor& input, const at::Tensor& linear_weight) {
    TORCH_CHECK_VALUE(input.dim() == 2, "input: expected shape (rows, features), got ", input.sizes());
    TORCH_CHECK_VALUE(linear_weight.dim() == 2, "linear_weight: expected shape (classes, ", input.size(1), "), got ",
                      linear_weight.sizes());
    return {input.size(0), linear_weight.size(0)};
  }

  // The kernels take probabilities of the logits' type or of the compute type.
  at::ScalarType probabilities_type() const {
    const at::ScalarType logits = Sweep::logits_type(layer.input.scalar_type());
    return target.scalar_type() == logits ? logits : compute;
  }
  bool has_dense_classes(const at::Tensor& x) const { return DeviceCall::kStridedProbabilities || x.stride(1) == 1; }
  bool copies_probabilities() const {
    return !this->indices && (target.scalar_type() != probabilities_type() || !has_dense_classes(target));
  }

  void run_chunk(int64_t begin, at::Tensor& logits, bool with_gradient) const {
    const size_t bytes = c10::elementSize(compute);
    CrossEntropy part = *this;
    part.size[0] = part.rows = logits.size(0);
    part.x.data = logits.const_data_ptr();
    part.x.stride[0] = classes;
    part.x.class_stride = 1;
    at::Tensor probabilities;
    if (this->indices) {
      part.indices = this->indices + begin;
    } else {
      probabilities = counted_.part(target, begin, begin + part.rows).to(probabilities_type());
      if (!has_dense_classes(probabilities)) probabilities = probabilities.contiguous();
      part.probabilities.data = probabilities.const_data_ptr();
      part.probabilities.stride[0] = probabilities.stride(0);
      part.probabilities.class_stride = probabilities.stride(1);
    }
    part.peak = advanced(this->peak, begin, bytes);
    part.log_sum = advanced(this->log_sum, begin, bytes);
    part.loss = advanced(this->loss, begin, bytes);
    part.entropy = advanced(this->entropy, begin, bytes);
    part.correct = this->correct ? this->correct + begin : nullptr;
    part.grad_loss = advanced(this->grad_loss, begin, bytes);
    part.grad_lse = advanced(this->grad_lse, begin, bytes);
    part.grad_entropy = advanced(this->grad_entropy, begin, bytes);
    part.row_weight = advanced(this->row_weight, begin, bytes);
    if (with_gradient) {
      part.grad.data = logits.mutable_data_ptr();
      part.grad.stride[0] = classes;
      part.grad.class_stride = 1;
    }
    this->run_in_place(part, logits.scalar_type(), probabilities_type());
  }

  CountedRows counted_;
};

template <class DeviceCall, class Sweep, class Options = CrossEntropyOptions::ArgumentTypes>
struct LinearCrossEntropyOps;

template <class DeviceCall, class Sweep, class... Options>
struct LinearCrossEntropyOps<DeviceCall, Sweep, Types<Options...>> {
  using Tensor = at::Tensor;
  using OptionalTensor = std::optional<Tensor>;
  using OptionalInt = std::optional<int64_t>;
  using Call = CrossEntropyOnFeatures<DeviceCall, Sweep>;

  static std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& linear_weight,
                                                    const OptionalTensor& linear_bias, const Tensor& target,
                                                    Options... options, const OptionalTensor& row_weight,
                                                    OptionalInt num_valid) {
    const Guards guards;
    Call call(input, linear_weight, linear_bias, target, {options...});
    call.select(row_weight, num_valid);
    const Tensor loss = call.output(call.loss), peak = call.output(call.peak), log_sum = call.output(call.log_sum);
    call.run({});
    return {call.spread(loss), call.spread(peak), call.spread(log_sum)};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_stats(
      const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias, const Tensor& target,
      Options... options, const OptionalTensor& row_weight, OptionalInt num_valid) {
    const Guards guards;
    Call call(input, linear_weight, linear_bias, target, {options...});
    call.select(row_weight, num_valid);
    const Tensor loss = call.output(call.loss), peak = call.output(call.peak), log_sum = call.output(call.log_sum);
    const Tensor entropy = call.output(call.entropy), correct = call.output(call.correct, at::kBool);
    call.run({});
    return {call.spread(loss), call.spread(peak), call.spread(log_sum), call.spread(entropy), call.spread(correct)};
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_loss, const OptionalTensor& grad_lse,
                                                     const OptionalTensor& grad_entropy, const Tensor& input,
                                                     const Tensor& linear_weight, const OptionalTensor& linear_bias,
                                                     const Tensor& target, const Tensor& peak, const Tensor& log_sum,
                                                     const OptionalTensor& entropy, Options... options,
                                                     const OptionalTensor& row_weight, OptionalInt num_valid,
                                                     LinearNeeds needs) {
    const Guards guards;
    Call call(input, linear_weight, linear_bias, target, {options...});
    call.select(row_weight, num_valid);
    call.use_upstream(call.kept(grad_loss), call.kept(grad_lse), call.kept(grad_entropy));
    call.use_normaliser(call.kept(peak), call.kept(log_sum), call.kept(entropy));
    const auto [grad_input, grad_weight, grad_bias] = call.run(needs);
    return {grad_input, grad_weight, grad_bias};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> step(const Tensor& input, const Tensor& linear_weight,
                                                         const OptionalTensor& linear_bias, const Tensor& target,
                                                         Options... options, const OptionalTensor& row_weight,
                                                         OptionalInt num_valid, bool mean, LinearNeeds needs) {
    const Guards guards;
    Call call(input, linear_weight, linear_bias, target, {options...});
    if (mean) call.use_mean();
    call.select(row_weight, num_valid);
    const Tensor peak = call.output(call.peak), log_sum = call.output(call.log_sum), losses = call.output(call.loss);
    const auto [grad_input, grad_weight, grad_bias] = call.run(needs);
    return {call.sum_of(losses), grad_input, grad_weight, grad_bias};
  }

  static void implement(torch::Library& m) {
    m.impl("linear_cross_entropy_fwd", forward);
    m.impl("linear_cross_entropy_fwd_stats", forward_stats);
    m.impl("linear_cross_entropy_bwd", backward);
    m.impl("linear_cross_entropy_step", step);
  }
};

}  // namespace tlk
