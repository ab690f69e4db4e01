// A call of cross entropy on CPU tensors, whose values the host has looked at.
#pragma once
#include "call.h"
#include "../core/cpu/tensor.h"

namespace tlk {

struct CheckedCrossEntropy : CrossEntropyCall {
  double denominator = 0;  // of the mean

  CheckedCrossEntropy(at::ScalarType dtype, at::IntArrayRef logits, PositionSizes shape, int64_t classes,
                      const at::Tensor& target, const CrossEntropyOptions& options);

  using CrossEntropyCall::use_upstream;
  void use_upstream(double grad_loss);  // one for all, of the loss alone

 private:
  template <class A>
  void check_indices();

  double upstream_double_;  // a tensor would be dear in a small call
  float upstream_float_;
};

}  // namespace tlk
