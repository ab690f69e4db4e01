// A call of cross entropy on CPU tensors. It also checks the class indices.
#pragma once
#include "call.h"
#include "../core/cpu/tensor.h"

namespace tlk {

TLK_KERNELS(CrossEntropyTable, cross_entropy)

struct CpuCrossEntropyCall : CrossEntropyCall {
  // The kernel that run_in_place calls reads contiguous classes only.
  static constexpr bool kStridedProbabilities = false;

  CpuCrossEntropyCall(const at::Tensor& like, at::IntArrayRef logits, PositionSizes shape, int64_t classes,
                      const at::Tensor& target, const CrossEntropyOptions& options);

  static at::Tensor empty_gradient(const at::Tensor& like) { return tlk::empty_gradient(like); }

  // Makes `sum_of` the mean of the losses, and the gradient that of the mean.
  void use_mean();
  at::Tensor sum_of(const at::Tensor& losses) const { return sum_over(losses, denominator_); }

  // Runs the kernels on all of `call`, a laid-out copy of this. `logits` and `probabilities` are the types of such.
  void launch(const CrossEntropy& call, at::ScalarType logits, at::ScalarType probabilities) const;

  // The same of a part whose classes are contiguous; the gradient, where wanted, replaces the logits. With the
  // normaliser given, only the gradient is computed.
  void run_in_place(const CrossEntropy& part, at::ScalarType logits, at::ScalarType probabilities) const;

 private:
  template <class A>
  double checked_count() const;

  double count_;  // of the rows that are not ignored, or their weights' sum
  double denominator_ = 1;
  OneForAll upstream_of_all_;
};

}  // namespace tlk
