// Cross entropy on CPU tensors: checks that the kernels rely on, memory, layout, threads. The schemas and what they
// mean are in tlkernels/losses/cross_entropy/ops.py.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>

#include "tensor.h"

namespace tlk {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = c10::SmallVector<int64_t, 6>;

// A call and the tensors that it points into.
struct Call : CrossEntropy {
  Tensor input, target, weight_;
  at::ScalarType compute;
  Sizes shape;             // of a value per position
  double denominator = 0;  // of the mean

  Call(const Tensor& input_, const Tensor& target_, const OptionalTensor& weight_in, int64_t ignore, double smoothing_,
       double temperature, std::optional<double> softcap_, double z_loss_)
      : input(input_), target(target_), compute(compute_type(input_.scalar_type())) {
    TORCH_CHECK_VALUE(input.dim() > 0, "input: expected a class dimension, got a 0-d tensor");
    const int64_t class_axis = input.dim() == 1 ? 0 : 1;
    classes = input.size(class_axis);
    for (int64_t axis = 0; axis < input.dim(); ++axis)
      if (axis != class_axis) shape.push_back(input.size(axis));
    rows = c10::multiply_integers(shape);
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
    if (target.is_floating_point())
      use_probabilities();
    else
      use_indices();
  }

  void use_probabilities() {
    TORCH_CHECK_VALUE(target.sizes() == input.sizes(), "target: expected probabilities of the input's shape ",
                      input.sizes(), ", got ", target.sizes());
    if (target.scalar_type() != input.scalar_type()) target = target.to(compute);
    denominator = double(rows);
  }

  void use_indices() {
    TORCH_CHECK_VALUE(target.sizes() == at::IntArrayRef(shape), "target: expected class indices of shape ",
                      at::IntArrayRef(shape), ", got ", target.sizes());
    target = target.to(at::kLong).contiguous();
    indices = target.const_data_ptr<int64_t>();
    compute == at::kDouble ? check_indices<double>() : check_indices<float>();
  }

  template <class A>
  void check_indices() {
    const A* w = static_cast<const A*>(weight);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t y = indices[i];
      if (y == ignore_index) continue;
      TORCH_CHECK_INDEX(y >= 0 && y < classes, "target: expected class indices in [0, ", classes, ") or ignore_index (",
                        ignore_index, "), got ", y, " at position ", i);
      denominator += w ? double(w[y]) : 1.0;
    }
  }

  // A tensor of a value per position, and its memory for the kernel.
  Tensor output(void*& slot, at::ScalarType dtype) {
    Tensor t = at::empty(shape, input.options().dtype(dtype));
    slot = t.data_ptr();
    return t;
  }

  // Fills in the layout and runs. `grad` may be undefined, or be the input itself.
  void run(const Tensor& grad_out);

 private:
  bool lay_out(const Tensor& grad_out);
};

template <class Pointer>
void place(Strided<Pointer>& to, const Tensor& t, Pointer data, const Sizes& axes, int64_t class_axis) {
  to.data = data;
  for (size_t i = 0; i < axes.size(); ++i) to.stride[i] = t.stride(axes[i]);
  to.class_stride = t.stride(class_axis);
}

// Merges neighbouring axes that every tensor steps through as one. False if more than kMaxAxes are left.
bool Call::lay_out(const Tensor& grad_out) {
  const int64_t class_axis = input.dim() == 1 ? 0 : 1;
  c10::SmallVector<const Tensor*, 3> tensors = {&input};
  if (!indices) tensors.push_back(&target);
  if (grad_out.defined()) tensors.push_back(&grad_out);
  Sizes last;  // the innermost axis of each merged one: it has the stride
  Sizes sizes;
  for (int64_t axis = 0; axis < input.dim(); ++axis) {
    if (axis == class_axis || input.size(axis) == 1) continue;
    const bool merges = !last.empty() && std::all_of(tensors.begin(), tensors.end(), [&](const Tensor* t) {
      return t->stride(last.back()) == t->stride(axis) * t->size(axis);
    });
    if (merges) {
      last.back() = axis;
      sizes.back() *= input.size(axis);
    } else {
      last.push_back(axis);
      sizes.push_back(input.size(axis));
    }
  }
  if (last.size() > size_t(kMaxAxes)) return false;
  axes = std::max<int>(1, int(last.size()));
  size[0] = 1;
  std::copy(sizes.begin(), sizes.end(), size);
  place<const void*>(x, input, input.const_data_ptr(), last, class_axis);
  if (!indices) place<const void*>(probabilities, target, target.const_data_ptr(), last, class_axis);
  if (grad_out.defined()) place<void*>(grad, grad_out, grad_out.mutable_data_ptr(), last, class_axis);
  return true;
}

