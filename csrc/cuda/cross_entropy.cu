// Cross entropy on CUDA tensors: memory, layout, launches. Nothing waits for the device. The schemas and what they mean
// are in tlkernels/losses/cross_entropy/ops.py.
#include "cross_entropy.cuh"
#include "sum.cuh"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "../cross_entropy_call.h"
#include "tensor.h"

namespace tlk {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Calls f with a null pointer of the type.
template <class F>
auto with_type(Scalar type, F f) {
  switch (type) {
    case Scalar::f64:
      return f(static_cast<double*>(nullptr));
    case Scalar::f32:
      return f(static_cast<float*>(nullptr));
    case Scalar::bf16:
      return f(static_cast<bf16*>(nullptr));
    default:
      return f(static_cast<f16*>(nullptr));
  }
}

struct Call : CrossEntropyCall {
  OnDevice device;
  Tensor input, divisor_;
  double factor = 1;  // of the upstream gradient and of the sum of losses
  const double* divisor = nullptr;

  Call(const Tensor& input_, const Tensor& target_, const CrossEntropyOptions& options)
      : CrossEntropyCall(input_.scalar_type(), input_.sizes(), positions(input_), input_.size(class_axis(input_)),
                         target_, options),
        device(input_),
        input(input_) {
    if (indices)
      check_classes(target, classes, ignore_index);
    else if (target.scalar_type() != input.scalar_type())
      target = target.to(compute);
  }

  // Runs. `grad` may be undefined, or be the input itself.
  void run(const Tensor& grad);

  // The sum of losses over what it is to be divided by.
  Tensor sum_of(const Tensor& losses);

  void divide_by_what_counts();

