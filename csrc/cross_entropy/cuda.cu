// Cross entropy on CUDA tensors: memory, layout, launches. Nothing waits for the device. The schemas and what they mean
// are in tlkernels/losses/cross_entropy/ops.py.
#include "cuda.cuh"
#include "../core/cuda/sum.cuh"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cuda_call.h"

namespace tlk {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

CrossEntropyOnTensors::CrossEntropyOnTensors(const Tensor& like, at::IntArrayRef logits, PositionSizes shape_,
                                             int64_t classes_, const Tensor& target_,
                                             const CrossEntropyOptions& options)
    : CrossEntropyCall(like.scalar_type(), logits, std::move(shape_), classes_, target_, options), device(like) {
  if (indices) check_classes(target, classes, ignore_index);
}

Tensor CrossEntropyOnTensors::parts() const { return at::empty({kMostParts}, target.options().dtype(at::kDouble)); }

void CrossEntropyOnTensors::divide_by_what_counts() {
  if (!indices) {
    factor = 1 / double(rows);
    return;
  }
  divisor_ = at::empty({}, target.options().dtype(at::kDouble));
  double* const out = divisor_.mutable_data_ptr<double>();
  divisor = out;
  const Tensor scratch = parts();
  double* const memory = scratch.mutable_data_ptr<double>();
  const auto count = [&](auto* by_class) {
    using A = std::remove_const_t<std::remove_pointer_t<decltype(by_class)>>;
    const Counted<A> counted{indices, ignore_index, classes, by_class};
    return sum(counted, rows, 1.0, nullptr, out, memory, device.stream());
  };
  const cudaError_t error =
      compute == at::kDouble ? count(static_cast<const double*>(weight)) : count(static_cast<const float*>(weight));
  check_launch(error, "cross_entropy: count");
  // As in PyTorch, where only weights of 0 count: elsewhere 0 / 0 says so.
  if (weight && (smoothing != 0 || z_loss != 0)) divisor_.masked_fill_(divisor_.eq(0), NAN);
}

Tensor CrossEntropyOnTensors::sum_of(const Tensor& losses) const {
  const Tensor result = at::empty({}, losses.options()), scratch = parts();
  double* const memory = scratch.mutable_data_ptr<double>();
  const auto add = [&](auto* out) {
    using A = std::remove_pointer_t<decltype(out)>;
    const Values<A> values{static_cast<const A*>(losses.const_data_ptr())};
    return sum(values, rows, factor, divisor, out, memory, device.stream());
  };
  const cudaError_t error =
      compute == at::kDouble ? add(result.mutable_data_ptr<double>()) : add(result.mutable_data_ptr<float>());
  check_launch(error, "cross_entropy: sum");
  return result;
}

void CrossEntropyOnTensors::launch(const CrossEntropy& part, at::ScalarType logits,
                                   at::ScalarType probabilities) const {
  CrossEntropyOnDevice call;
  static_cast<CrossEntropy&>(call) = part;
  call.factor = factor;
  call.divisor = divisor;
  call.wide_probabilities = !indices && probabilities == compute;
  const auto run = [&]() -> cudaError_t {
    switch (scalar_of(logits)) {
      case Scalar::f64:
        return cross_entropy<double>(call, device.stream());
      case Scalar::f32:
        return cross_entropy<float>(call, device.stream());
      case Scalar::bf16:
        return cross_entropy<bf16>(call, device.stream());
      case Scalar::f16:
        return cross_entropy<f16>(call, device.stream());
    }
    return cudaErrorInvalidValue;
  };
  check_launch(run(), "cross_entropy");
}

namespace {

struct Call : CrossEntropyOnTensors {
  Tensor input;

  Call(const Tensor& input_, const Tensor& target_, const CrossEntropyOptions& options)
      : CrossEntropyOnTensors(input_, input_.sizes(), positions(input_), input_.size(class_axis(input_)), target_,
                              options),
        input(input_) {
    if (!indices && target.scalar_type() != input.scalar_type()) target = target.to(compute);
  }

  // Runs. `grad` may be undefined, or be the input itself.
  void run(const Tensor& grad);
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
  launch(*this, input.scalar_type(), target.scalar_type());
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
