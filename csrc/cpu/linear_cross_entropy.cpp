// Linear cross entropy on CPU tensors: checks that the kernels rely on, and a sweep over chunks of rows. The products
// are in linear_chunks.cpp, a row's loss and gradient in the kernels of cross entropy. The schemas and what they mean
// are in tlkernels/losses/linear_cross_entropy/ops.py.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "linear_chunks.h"
#include "tensor.h"

namespace tlk {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class Pointer>
Pointer advanced(Pointer data, int64_t elements, size_t size) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return data ? static_cast<Pointer>(static_cast<Byte*>(data) + elements * int64_t(size)) : data;
}

// A call, and the tensors that it points into. The pointers are those of the first row.
struct Call : CrossEntropy {
  // Products and sums in here are not autograd's, nor autocast's: the call has them in the types that they need.
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKey::AutocastCPU};

  const Tensor input, linear_weight, linear_bias;
  Tensor target, weight_, peaks, log_sums;
  const at::ScalarType type, compute;  // of the logits; of a loss
  double denominator = 0;              // of the mean

  Call(const Tensor& input_, const Tensor& linear_weight_, const OptionalTensor& linear_bias_, const Tensor& target_,
       const OptionalTensor& weight_in, int64_t ignore, double smoothing_, double temperature,
       std::optional<double> softcap_, double z_loss_)
      : input(input_),
        linear_weight(linear_weight_),
        linear_bias(linear_bias_.value_or(Tensor())),
        target(target_),
        type(product_type(input_.scalar_type())),
        compute(compute_type(input_.scalar_type())) {
    TORCH_CHECK_VALUE(input.dim() == 2, "input: expected shape (rows, features), got ", input.sizes());
    TORCH_CHECK_VALUE(linear_weight.dim() == 2 && linear_weight.size(1) == input.size(1) && linear_weight.size(0) > 0,
                      "linear_weight: expected shape (classes, ", input.size(1), "), got ", linear_weight.sizes());
    TORCH_CHECK_TYPE(linear_weight.scalar_type() == input.scalar_type(), "linear_weight: expected the input's dtype ",
                     input.scalar_type(), ", got ", linear_weight.scalar_type());
    rows = input.size(0);
    classes = linear_weight.size(0);
    if (linear_bias.defined()) {
      TORCH_CHECK_VALUE(linear_bias.dim() == 1 && linear_bias.size(0) == classes, "linear_bias: expected shape (",
                        classes, "), got ", linear_bias.sizes());
      TORCH_CHECK_TYPE(linear_bias.scalar_type() == input.scalar_type(), "linear_bias: expected the input's dtype ",
                       input.scalar_type(), ", got ", linear_bias.scalar_type());
    }
    axes = 1;
    ignore_index = ignore;
    smoothing = smoothing_;
    inv_temperature = 1 / temperature;
    softcap = softcap_.value_or(0);
    z_loss = z_loss_;
    weight_sum = double(classes);
    if (weight_in) {
      TORCH_CHECK_VALUE(weight_in->dim() == 1 && weight_in->size(0) == classes, "weight: expected ", classes,
                        " numbers, one per class, got shape ", weight_in->sizes());
      weight_ = weight_in->to(compute).contiguous();
      weight = weight_.const_data_ptr();
      weight_sum = sum_in_order(weight_);
    }
    if (target.is_floating_point()) {
      TORCH_CHECK_VALUE(target.dim() == 2 && target.size(0) == rows && target.size(1) == classes,
                        "target: expected probabilities of shape (", rows, ", ", classes, "), got ", target.sizes());
      denominator = double(rows);
    } else {
      TORCH_CHECK_VALUE(target.dim() == 1 && target.size(0) == rows, "target: expected ", rows,
                        " class indices, one per row, got shape ", target.sizes());
      target = target.to(at::kLong).contiguous();
      indices = target.const_data_ptr<int64_t>();
      compute == at::kDouble ? check_indices<double>() : check_indices<float>();
    }
    peaks = output(peak, compute);
    log_sums = output(log_sum, compute);
  }

  template <class A>
  void check_indices() {
    const A* w = static_cast<const A*>(weight);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t y = indices[i];
      if (y == ignore_index) continue;
      TORCH_CHECK_INDEX(y >= 0 && y < classes, "target: expected class indices in [0, ", classes, ") or ignore_index (",
                        ignore_index, "), got ", y, " at row ", i);
      denominator += w ? double(w[y]) : 1.0;
    }
  }

  // A tensor of a value per row, and its memory for the kernel.
  Tensor output(void*& slot, at::ScalarType dtype) {
    Tensor t = at::empty({rows}, input.options().dtype(dtype));
    slot = t.data_ptr();
    return t;
  }

  // The targets' type beside these logits.
  at::ScalarType probabilities_type() const { return target.scalar_type() == type ? type : compute; }

  std::array<Tensor, 3> run(std::array<bool, 3> needs);

 private:
  void run_chunk(int64_t begin, Tensor& logits, bool with_gradient) const;
};

