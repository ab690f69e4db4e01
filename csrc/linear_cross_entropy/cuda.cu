// Linear cross entropy on CUDA tensors: a sweep over chunks of rows, of which the library makes the logits. The kernels
// of cross entropy turn them into losses and, in their place, gradients. The schemas and what they mean are in
// tlkernels/losses/linear_cross_entropy/ops.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "../cross_entropy/cuda_call.h"
#include "../core/cuda/linear_sweep.h"

namespace tlk {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class Pointer>
Pointer advanced(Pointer data, int64_t elements, size_t size) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return data ? static_cast<Pointer>(static_cast<Byte*>(data) + elements * int64_t(size)) : data;
}

// The pointers are those of the first row.
struct Call : CrossEntropyOnTensors {
  const LinearLayer layer;

  Call(const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias, const Tensor& target_,
       const CrossEntropyOptions& options)
      : CrossEntropyOnTensors(input, logits_sizes(input, linear_weight), {input.size(0)}, linear_weight.size(0),
                              target_, options),
        layer("linear", input, linear_weight, linear_bias) {
    axes = 1;
    peaks_ = output(peak, compute);
    log_sums_ = output(log_sum, compute);
  }

  // logsumexp of each row's logits, after softcap and temperature.
  Tensor lse() const { return peaks_.mul((softcap ? softcap : 1) * inv_temperature).add_(log_sums_); }

  std::array<Tensor, 3> run(std::array<bool, 3> needs);

 private:
  static std::array<int64_t, 2> logits_sizes(const Tensor& input, const Tensor& linear_weight) {
    TORCH_CHECK_VALUE(input.dim() == 2, "input: expected shape (rows, features), got ", input.sizes());
    TORCH_CHECK_VALUE(linear_weight.dim() == 2, "linear_weight: expected shape (classes, ", input.size(1), "), got ",
                      linear_weight.sizes());
    return {input.size(0), linear_weight.size(0)};
  }

  void run_chunk(int64_t begin, Tensor& logits, bool with_gradient) const;

  // Rows that are ignored and whose lse gets no gradient.
  Tensor absent() const {
    if (!indices) return {};
    const Tensor ignored = target.eq(ignore_index);
    return (upstream_lse_.defined() ? ignored.logical_and(upstream_lse_.eq(0)) : ignored).unsqueeze(1);
  }

  Tensor peaks_, log_sums_;
};

std::array<Tensor, 3> Call::run(std::array<bool, 3> needs) {
  DeviceLinearSweep sweep(layer, needs, needs[0] || needs[1] ? absent() : Tensor());
  for (int64_t begin = 0; begin < rows; begin += sweep.chunk_rows()) {
    const int64_t end = std::min(rows, begin + sweep.chunk_rows());
    Tensor logits = sweep.logits(begin, end);
    run_chunk(begin, logits, sweep.differentiates());
    if (sweep.differentiates()) sweep.take(begin, end, logits);
  }
  return sweep.gradients();
}

// Losses of a chunk, and in the place of its logits their gradient.
void Call::run_chunk(int64_t begin, Tensor& logits, bool with_gradient) const {
  const size_t bytes = c10::elementSize(compute);
  CrossEntropy part = *this;
  part.size[0] = part.rows = logits.size(0);
  part.x.data = logits.const_data_ptr();
  part.x.stride[0] = classes;
  part.x.class_stride = 1;
  Tensor probabilities;
  if (indices) {
    part.indices = indices + begin;
  } else {
    probabilities = target.narrow(0, begin, part.rows);
    if (probabilities.scalar_type() != logits.scalar_type()) probabilities = probabilities.to(compute);
    part.probabilities.data = probabilities.const_data_ptr();
    part.probabilities.stride[0] = probabilities.stride(0);
    part.probabilities.class_stride = probabilities.stride(1);
  }
  part.peak = advanced(peak, begin, bytes);
  part.log_sum = advanced(log_sum, begin, bytes);
  part.loss = advanced(loss, begin, bytes);
  part.entropy = advanced(entropy, begin, bytes);
  part.correct = correct ? correct + begin : nullptr;
  part.grad_loss.data = advanced(grad_loss.data, begin * grad_loss.stride, bytes);
  part.grad_lse.data = advanced(grad_lse.data, begin * grad_lse.stride, bytes);
  if (with_gradient) {
    part.grad.data = logits.mutable_data_ptr();
    part.grad.stride[0] = classes;
    part.grad.class_stride = 1;
  }
  launch(part, logits.scalar_type(), indices ? logits.scalar_type() : probabilities.scalar_type());
}

