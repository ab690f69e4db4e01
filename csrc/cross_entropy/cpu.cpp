// Cross entropy on CPU tensors: checks that the kernels rely on, memory, layout, threads. The schemas and what they
// mean are in tlkernels/losses/cross_entropy/ops.py.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>

#include "cpu_call.h"

namespace tlk {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Call : CheckedCrossEntropy {
  Tensor input;

  Call(const Tensor& input_, const Tensor& target_, const CrossEntropyOptions& options)
      : CheckedCrossEntropy(input_.scalar_type(), input_.sizes(), positions(input_), input_.size(class_axis(input_)),
                            target_, options),
        input(input_) {
    if (!indices && target.scalar_type() != input.scalar_type()) target = target.to(compute);
  }

  // Fills in the layout and runs. `grad` may be undefined, or be the input itself.
  void run(const Tensor& grad_out);
};

void Call::run(const Tensor& grad_out) {
  if (rows == 0 || classes == 0) return;
  if (!lay_out(*this, input, grad_out)) {  // a view of many axes that do not merge
    TORCH_CHECK_VALUE(!grad_out.defined() || !grad_out.is_same(input),
                      "inplace_grad: expected an input of fewer non-mergeable axes, got strides ", input.strides());
    input = input.contiguous();
    target = target.contiguous();
    Tensor dense = grad_out.defined() ? empty_gradient(input) : grad_out;
    lay_out(*this, input, dense);
    run(dense);
    if (dense.defined()) grad_out.copy_(dense);
    return;
  }
  const Scalar type = scalar_of(input.scalar_type());
  const CrossEntropyKernels kernel =
      kernels().cross_entropy(type, indices ? type : scalar_of(target.scalar_type()), softcap != 0);
  const bool class_contiguous = classes == 1 || (x.class_stride == 1 && (indices || probabilities.class_stride == 1) &&
                                                 (!grad.data || grad.class_stride == 1));
  const int64_t bytes = classes * int64_t(c10::elementSize(compute));  // of a row in the compute type
  constexpr int64_t kGrain = 1 << 14;  // elements for which a second thread is worth its start
  // Of so few classes a vector would be mostly empty: positions fill it, though they have to be gathered.
  constexpr int64_t kNarrow = 8;
  if (class_contiguous && classes > kNarrow) {
    const bool stash =
        grad.data && !normaliser_given && classes <= kMaxStash && c10::elementSize(input.scalar_type()) == 2;
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / classes), [&](int64_t begin, int64_t end) {
      std::unique_ptr<char[]> scratch(stash ? new char[size_t(bytes)] : nullptr);
      kernel.rows(*this, begin, end, scratch.get());
    });
    return;
  }
  constexpr int64_t kScratch = 256 << 10;  // bytes: a quarter of a second-level cache, beside what streams through it
  const int64_t width = std::clamp<int64_t>(kScratch / bytes / 16 * 16, 16, kMaxTileWidth);
  const int64_t line = size[axes - 1], tiles = (line + width - 1) / width * (rows / line);
  at::parallel_for(0, tiles, std::max<int64_t>(1, kGrain / (classes * std::min(width, line))),
                   [&](int64_t begin, int64_t end) {
                     std::unique_ptr<char[]> scratch(new char[size_t(width * bytes)]);
                     kernel.tiles(*this, begin, end, int(width), scratch.get());
                   });
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
  Tensor grad = empty_gradient(input);
  backward_into(grad, grad_loss, grad_lse, peak, log_sum, call);
  return grad;
}

void backward_(const Tensor& grad_loss, const OptionalTensor& grad_lse, Tensor& input, const Tensor& target,
               const Tensor& peak, const Tensor& log_sum, const OptionalTensor& weight, int64_t ignore_index,
               double label_smoothing, double temperature, std::optional<double> softcap, double z_loss) {
  Call call(input, target, {weight, ignore_index, label_smoothing, temperature, softcap, z_loss});
  backward_into(input, grad_loss, grad_lse, peak, log_sum, call);
}

Tensor total(const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t ignore_index,
             double label_smoothing, double temperature, std::optional<double> softcap, double z_loss, bool mean) {
  Call call(input, target, {weight, ignore_index, label_smoothing, temperature, softcap, z_loss});
  const Tensor losses = call.output(call.loss, call.compute);
  call.run({});
  return sum_over(losses, mean ? call.denominator : 1);
}

std::tuple<Tensor, Tensor> step(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                int64_t ignore_index, double label_smoothing, double temperature,
                                std::optional<double> softcap, double z_loss, bool mean) {
  Call call(input, target, {weight, ignore_index, label_smoothing, temperature, softcap, z_loss});
  const double denominator = mean ? call.denominator : 1;
  call.use_upstream(1 / denominator);
  const Tensor losses = call.output(call.loss, call.compute);
  Tensor grad = empty_gradient(input);
  call.run(grad);
  return {sum_over(losses, denominator), grad};
}

}  // namespace

TORCH_LIBRARY_IMPL(tlkernels, CPU, m) {
  m.impl("cross_entropy_fwd", forward);
  m.impl("cross_entropy_fwd_stats", forward_stats);
  m.impl("cross_entropy_bwd", backward);
  m.impl("cross_entropy_bwd_", backward_);
  m.impl("cross_entropy_total", total);
  m.impl("cross_entropy_step", step);
}

}  // namespace tlk
