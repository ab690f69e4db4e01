// The ops of linear_selective_log_softmax, the same on every device. Their schemas, with what they return, are in
// tlkernels/losses/linear_selective_log_softmax/ops.py.
#pragma once
#include <torch/library.h>

#include <tuple>

#include "../linear_cross_entropy/ops.h"
#include "../selective_log_softmax/call.h"

namespace tlk {

// `DeviceCall`, `Sweep` and `Kernels` are those of one device, as in linear cross entropy and selective_log_softmax.
template <class DeviceCall, class Sweep, class Kernels>
struct LinearSelectiveLogSoftmaxOps {
  using Tensor = at::Tensor;
  using OptionalTensor = std::optional<Tensor>;

  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& linear_weight,
                                                            const OptionalTensor& linear_bias, const Tensor& index,
                                                            double temperature, std::optional<double> softcap,
                                                            bool with_entropy) {
    const Guards guards;
    Call call(input, linear_weight, linear_bias, index, temperature, softcap);
    SelectiveCall& selected = call.selected;
    const Tensor peak = call.output(call.peak), log_sum = call.output(call.log_sum);
    const Tensor entropy = with_entropy ? call.output(call.entropy) : at::empty({0}, peak.options());
    selected.use_normaliser(peak, log_sum, entropy);
    const Tensor log_probs = selected.output();
    call.run({}, nothing, [&](int64_t begin, const Tensor& logits) {
      call.kernels.write_log_probs(selected.of(logits, begin), logits.scalar_type());
    });
    return {call.spread(log_probs).masked_fill_(index.eq(-1), -INFINITY), with_entropy ? call.spread(entropy) : entropy,
            call.spread(peak), call.spread(log_sum)};
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_log_probs, const OptionalTensor& grad_entropy,
                                                     const Tensor& input, const Tensor& linear_weight,
                                                     const OptionalTensor& linear_bias, const Tensor& index,
                                                     const Tensor& peak, const Tensor& log_sum, const Tensor& entropy,
                                                     double temperature, std::optional<double> softcap,
                                                     LinearNeeds needs) {
    const Guards guards;
    Call call(input, linear_weight, linear_bias, index, temperature, softcap);
    SelectiveCall& selected = call.selected;
    selected.use_upstream(call.kept(grad_log_probs), call.kept(grad_entropy));
    selected.use_normaliser(call.kept(peak), call.kept(log_sum), grad_entropy ? call.kept(entropy) : entropy);
    call.kernels.prepare(selected);
    selected.pass_on(call);
    const auto [grad_input, grad_weight, grad_bias] = call.run(
        needs,
        [&](int64_t begin, const Tensor& logits) {
          call.kernels.gather(selected.of(logits, begin), logits.scalar_type());
        },
        [&](int64_t begin, const Tensor& logits) {
          call.kernels.write_gradients(selected.of(logits, begin), logits.scalar_type());
        });
    return {grad_input, grad_weight, grad_bias};
  }

  static void implement(torch::Library& m) {
    m.impl("linear_selective_log_softmax_fwd", forward);
    m.impl("linear_selective_log_softmax_bwd", backward);
  }

 private:
  static void nothing(int64_t, const Tensor&) {}

  // A call with all rows, of which those without a class are ignored, and the classes of the rows that are multiplied.
  struct Rows {
    const Kernels kernels;
    SelectiveCall all;

    Rows(const Tensor& input, const Tensor& linear_weight, const Tensor& index, double temperature,
         std::optional<double> softcap)
        : kernels(input), all(input.scalar_type(), index, input.size(0), linear_weight.size(0), temperature, softcap) {
      kernels.prepare(all);
    }
  };
  struct Call : Rows, CrossEntropyOnFeatures<DeviceCall, Sweep> {
    using Features = CrossEntropyOnFeatures<DeviceCall, Sweep>;
    using Rows::kernels;
    const Tensor index;  // of the rows that are multiplied
    SelectiveCall selected;

    Call(const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias, const Tensor& all_index,
         double temperature, std::optional<double> softcap)
        : Rows(input, linear_weight, all_index, temperature, softcap),
          Features(input, linear_weight, linear_bias, Rows::all.target, Rows::all.options()),
          index(counted(all_index)),
          selected(input.scalar_type(), index, Features::rows, Features::classes, temperature, softcap) {
      kernels.prepare(selected);
    }

   private:
    Tensor counted(const Tensor& all_index) {
      this->select(std::nullopt, std::nullopt);
      return this->kept(all_index);
    }
  };
};

}  // namespace tlk