Tensor forward(const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias,
               const Tensor& target, const OptionalTensor& weight, int64_t ignore_index, double label_smoothing,
               double temperature, std::optional<double> softcap, double z_loss) {
  const Guards guards;
  Call call(input, linear_weight, linear_bias, target,
            {weight, ignore_index, label_smoothing, temperature, softcap, z_loss});
  Tensor losses = call.output(call.loss, call.compute);
  call.run({});
  return losses;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_stats(const Tensor& input, const Tensor& linear_weight,
                                                         const OptionalTensor& linear_bias, const Tensor& target,
                                                         const OptionalTensor& weight, int64_t ignore_index,
                                                         double label_smoothing, double temperature,
                                                         std::optional<double> softcap, double z_loss) {
  const Guards guards;
  Call call(input, linear_weight, linear_bias, target,
            {weight, ignore_index, label_smoothing, temperature, softcap, z_loss});
  call.skip_ignored = false;  // their lse and entropy are asked for too
  Tensor losses = call.output(call.loss, call.compute), entropies = call.output(call.entropy, call.compute);
  void* flags = nullptr;
  Tensor correct = call.output(flags, at::kBool);
  call.correct = static_cast<bool*>(flags);
  call.run({});
  return {losses, call.lse(), entropies, correct};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_loss, const OptionalTensor& grad_lse,
                                            const Tensor& input, const Tensor& linear_weight,
                                            const OptionalTensor& linear_bias, const Tensor& target,
                                            const OptionalTensor& weight, int64_t ignore_index, double label_smoothing,
                                            double temperature, std::optional<double> softcap, double z_loss,
                                            bool needs_input, bool needs_weight, bool needs_bias) {
  const Guards guards;
  Call call(input, linear_weight, linear_bias, target,
            {weight, ignore_index, label_smoothing, temperature, softcap, z_loss});
  call.use_upstream(grad_loss, grad_lse);
  auto [by_input, by_weight, by_bias] = call.run({needs_input, needs_weight, needs_bias});
  return {by_input, by_weight, by_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> step(const Tensor& input, const Tensor& linear_weight,
                                                const OptionalTensor& linear_bias, const Tensor& target,
                                                const OptionalTensor& weight, int64_t ignore_index,
                                                double label_smoothing, double temperature,
                                                std::optional<double> softcap, double z_loss, bool mean,
                                                bool needs_input, bool needs_weight, bool needs_bias) {
  const Guards guards;
  Call call(input, linear_weight, linear_bias, target,
            {weight, ignore_index, label_smoothing, temperature, softcap, z_loss});
  if (mean) call.divide_by_what_counts();
  const Tensor losses = call.output(call.loss, call.compute);
  auto [by_input, by_weight, by_bias] = call.run({needs_input, needs_weight, needs_bias});
  return {call.sum_of(losses), by_input, by_weight, by_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(tlkernels, CUDA, m) {
  m.impl("linear_cross_entropy_fwd", forward);
  m.impl("linear_cross_entropy_fwd_stats", forward_stats);
  m.impl("linear_cross_entropy_bwd", backward);
  m.impl("linear_cross_entropy_step", step);
}

}  // namespace tlk
