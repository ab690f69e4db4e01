// A call of cross entropy as the ops on logits and on features share it: checked, with the tensors that it points into.
#pragma once
#include <ATen/ATen.h>

#include <optional>

#include "tensor.h"

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
  double denominator = 0;  // of the mean

  // `dtype` and `logits` are the logits'; `shape` are their sizes without the classes.
  CrossEntropyCall(at::ScalarType dtype, at::IntArrayRef logits, PositionSizes shape, int64_t classes,
                   const at::Tensor& target, const CrossEntropyOptions& options);
  CrossEntropyCall(const CrossEntropyCall&) = delete;  // it points into itself

  // A tensor of a value per position, and its memory for the kernel.
  at::Tensor output(void*& slot, at::ScalarType dtype) const;

  // Gradients that come from above: one per position; or one for all, of the loss alone.
  void use_upstream(const at::Tensor& grad_loss, const std::optional<at::Tensor>& grad_lse);
  void use_upstream(double grad_loss);

 private:
  template <class A>
  void check_indices();

  at::Tensor weight_, upstream_, upstream_lse_;
  double upstream_double_;  // a tensor would be dear in a small call
  float upstream_float_;
};

}  // namespace tlk