void Call::run(const Tensor& grad_out) {
  if (rows == 0 || classes == 0) return;
  if (!lay_out(grad_out)) {  // a view of many axes that do not merge
    TORCH_CHECK_VALUE(!grad_out.defined() || !grad_out.is_same(input),
                      "inplace_grad: expected an input of fewer non-mergeable axes, got strides ", input.strides());
    input = input.contiguous();
    target = target.contiguous();
    Tensor dense = grad_out.defined() ? empty_gradient(input) : grad_out;
    lay_out(dense);
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
  Call call(input, target, weight, ignore_index, label_smoothing, temperature, softcap, z_loss);
  Tensor loss = call.output(call.loss, call.compute);
  Tensor peak = call.output(call.peak, call.compute), log_sum = call.output(call.log_sum, call.compute);
  call.run({});
  return {loss, peak, log_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_stats(const Tensor& input, const Tensor& target,
                                                                 const OptionalTensor& weight, int64_t ignore_index,
                                                                 double label_smoothing, double temperature,
                                                                 std::optional<double> softcap, double z_loss) {
  Call call(input, target, weight, ignore_index, label_smoothing, temperature, softcap, z_loss);
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

void backward_into(const Tensor& grad, const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& input,
                   const Tensor& target, const Tensor& peak, const Tensor& log_sum, const OptionalTensor& weight,
                   int64_t ignore_index, double label_smoothing, double temperature, std::optional<double> softcap,
                   double z_loss) {
  Call call(input, target, weight, ignore_index, label_smoothing, temperature, softcap, z_loss);
  const Tensor peaks = peak.contiguous(), log_sums = log_sum.contiguous();
  call.normaliser_given = true;
  call.peak = const_cast<void*>(peaks.const_data_ptr());
  call.log_sum = const_cast<void*>(log_sums.const_data_ptr());
  Tensor upstream = grad_loss.to(call.compute), upstream_lse;
  call.grad_loss = per_position(upstream);
  if (grad_lse) {
    upstream_lse = grad_lse->to(call.compute);
    call.grad_lse = per_position(upstream_lse);
  }
  call.run(grad);
}

Tensor backward(const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& input, const Tensor& target,
                const Tensor& peak, const Tensor& log_sum, const OptionalTensor& weight, int64_t ignore_index,
                double label_smoothing, double temperature, std::optional<double> softcap, double z_loss) {
  Tensor grad = empty_gradient(input);
  backward_into(grad, grad_loss, grad_lse, input, target, peak, log_sum, weight, ignore_index, label_smoothing,
                temperature, softcap, z_loss);
  return grad;
}

void backward_(const Tensor& grad_loss, const OptionalTensor& grad_lse, Tensor& input, const Tensor& target,
               const Tensor& peak, const Tensor& log_sum, const OptionalTensor& weight, int64_t ignore_index,
               double label_smoothing, double temperature, std::optional<double> softcap, double z_loss) {
  backward_into(input, grad_loss, grad_lse, input, target, peak, log_sum, weight, ignore_index, label_smoothing,
                temperature, softcap, z_loss);
}

Tensor reduced(const Tensor& losses, double denominator) {
  Tensor loss = at::empty({}, losses.options());
  const double value = sum_in_order(losses) / denominator;
  if (losses.scalar_type() == at::kDouble)
    *loss.mutable_data_ptr<double>() = value;
  else
    *loss.mutable_data_ptr<float>() = float(value);
  return loss;
}

Tensor total(const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t ignore_index,
             double label_smoothing, double temperature, std::optional<double> softcap, double z_loss, bool mean) {
  Call call(input, target, weight, ignore_index, label_smoothing, temperature, softcap, z_loss);
  const Tensor losses = call.output(call.loss, call.compute);
  call.run({});
  return reduced(losses, mean ? call.denominator : 1);
}

std::tuple<Tensor, Tensor> step(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                int64_t ignore_index, double label_smoothing, double temperature,
                                std::optional<double> softcap, double z_loss, bool mean) {
  Call call(input, target, weight, ignore_index, label_smoothing, temperature, softcap, z_loss);
  const double denominator = mean ? call.denominator : 1;
  const double wide = 1 / denominator;
  const float narrow = float(wide);
  call.grad_loss.data = call.compute == at::kDouble ? static_cast<const void*>(&wide) : &narrow;
  const Tensor losses = call.output(call.loss, call.compute);
  Tensor grad = empty_gradient(input);
  call.run(grad);
  return {reduced(losses, denominator), grad};
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
