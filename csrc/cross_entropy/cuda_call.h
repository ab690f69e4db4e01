// A call of cross entropy on CUDA tensors. The host never waits for the device, except to check class indices where
// TLKERNELS_CHECK=1 asks for it.
#pragma once
#include "call.h"
#include "../core/cuda/reduction.h"
#include "../core/cuda/tensor.h"

namespace tlk {

struct CudaCrossEntropyCall : CrossEntropyCall {
  static constexpr bool kStridedProbabilities = true;

  // `like` is on the tensors' device and of the logits' type.
  CudaCrossEntropyCall(const at::Tensor& like, at::IntArrayRef logits, PositionSizes shape, int64_t classes,
                       const at::Tensor& target, const CrossEntropyOptions& options);

  static at::Tensor empty_gradient(const at::Tensor& like) { return at::empty_like(like); }

  // Makes `sum_of` the mean of the losses, and the gradient that of the mean.
  void use_mean();
  at::Tensor sum_of(const at::Tensor& losses) const { return reduction_.sum_of(losses, device_.stream()); }

  // Launches the kernel on `part`, this or some of its rows. `logits` and `probabilities` are the types of such.
  void launch(const CrossEntropy& part, at::ScalarType logits, at::ScalarType probabilities) const;

  // The gradient, where wanted, replaces the logits.
  void run_in_place(const CrossEntropy& part, at::ScalarType logits, at::ScalarType probabilities) const {
    launch(part, logits, probabilities);
  }

 private:
  OnDevice device_;
  Reduction reduction_;
};

}  // namespace tlk
