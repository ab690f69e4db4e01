// A call of distillation on CUDA tensors, on logits or on features.
#pragma once
#include "call.h"
#include "../core/cuda/tensor.h"

namespace tlk {

struct DistillationOnTensors : DistillationCall {
  // `logits` are the sizes of either logits, `options` their type and device, which is that of `tensor`.
  DistillationOnTensors(const at::Tensor& tensor, at::IntArrayRef logits, const at::TensorOptions& logits_options,
                        const std::optional<at::Tensor>& target, const std::optional<at::Tensor>& row_weight,
                        const DistillationOptions& given);

  // Upstream gradients are those of the mean from now on, and so is `sum_of`; the host does not learn its divisor.
  void use_mean();

  void launch(const Distillation& rows) const;
  at::Tensor sum_of(const at::Tensor& losses) const;

 private:
  const double* divisor() const { return divisor_.defined() ? divisor_.const_data_ptr<double>() : nullptr; }
  at::Tensor parts() const;

  const OnDevice device_;
  double factor_ = 1;
  at::Tensor divisor_;
};

}  // namespace tlk
