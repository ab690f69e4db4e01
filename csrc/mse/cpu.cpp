// The ops of squared errors on CPU tensors. Their schemas, with what they return, are in tlkernels/losses/mse/ops.py.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "../core/cpu/tensor.h"
#include "kernel.h"

namespace tlk {

TLK_KERNELS(SquaredTable, squared)

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Checks the arguments and keeps the tensors that the kernel's pointers point into.
struct CpuSquaredCall : Squared {
  Tensor input, target, weight_, grad_input, grad_target;
  const at::ScalarType compute;

  CpuSquaredCall(const Tensor& input_, const Tensor& target_, const OptionalTensor& weight_in)
      : input(input_),
        target(target_),
        weight_(weight_in.value_or(Tensor())),
        compute(compute_type(input_.scalar_type())) {
    bool aligned = input.is_non_overlapping_and_dense();  // and of the same strides: then their order does not matter
    for (const Tensor* t : {&target, &weight_}) {
      if (!t->defined()) continue;
      TORCH_CHECK_VALUE(t->sizes() == input.sizes(), "expected tensors of one shape, got ", input.sizes(), " and ",
                        t->sizes());
      TORCH_CHECK_TYPE(t->scalar_type() == input.scalar_type(), "expected tensors of one dtype, got ",
                       input.scalar_type(), " and ", t->scalar_type());
      aligned &= t->strides() == input.strides();
    }
    if (!aligned) {
      input = input.contiguous();
      target = target.contiguous();
      if (weight_.defined()) weight_ = weight_.contiguous();
    }
    size = input.numel();
    x = input.const_data_ptr();
    t = target.const_data_ptr();
    if (weight_.defined()) weight = weight_.const_data_ptr();
  }

  void make_gradients(std::array<bool, 2> needs) {
    const auto [needs_input, needs_target] = needs;
    grad_input = needs_input ? empty_gradient(input) : at::empty({0}, input.options());
    grad_target = needs_target ? empty_gradient(target) : at::empty({0}, target.options());
    if (needs_input) grad_x = grad_input.mutable_data_ptr();
    if (needs_target) grad_t = grad_target.mutable_data_ptr();
  }

  void run() {
    const SquaredBlocks kernel = squared_kernels()(scalar_of(input.scalar_type()));
    const int64_t blocks = (size + kSquaredBlock - 1) / kSquaredBlock;
    constexpr int64_t kGrain = 8;  // blocks for which a second thread is worth its start
    at::parallel_for(0, blocks, kGrain, [&](int64_t first, int64_t last) { kernel(*this, first, last); });
  }

  // Runs, and returns the sum divided by `denominator`.
  Tensor run_sum(double denominator) {
    std::vector<double> parts(size_t((size + kSquaredBlock - 1) / kSquaredBlock));
    sums = parts.data();
    run();
    double total = 0;
    for (const double part : parts) total += part;
    return at::scalar_tensor(total / denominator, input.options().dtype(compute));
  }
};

Tensor forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight) {
  CpuSquaredCall call(input, target, weight);
  Tensor values = at::empty_like(call.input, call.input.options().dtype(call.compute));
  call.values = values.mutable_data_ptr();
  call.run();
  return values;
}

Tensor sum(const Tensor& input, const Tensor& target, const OptionalTensor& weight) {
  return CpuSquaredCall(input, target, weight).run_sum(1);
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                                    const OptionalTensor& weight, std::array<bool, 2> needs) {
  CpuSquaredCall call(input, target, weight);
  TORCH_CHECK_VALUE(grad.dim() == 0 || grad.sizes() == input.sizes(), "grad: expected one number or shape ",
                    input.sizes(), ", got ", grad.sizes());
  Tensor upstream = grad.to(call.compute);
  if (upstream.dim() > 0 && upstream.strides() != call.input.strides())
    upstream = at::empty_like(call.input, upstream.options()).copy_(upstream);
  call.grad = {upstream.const_data_ptr(), upstream.dim() > 0 ? 1 : 0};
  call.make_gradients(needs);
  call.run();
  return {call.grad_input, call.grad_target};
}

std::tuple<Tensor, Tensor, Tensor> step(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                        double denominator, std::array<bool, 2> needs) {
  CpuSquaredCall call(input, target, weight);
  OneForAll upstream;
  if (needs[0] || needs[1]) call.grad = upstream.set(1 / denominator, call.compute);
  call.make_gradients(needs);
  const Tensor loss = call.run_sum(denominator);
  return {loss, call.grad_input, call.grad_target};
}

}  // namespace

TORCH_LIBRARY_IMPL(tlkernels, CPU, m) {
  m.impl("mse_fwd", forward);
  m.impl("mse_sum", sum);
  m.impl("mse_bwd", backward);
  m.impl("mse_step", step);
}

}  // namespace tlk
