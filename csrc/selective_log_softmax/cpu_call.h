// The kernels of the selected classes on a CPU.
#pragma once
#include "call.h"

namespace tlk {

struct CpuSelective {
  explicit CpuSelective(const at::Tensor& /*logits*/) {}

  // Writes the targets and, in the backward, the upstreams' sums. Raises IndexError for a class out of range.
  void prepare(const SelectiveCall& call) const;

  // `logits` is the type of the logits and of their gradient.
  void write_log_probs(const SelectedClasses& part, at::ScalarType logits) const;
  void gather(const SelectedClasses& part, at::ScalarType logits) const;
  void write_gradients(const SelectedClasses& part, at::ScalarType logits) const;
};

}  // namespace tlk
