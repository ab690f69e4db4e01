// A call of distillation on CPU tensors. It also checks the class indices.
#pragma once
#include "call.h"
#include "../core/cpu/tensor.h"

namespace tlk {

TLK_KERNELS(DistillationTable, distillation)

struct CpuDistillationCall : DistillationCall {
  CpuDistillationCall(c10::Device device, at::ScalarType dtype, at::IntArrayRef logits,
                      const DistillationOptions& given);

  // Contiguous.
  static at::Tensor empty_gradient(const at::Tensor& like) { return tlk::empty_gradient(like.sizes(), like.options()); }

  // Makes `sum_of` the mean of the losses, and the gradients those of the mean.
  void use_mean();
  at::Tensor sum_of(const at::Tensor& losses) const { return sum_over(losses, denominator_); }

  // Runs the kernel on the rows of `part`, this or some of its rows.
  void launch(const Distillation& part) const;

 private:
  double denominator_ = 1;
  OneForAll upstream_of_all_;
};

}  // namespace tlk