 private:
  Tensor parts() const { return at::empty({kMostParts}, input.options().dtype(at::kDouble)); }
};

void Call::run(const Tensor& grad_out) {
  if (rows == 0 || classes == 0) return;
  if (!lay_out(*this, input, grad_out)) {  // a view of many axes that do not merge
    TORCH_CHECK_VALUE(!grad_out.defined() || !grad_out.is_same(input),
                      "inplace_grad: expected an input of fewer non-mergeable axes, got strides ", input.strides());
    input = input.contiguous();
    target = target.contiguous();
    const Tensor dense = grad_out.defined() ? at::empty_like(input) : grad_out;
    run(dense);
    if (dense.defined()) grad_out.copy_(dense);
    return;
  }
  CrossEntropyOnDevice call;
  static_cast<CrossEntropy&>(call) = *this;
  call.factor = factor;
  call.divisor = divisor;
  call.wide_probabilities = !indices && target.scalar_type() == compute;
  const cudaError_t error = with_type(scalar_of(input.scalar_type()), [&](auto* type) {
    return cross_entropy<std::remove_pointer_t<decltype(type)>>(call, device.stream());
  });
  check_launch(error, "cross_entropy");
}

void Call::divide_by_what_counts() {
  if (!indices) {
    factor = 1 / double(rows);
    return;
  }
  divisor_ = at::empty({}, input.options().dtype(at::kDouble));
  double* const out = divisor_.mutable_data_ptr<double>();
  divisor = out;
  const Tensor scratch = parts();
  double* const memory = scratch.mutable_data_ptr<double>();
  const auto count = [&](auto* weight) {
    using A = std::remove_const_t<std::remove_pointer_t<decltype(weight)>>;
    const Counted<A> counted{indices, ignore_index, classes, weight};
    return sum(counted, rows, 1.0, nullptr, out, memory, device.stream());
  };
  check_launch(
      compute == at::kDouble ? count(static_cast<const double*>(weight)) : count(static_cast<const float*>(weight)),
      "cross_entropy: count");
}

Tensor Call::sum_of(const Tensor& losses) {
  const Tensor result = at::empty({}, losses.options()), scratch = parts();
  double* const memory = scratch.mutable_data_ptr<double>();
  const auto add = [&](auto* out) {
    using A = std::remove_pointer_t<decltype(out)>;
    const Values<A> values{static_cast<const A*>(losses.const_data_ptr())};
    return sum(values, rows, factor, divisor, out, memory, device.stream());
  };
  check_launch(compute == at::kDouble ? add(result.mutable_data_ptr<double>()) : add(result.mutable_data_ptr<float>()),
               "cross_entropy: sum");
  return result;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                           int64_t ignore_index, double label_smoothing, double temperature,
                                           std::optional<double> softcap, double z_loss) {
  Call call(input, target, {weight, ignore_index, label_smoothing, temperature, softcap, z_loss});
  Tensor loss = call.output(call.loss, call.compute);
  Tensor peak = call.output(call.peak, call.compute), log_sum = call.output(call.log_sum, call.compute);
  call.run({});
  return {loss, peak, log_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_stats(const Tensor& input, const Tensor& target,
                                                                 const OptionalTensor& weight, int64_t ignore_index,
                                                                 double label_smoothing, double temperature,
                                                                 std::optional<double> softcap, double z_loss) {
  Call call(input, target, {weight, ignore_index, label_smoothing, temperature, softcap, z_loss});
  call.skip_ignored = false;  // their lse and entropy are asked for too
  Tensor loss = call.output(call.loss, call.compute);
  Tensor peak = call.output(call.peak, call.compute), log_sum = call.output(call.log_sum, call.compute);
  Tensor entropy = call.output(call.entropy, call.compute);
  void* flags = nullptr;
  Tensor correct = call.output(flags, at::kBool);
  call.correct = static_cast<bool*>(flags);
  call.run({});
  return {loss, peak, log_sum, entropy, correct};
}

void backward_into(const Tensor& grad, const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& peak,
                   const Tensor& log_sum, Call& call) {
  const Tensor peaks = peak.contiguous(), log_sums = log_sum.contiguous();
  call.normaliser_given = true;
  call.peak = const_cast<void*>(peaks.const_data_ptr());
  call.log_sum = const_cast<void*>(log_sums.const_data_ptr());
  call.use_upstream(grad_loss, grad_lse);
  call.run(grad);
}

Tensor backward(const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& input, const Tensor& target,
                const Tensor& peak, const Tensor& log_sum, const OptionalTensor& weight, int64_t ignore_index,
                double label_smoothing, double temperature, std::optional<double> softcap, double z_loss) {
  Call call(input, target, {weight, ignore_index, label_smoothing, temperature, softcap, z_loss});
  Tensor grad = at::empty_like(input);
  backward_into(grad, grad_loss, grad_lse, peak, log_sum, call);
  return grad;
}

void backward_(const Tensor& grad_loss, const OptionalTensor& grad_lse, Tensor& input, const Tensor& target,
               const Tensor& peak, const Tensor& log_sum, const OptionalTensor& weight, int64_t ignore_index,
               double label_smoothing, double temperature, std::optional<double> softcap, double z_loss) {
  Call call(input, target, {weight, ignore_index, label_smoothing, temperature, softcap, z_loss});
  backward_into(input, grad_loss, grad_lse, peak, log_sum, call);
}

Tensor reduced(Call& call, bool mean, const Tensor& grad) {
  if (mean) call.divide_by_what_counts();
  const Tensor losses = call.output(call.loss, call.compute);
  call.run(grad);
  return call.sum_of(losses);
}

Tensor total(const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t ignore_index,
             double label_smoothing, double temperature, std::optional<double> softcap, double z_loss, bool mean) {
  Call call(input, target, {weight, ignore_index, label_smoothing, temperature, softcap, z_loss});
  return reduced(call, mean, {});
}

std::tuple<Tensor, Tensor> step(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                int64_t ignore_index, double label_smoothing, double temperature,
                                std::optional<double> softcap, double z_loss, bool mean) {
  Call call(input, target, {weight, ignore_index, label_smoothing, temperature, softcap, z_loss});
  const Tensor grad = at::empty_like(input);
  const Tensor loss = reduced(call, mean, grad);
  return {loss, grad};
}

}  // namespace

// For tests and measurements. Null: as the table has it.
extern "C" __attribute__((visibility("default"))) void tlk_force_cross_entropy_strategy(const char* name) {
  forced_cross_entropy_strategy() = nullptr;
  for (const CrossEntropyStrategy& strategy : kCrossEntropyStrategies)
    if (name && strcmp(name, strategy.name) == 0) forced_cross_entropy_strategy() = strategy.name;
}

TORCH_LIBRARY_IMPL(tlkernels, CUDA, m) {
  m.impl("cross_entropy_fwd", forward);
  m.impl("cross_entropy_fwd_stats", forward_stats);
  m.impl("cross_entropy_bwd", backward);
  m.impl("cross_entropy_bwd_", backward_);
  m.impl("cross_entropy_total", total);
  m.impl("cross_entropy_step", step);
}

}  // namespace tlk
