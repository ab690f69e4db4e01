// The ops of selective_log_softmax, the same on every device. Their schemas, with what they return, are in
// tlkernels/losses/selective_log_softmax/ops.py.
#pragma once
#include <torch/library.h>

#include <tuple>

#include "../cross_entropy/ops.h"
#include "call.h"

namespace tlk {

// `DeviceCall` is CpuCrossEntropyCall or CudaCrossEntropyCall, `Kernels` CpuSelective or CudaSelective.
template <class DeviceCall, class Kernels>
struct SelectiveLogSoftmaxOps {
  using Tensor = at::Tensor;
  using OptionalTensor = std::optional<Tensor>;

  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& index,
                                                            double temperature, std::optional<double> softcap,
                                                            bool with_entropy) {
    const Guards guards;
    SelectiveCall selected(logits.scalar_type(), index, rows_of(logits), logits.size(1), temperature, softcap);
    const Kernels kernels(logits);
    kernels.prepare(selected);
    CrossEntropyOnLogits<DeviceCall> call(logits, selected.target, selected.options());
    const Tensor peak = call.output(call.peak), log_sum = call.output(call.log_sum);
    const Tensor entropy = with_entropy ? call.output(call.entropy) : at::empty({0}, peak.options());
    call.run();
    selected.use_normaliser(peak, log_sum, entropy);
    const Tensor log_probs = selected.output();
    kernels.write_log_probs(selected.of(logits), logits.scalar_type());
    return {log_probs, entropy, peak, log_sum};
  }

  static Tensor backward(const Tensor& grad_log_probs, const OptionalTensor& grad_entropy, const Tensor& logits,
                         const Tensor& index, const Tensor& peak, const Tensor& log_sum, const Tensor& entropy,
                         double temperature, std::optional<double> softcap) {
    const Guards guards;
    SelectiveCall selected(logits.scalar_type(), index, rows_of(logits), logits.size(1), temperature, softcap);
    const Kernels kernels(logits);
    selected.use_upstream(grad_log_probs, grad_entropy);
    selected.use_normaliser(peak, log_sum, entropy);
    kernels.prepare(selected);
    kernels.gather(selected.of(logits), logits.scalar_type());
    CrossEntropyOnLogits<DeviceCall> call(logits, selected.target, selected.options());
    selected.pass_on(call);
    const Tensor grad = call.empty_gradient();
    call.run(grad);
    kernels.write_gradients(selected.of(grad), grad.scalar_type());
    return grad;
  }

  static void implement(torch::Library& m) {
    m.impl("selective_log_softmax_fwd", forward);
    m.impl("selective_log_softmax_bwd", backward);
  }

 private:
  static int64_t rows_of(const Tensor& logits) {
    TORCH_CHECK_VALUE(logits.dim() == 2, "logits: expected shape (rows, classes), got ", logits.sizes());
    return logits.size(0);
  }
};

}  // namespace tlk
