// A call of distillation on CUDA tensors. The host never waits for the device, except to check class indices where
// TLKERNELS_CHECK=1 asks for it.
#pragma once
#include "call.h"
#include "../core/cuda/reduction.h"
#include "../core/cuda/tensor.h"

namespace tlk {

struct CudaDistillationCall : DistillationCall {
  CudaDistillationCall(c10::Device device, at::ScalarType dtype, at::IntArrayRef logits,
                       const DistillationOptions& given);

  // Contiguous.
  static at::Tensor empty_gradient(const at::Tensor& like) { return at::empty(like.sizes(), like.options()); }

  // Makes `sum_of` the mean of the losses, and the gradients those of the mean.
  void use_mean();
  at::Tensor sum_of(const at::Tensor& losses) const { return reduction_.sum_of(losses, device_.stream()); }

  // Launches the kernel on the rows of `part`, this or some of its rows.
  void launch(const Distillation& part) const;

 private:
  const OnDevice device_;
  Reduction reduction_;
};

}  // namespace tlk
