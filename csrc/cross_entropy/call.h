// A call of cross entropy as its ops share it, on every device: checked but for the values of its tensors, with the
// tensors that it points into.
#pragma once
#include <ATen/ATen.h>

#include <optional>

#include "../core/call.h"
#include "kernel.h"

namespace tlk {

using PositionSizes = c10::SmallVector<int64_t, 6>;

// In the order of the schemas.
struct CrossEntropyOptions {
  const std::optional<at::Tensor>& weight;
  int64_t ignore_index;
  double label_smoothing, temperature;
  std::optional<double> softcap;
  double z_loss;
};

struct CrossEntropyCall : CrossEntropy {
  const at::ScalarType compute;  // of the losses
  const PositionSizes shape;     // of a value per position
  at::Tensor target;

  // `dtype` and `logits` are the logits'; `shape` are their sizes without the classes.
  CrossEntropyCall(at::ScalarType dtype, at::IntArrayRef logits, PositionSizes shape, int64_t classes,
                   const at::Tensor& target, const CrossEntropyOptions& options);
  CrossEntropyCall(const CrossEntropyCall&) = delete;  // it points into itself

  // A tensor of a value per position, and its memory for the kernel.
  at::Tensor output(void*& slot, at::ScalarType dtype) const;

  // Gradients that come from above, one per position.
  void use_upstream(const at::Tensor& grad_loss, const std::optional<at::Tensor>& grad_lse);

 protected:
  at::Tensor weight_;  // of the compute type, contiguous; or undefined
  at::Tensor upstream_, upstream_lse_;
};

// The same with logits in memory, classes along axis 1 (or 0 of one axis), which the kernels read.
int64_t class_axis(const at::Tensor& logits);
PositionSizes positions(const at::Tensor& logits);

// Says where logits, probabilities and gradient, which may be undefined, lie: neighbouring axes that all of them step
// through as one are merged. False if more than kMaxAxes are left.
bool lay_out(CrossEntropyCall& call, const at::Tensor& input, const at::Tensor& grad);

}  // namespace tlk
