// The kernels of the selected classes on a GPU. A row with a class out of range becomes NaN, except that
// TLKERNELS_CHECK=1 makes it an IndexError.
#pragma once
#include "../core/cuda/tensor.h"
#include "call.h"

namespace tlk {

struct CudaSelective {
  explicit CudaSelective(const at::Tensor& logits) : device_(logits) {}

  // As CpuSelective's.
  void prepare(const SelectiveCall& call) const;
  void write_log_probs(const SelectedClasses& part, at::ScalarType logits) const;
  void gather(const SelectedClasses& part, at::ScalarType logits) const;
  void write_gradients(const SelectedClasses& part, at::ScalarType logits) const;

 private:
  OnDevice device_;
};

}  // namespace tlk
