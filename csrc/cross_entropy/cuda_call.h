// A call of cross entropy on CUDA tensors, as the ops on logits and on features share it.
#pragma once
#include "call.h"
#include "../core/cuda/tensor.h"

namespace tlk {

struct CrossEntropyOnTensors : CrossEntropyCall {
  OnDevice device;
  double factor = 1;  // of the gradient and of the sum of losses
  const double* divisor = nullptr;

  // `like` is on the tensors' device.
  CrossEntropyOnTensors(const at::Tensor& like, at::IntArrayRef logits, PositionSizes shape, int64_t classes,
                        const at::Tensor& target, const CrossEntropyOptions& options);

  // Makes a mean of the sum of losses, and the gradient that of a mean: without waiting for what counts in it.
  void divide_by_what_counts();

  // `call`, this or a part of it, whose logits are of type `logits` and whose probabilities, if any, of type
  // `probabilities`.
  void launch(const CrossEntropy& call, at::ScalarType logits, at::ScalarType probabilities) const;

  // The sum of all losses, or their mean.
  at::Tensor sum_of(const at::Tensor& losses) const;

 private:
  at::Tensor parts() const;
  at::Tensor divisor_;
};

}  // namespace tlk
