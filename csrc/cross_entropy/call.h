// A call of cross entropy: checks its arguments and keeps the tensors that the kernels' pointers point into. Shared by
// the ops on logits and on features, on every device; the devices' own parts are in cpu_call.h and cuda_call.h.
#pragma once
#include <ATen/ATen.h>

#include <optional>

#include "../core/call.h"
#include "kernel.h"

namespace tlk {

using PositionSizes = c10::SmallVector<int64_t, 6>;

// In the order of the ops' schemas.
struct CrossEntropyOptions {
  using ArgumentTypes = Types<const std::optional<at::Tensor>&, int64_t, double, double, std::optional<double>, double,
                              std::optional<int64_t>>;

  const std::optional<at::Tensor>& weight;
  int64_t ignore_index;
  double label_smoothing, temperature;
  std::optional<double> softcap;
  double z_loss;
  std::optional<int64_t> num_classes;  // of the whole vocabulary, where the logits are a part of it
};

struct CrossEntropyCall : CrossEntropy {
  const at::ScalarType compute;  // the type of the losses
  PositionSizes shape;           // the positions: the logits' sizes without the classes
  at::Tensor target;

  // `dtype` and `logits` are the logits' type and sizes.
  CrossEntropyCall(at::ScalarType dtype, at::IntArrayRef logits, PositionSizes shape, int64_t classes,
                   const at::Tensor& target, const CrossEntropyOptions& options);
  CrossEntropyCall(const CrossEntropyCall&) = delete;  // it points into itself

  // Makes a tensor with a value for each position, which the kernel writes through `slot`.
  template <class T>
  at::Tensor output(T*& slot, at::ScalarType dtype) const {
    at::Tensor values = at::empty(shape, target.options().dtype(dtype));
    slot = static_cast<T*>(values.data_ptr());
    return values;
  }
  at::Tensor output(void*& slot) const { return output(slot, compute); }

  // Upstream gradients, one for each position.
  void use_upstream(const at::Tensor& grad_loss, const std::optional<at::Tensor>& grad_lse,
                    const std::optional<at::Tensor>& grad_entropy);
  void use_row_weight(const std::optional<at::Tensor>& row_weight);

  // Takes the normaliser, and the entropy that grad_entropy needs, from a forward call.
  void use_normaliser(const at::Tensor& peak, const at::Tensor& log_sum, const std::optional<at::Tensor>& entropy);

 protected:
  PerPosition position_values(const char* name, const at::Tensor& given, at::Tensor& kept) const;

  at::Tensor weight_;  // of the compute type, contiguous; or undefined
  at::Tensor upstream_, upstream_lse_, upstream_entropy_, row_weight_;
  at::Tensor peak_, log_sum_, entropy_;  // given
};

// Of logits in memory: classes are along axis 1, or along axis 0 where there is only one.
int64_t class_axis(const at::Tensor& logits);
PositionSizes positions(const at::Tensor& logits);

// Gives the kernel the memory of logits, probabilities and gradient, which may be undefined. Neighbouring axes are
// merged where all of them allow it. False if more than kMaxAxes axes are left.
bool lay_out(CrossEntropyCall& call, const at::Tensor& input, const at::Tensor& grad);

}  // namespace tlk
