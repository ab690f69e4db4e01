// Linear cross entropy on CPU tensors: checks that the kernels rely on, and a sweep over chunks of rows. The products
// are in linear_chunks.cpp, a row's loss and gradient in the kernels of cross entropy. The schemas and what they mean
// are in tlkernels/losses/linear_cross_entropy/ops.py.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "../cross_entropy/cpu_call.h"
#include "../core/cpu/linear_sweep.h"

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
struct Call : CheckedCrossEntropy {
  const LinearLayer layer;
  const at::ScalarType type;  // of the logits

  Call(const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias, const Tensor& target_,
       const CrossEntropyOptions& options)
      : CheckedCrossEntropy(input.scalar_type(), logits_sizes(input, linear_weight), {input.size(0)},
                            linear_weight.size(0), target_, options),
        layer("linear", input, linear_weight, linear_bias),
        type(product_type(input.scalar_type())) {
    axes = 1;
    peaks_ = output(peak, compute);
    log_sums_ = output(log_sum, compute);
  }

  // logsumexp of each row's logits, after softcap and temperature.
  Tensor lse() const { return peaks_.mul((softcap ? softcap : 1) * inv_temperature).add_(log_sums_); }

  // The targets' type beside these logits.
  at::ScalarType probabilities_type() const { return target.scalar_type() == type ? type : compute; }

  std::array<Tensor, 3> run(std::array<bool, 3> needs);

 private:
  static std::array<int64_t, 2> logits_sizes(const Tensor& input, const Tensor& linear_weight) {
    TORCH_CHECK_VALUE(input.dim() == 2, "input: expected shape (rows, features), got ", input.sizes());
    TORCH_CHECK_VALUE(linear_weight.dim() == 2, "linear_weight: expected shape (classes, ", input.size(1), "), got ",
                      linear_weight.sizes());
    return {input.size(0), linear_weight.size(0)};
  }

  void run_chunk(int64_t begin, Tensor& logits, bool with_gradient) const;
  std::vector<int64_t> absent() const;

  Tensor peaks_, log_sums_;
};

// Rows that are ignored and whose lse gets no gradient.
std::vector<int64_t> Call::absent() const {
  const auto by_lse = [&](int64_t i) {
    if (!grad_lse.data) return 0.0;
    return compute == at::kDouble ? static_cast<const double*>(grad_lse.data)[i * grad_lse.stride]
                                  : double(static_cast<const float*>(grad_lse.data)[i * grad_lse.stride]);
  };
  std::vector<int64_t> found;
  for (int64_t i = 0; indices && i < rows; ++i)
    if (indices[i] == ignore_index && by_lse(i) == 0) found.push_back(i);
  return found;
}

std::array<Tensor, 3> Call::run(std::array<bool, 3> needs) {
  const bool copied = !indices && (target.scalar_type() != probabilities_type() || target.stride(1) != 1);
  LinearSweep sweep(layer, needs, copied ? classes * int64_t(c10::elementSize(probabilities_type())) : 0, absent());
  for (int64_t begin = 0; begin < rows; begin += sweep.chunk_rows()) {
    const int64_t end = std::min(rows, begin + sweep.chunk_rows());
    Tensor logits = sweep.logits(begin, end);
    run_chunk(begin, logits, sweep.differentiates());
    if (sweep.differentiates()) sweep.take(begin, end, logits);
  }
  return sweep.gradients();
}

// Losses of a chunk; then the logits' gradient takes the logits' place.
void Call::run_chunk(int64_t begin, Tensor& logits, bool with_gradient) const {
  const size_t bytes = c10::elementSize(compute);
  CrossEntropy forward = *this;
  forward.size[0] = forward.rows = logits.size(0);
  forward.x.data = logits.const_data_ptr();
  forward.x.stride[0] = classes;
  forward.x.class_stride = 1;
  Tensor probabilities;
  if (indices) {
    forward.indices = indices + begin;
  } else {
    probabilities = target.narrow(0, begin, forward.rows).to(probabilities_type());
    if (probabilities.stride(1) != 1) probabilities = probabilities.contiguous();
    forward.probabilities.data = probabilities.const_data_ptr();
    forward.probabilities.stride[0] = probabilities.stride(0);
    forward.probabilities.class_stride = 1;
  }
  forward.peak = advanced(peak, begin, bytes);
  forward.log_sum = advanced(log_sum, begin, bytes);
  forward.loss = advanced(loss, begin, bytes);
  forward.entropy = advanced(entropy, begin, bytes);
  forward.correct = correct ? correct + begin : nullptr;

  // With the normaliser given, the kernel reads a logit before it writes there.
  CrossEntropy backward = forward;
  backward.normaliser_given = backward.skip_ignored = true;
  backward.loss = backward.entropy = nullptr;
  backward.correct = nullptr;
  backward.grad.data = logits.mutable_data_ptr();
  backward.grad.stride[0] = classes;
  backward.grad.class_stride = 1;
  backward.grad_loss.data = advanced(grad_loss.data, begin * grad_loss.stride, bytes);
  backward.grad_lse.data = advanced(grad_lse.data, begin * grad_lse.stride, bytes);

  const Scalar probabilities_scalar = scalar_of(indices ? type : probabilities_type());
  const CrossEntropyRows kernel = kernels().cross_entropy(scalar_of(type), probabilities_scalar, softcap != 0).rows;
  constexpr int64_t kGrain = 1 << 14;   // elements for which a second thread is worth its start
  constexpr int64_t kBlock = 64 << 10;  // elements that the second sweep finds in the second-level cache
  const int64_t block = std::max<int64_t>(1, kBlock / classes);
  at::parallel_for(0, forward.rows, std::max<int64_t>(1, kGrain / classes), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += block) {
      kernel(forward, i, std::min(last, i + block), nullptr);
      if (with_gradient) kernel(backward, i, std::min(last, i + block), nullptr);
    }
  });
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
  call.skip_ignored = !grad_lse;
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
  const double denominator = mean ? call.denominator : 1;
  call.use_upstream(1 / denominator);
  const Tensor losses = call.output(call.loss, call.compute);
  auto [by_input, by_weight, by_bias] = call.run({needs_input, needs_weight, needs_bias});
  return {sum_over(losses, denominator), by_input, by_weight, by_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(tlkernels, CPU, m) {
  m.impl("linear_cross_entropy_fwd", forward);
  m.impl("linear_cross_entropy_fwd_stats", forward_stats);
  m.impl("linear_cross_entropy_bwd", backward);
  m.impl("linear_cross_entropy_step", step);
}

}  // namespace tlk
