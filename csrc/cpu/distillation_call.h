// A call of distillation as the ops on logits and on features share it: checked, with the tensors that it points into.
#pragma once
#include <ATen/ATen.h>

#include <optional>

#include "tensor.h"

namespace tlk {

// In the order of the schemas.
struct DistillationOptions {
  double temperature;
  c10::string_view divergence;
  double beta, hard_weight;
  int64_t ignore_index;
  double label_smoothing;
};

struct DistillationCall : Distillation {
  at::ScalarType dtype, compute;  // of the logits; of the losses
  c10::DimVector shape;           // of the rows
  double denominator;             // rows that count

  // `logits` are the sizes of either logits, `dtype` is their type.
  DistillationCall(at::IntArrayRef logits, at::ScalarType dtype, const std::optional<at::Tensor>& target,
                   const std::optional<at::Tensor>& row_weight, const DistillationOptions& options);

  void use_upstream(const at::Tensor& grad_rows);  // one for each row
  void use_upstream(double grad_row);              // one for all

  // A tensor of a loss per row, which the kernel writes.
  at::Tensor losses();

  // Rows `begin` to `end`, their logits in contiguous (rows, classes); each gradient, where wanted, in their place.
  void run_in_place(int64_t begin, int64_t end, const at::Tensor& student, const at::Tensor& teacher, bool student_grad,
                    bool teacher_grad) const;

  // All rows; gradients are contiguous, or undefined where they are not wanted.
  void run(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& student_grad,
           const at::Tensor& teacher_grad) const;

 private:
  at::Tensor target_, row_weight_, upstream_;
};

}  // namespace tlk
