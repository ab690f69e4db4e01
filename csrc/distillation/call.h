// A call of distillation as its ops share it, on logits and on features and on every device: checked but for the values
// of its tensors, with the tensors that it points into.
#pragma once
#include <ATen/ATen.h>

#include <optional>

#include "../core/call.h"
#include "kernel.h"

namespace tlk {

// In the order of the schemas.
struct DistillationOptions {
  double temperature;
  c10::string_view divergence;
  double beta, hard_weight;
  int64_t ignore_index;
  double label_smoothing;
};

// Both logits in one dtype, that of torch's promotion.
struct DistillationLogits {
  at::Tensor student, teacher;

  DistillationLogits(const at::Tensor& student, const at::Tensor& teacher);
};

// A gradient in its logits' dtype; empty where not wanted.
at::Tensor given_gradient(const at::Tensor& grad, const at::Tensor& logits);

struct DistillationCall : Distillation {
  at::TensorOptions options;      // of the losses: the compute type and the device
  at::ScalarType dtype, compute;  // of the logits; of the losses
  c10::DimVector shape;           // of the rows

  // `logits` are the sizes of either logits, `logits_options` their type and device.
  DistillationCall(at::IntArrayRef logits, const at::TensorOptions& logits_options,
                   const std::optional<at::Tensor>& target, const std::optional<at::Tensor>& row_weight,
                   const DistillationOptions& options);

  void use_upstream(const at::Tensor& grad_rows);  // one for each row, or expanded to their shape

  // A tensor of a loss per row, which the kernel writes.
  at::Tensor losses();

  // The call of all rows, with the logits that it points into.
  struct Whole {
    Distillation call;
    at::Tensor logits[2];
  };
  // Gradients are contiguous, or undefined where they are not wanted.
  Whole whole(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& student_grad,
              const at::Tensor& teacher_grad) const;

  // The call of rows `begin` to `end`, their logits in contiguous (rows, classes); each gradient, where wanted, in
  // their place.
  Distillation in_place(int64_t begin, int64_t end, const at::Tensor& student, const at::Tensor& teacher,
                        bool student_grad, bool teacher_grad) const;

  at::Tensor targets;  // int64 and contiguous; undefined where there are none

 private:
  at::Tensor row_weight_, upstream_;
};

}  // namespace tlk
