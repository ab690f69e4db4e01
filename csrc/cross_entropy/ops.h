// The ops of cross entropy on logits, the same on every device. Their schemas, with what they return, are in
// tlkernels/losses/cross_entropy/ops.py.
#pragma once
#include <torch/library.h>

#include <tuple>

#include "call.h"

namespace tlk {

// A call on logits in memory. `DeviceCall` is CpuCrossEntropyCall or CudaCrossEntropyCall.
template <class DeviceCall>
struct CrossEntropyOnLogits : DeviceCall {
  using DeviceCall::target;
  at::Tensor input;

  CrossEntropyOnLogits(const at::Tensor& input_, const at::Tensor& target_, const CrossEntropyOptions& options)
      : DeviceCall(input_, input_.sizes(), positions(input_), input_.size(class_axis(input_)), target_, options),
        input(input_) {
    if (!this->indices && target.scalar_type() != input.scalar_type()) target = target.to(this->compute);
  }

  at::Tensor empty_gradient() const { return DeviceCall::empty_gradient(input); }

  // Computes the outputs that were made, and the gradient if `grad` is defined. `grad` may be the input itself.
  void run(const at::Tensor& grad = {}) {
    if (this->rows == 0 || this->classes == 0) return;
    if (!lay_out(*this, input, grad)) {  // a view of many axes that do not merge
      TORCH_CHECK_VALUE(!grad.defined() || !grad.is_same(input),
                        "inplace_grad: expected an input of fewer non-mergeable axes, got strides ", input.strides());
      input = input.contiguous();
      target = target.contiguous();
      const at::Tensor dense = grad.defined() ? empty_gradient() : grad;
      run(dense);
      if (dense.defined()) grad.copy_(dense);
      return;
    }
    this->launch(*this, input.scalar_type(), target.scalar_type());
  }
};

template <class DeviceCall, class Options = CrossEntropyOptions::ArgumentTypes>
struct CrossEntropyOps;

template <class DeviceCall, class... Options>
struct CrossEntropyOps<DeviceCall, Types<Options...>> {
  using Tensor = at::Tensor;
  using OptionalTensor = std::optional<Tensor>;
  using Call = CrossEntropyOnLogits<DeviceCall>;

  static std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& target, Options... options) {
    Call call(input, target, {options...});
    const Tensor loss = call.output(call.loss), peak = call.output(call.peak), log_sum = call.output(call.log_sum);
    call.run();
    return {loss, peak, log_sum};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_stats(const Tensor& input, const Tensor& target,
                                                                          Options... options) {
    Call call(input, target, {options...});
    const Tensor loss = call.output(call.loss), peak = call.output(call.peak), log_sum = call.output(call.log_sum);
    const Tensor entropy = call.output(call.entropy), correct = call.output(call.correct, at::kBool);
    call.run();
    return {loss, peak, log_sum, entropy, correct};
  }

  static Tensor backward(const Tensor& grad_loss, const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
                         const Tensor& input, const Tensor& target, const Tensor& peak, const Tensor& log_sum,
                         const OptionalTensor& entropy, Options... options) {
    Call call(input, target, {options...});
    call.use_upstream(grad_loss, grad_lse, grad_entropy);
    call.use_normaliser(peak, log_sum, entropy);
    const Tensor grad = call.empty_gradient();
    call.run(grad);
    return grad;
  }

  static void backward_(const Tensor& grad_loss, const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
                        Tensor& input, const Tensor& target, const Tensor& peak, const Tensor& log_sum,
                        const OptionalTensor& entropy, Options... options) {
    Call call(input, target, {options...});
    call.use_upstream(grad_loss, grad_lse, grad_entropy);
    call.use_normaliser(peak, log_sum, entropy);
    call.run(input);
  }

  static Tensor total(const Tensor& input, const Tensor& target, Options... options, const OptionalTensor& row_weight,
                      bool mean) {
    Call call(input, target, {options...});
    return reduced(call, row_weight, mean, {});
  }

  static std::tuple<Tensor, Tensor> step(const Tensor& input, const Tensor& target, Options... options,
                                         const OptionalTensor& row_weight, bool mean) {
    Call call(input, target, {options...});
    const Tensor grad = call.empty_gradient();
    return {reduced(call, row_weight, mean, grad), grad};
  }

  static void implement(torch::Library& m) {
    m.impl("cross_entropy_fwd", forward);
    m.impl("cross_entropy_fwd_stats", forward_stats);
    m.impl("cross_entropy_bwd", backward);
    m.impl("cross_entropy_bwd_", backward_);
    m.impl("cross_entropy_total", total);
    m.impl("cross_entropy_step", step);
  }

 private:
  static Tensor reduced(Call& call, const OptionalTensor& row_weight, bool mean, const Tensor& grad) {
    call.use_row_weight(row_weight);
    if (mean) call.use_mean();
    const Tensor losses = call.output(call.loss);
    call.run(grad);
    return call.sum_of(losses);
  }
};

}  // namespace tlk