std::array<Tensor, 3> Call::run(std::array<bool, 3> needs) {
  const bool copied = !indices && (target.scalar_type() != probabilities_type() || target.stride(1) != 1);
  const bool with_gradient = needs[0] || needs[1] || needs[2];
  LinearSweep sweep(input, linear_weight, linear_bias, needs,
                    copied ? classes * int64_t(c10::elementSize(probabilities_type())) : 0);
  for (int64_t begin = 0; begin < rows; begin += sweep.chunk_rows()) {
    const int64_t end = std::min(rows, begin + sweep.chunk_rows());
    Tensor logits = sweep.logits(begin, end);
    run_chunk(begin, logits, with_gradient);
    if (with_gradient) sweep.take(begin, end, logits);
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
  backward.normaliser_given = true;
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
  Call call(input, linear_weight, linear_bias, target, weight, ignore_index, label_smoothing, temperature, softcap,
            z_loss);
  Tensor losses = call.output(call.loss, call.compute);
  call.run({false, false, false});
  return losses;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_stats(const Tensor& input, const Tensor& linear_weight,
                                                         const OptionalTensor& linear_bias, const Tensor& target,
                                                         const OptionalTensor& weight, int64_t ignore_index,
                                                         double label_smoothing, double temperature,
                                                         std::optional<double> softcap, double z_loss) {
  Call call(input, linear_weight, linear_bias, target, weight, ignore_index, label_smoothing, temperature, softcap,
            z_loss);
  call.skip_ignored = false;  // their lse and entropy are asked for too
  Tensor losses = call.output(call.loss, call.compute), entropies = call.output(call.entropy, call.compute);
  void* flags = nullptr;
  Tensor correct = call.output(flags, at::kBool);
  call.correct = static_cast<bool*>(flags);
  call.run({false, false, false});
  const double to_z = softcap.value_or(1) / temperature;
  return {losses, call.peaks.mul(to_z).add_(call.log_sums), entropies, correct};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_loss, const OptionalTensor& grad_lse,
                                            const Tensor& input, const Tensor& linear_weight,
                                            const OptionalTensor& linear_bias, const Tensor& target,
                                            const OptionalTensor& weight, int64_t ignore_index, double label_smoothing,
                                            double temperature, std::optional<double> softcap, double z_loss,
                                            bool needs_input, bool needs_weight, bool needs_bias) {
  Call call(input, linear_weight, linear_bias, target, weight, ignore_index, label_smoothing, temperature, softcap,
            z_loss);
  const auto per_row = [&](const char* name, const Tensor& values, Tensor& kept) {
    TORCH_CHECK_VALUE(values.dim() == 1 && values.size(0) == call.rows, name, ": expected ", call.rows,
                      " numbers, one per row, got shape ", values.sizes());
    kept = values.to(call.compute);
    return per_position(kept);
  };
  Tensor upstream, upstream_lse;
  call.grad_loss = per_row("grad_loss", grad_loss, upstream);
  if (grad_lse) {
    call.grad_lse = per_row("grad_lse", *grad_lse, upstream_lse);
    call.skip_ignored = false;
  }
  auto [by_input, by_weight, by_bias] = call.run({needs_input, needs_weight, needs_bias});
  return {by_input, by_weight, by_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> step(const Tensor& input, const Tensor& linear_weight,
                                                const OptionalTensor& linear_bias, const Tensor& target,
                                                const OptionalTensor& weight, int64_t ignore_index,
                                                double label_smoothing, double temperature,
                                                std::optional<double> softcap, double z_loss, bool mean,
                                                bool needs_input, bool needs_weight, bool needs_bias) {
  Call call(input, linear_weight, linear_bias, target, weight, ignore_index, label_smoothing, temperature, softcap,
            z_loss);
  const double denominator = mean ? call.denominator : 1;
  const double wide = 1 / denominator;
  const float narrow = float(wide);
  call.grad_loss.data = call.compute == at::kDouble ? static_cast<const void*>(&wide) : &narrow;
  const Tensor losses = call.output(call.loss, call.compute);
  auto [by_input, by_weight, by_bias] = call.run({needs_input, needs_weight, needs_bias});
  return {at::scalar_tensor(sum_in_order(losses) / denominator, losses.options()), by_input, by_weight, by_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(tlkernels, CPU, m) {
  m.impl("linear_cross_entropy_fwd", forward);
  m.impl("linear_cross_entropy_fwd_stats", forward_stats);
  m.impl("linear_cross_entropy_bwd", backward);
  m.impl("linear_cross_entropy_step", step);
}

}  // namespace tlk
