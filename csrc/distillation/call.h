// A call of distillation: checks its arguments and keeps the tensors that the kernels' pointers point into. Shared by
// the ops on logits and on features, on every device; the devices' own parts are in cpu_call.h and cuda_call.h.
#pragma once
#include <ATen/ATen.h>

#include <optional>

#include "../core/call.h"
#include "kernel.h"

namespace tlk {

// In the order of the ops' schemas.
struct DistillationOptions {
  using ArgumentTypes =
      Types<const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, double, c10::string_view, double,
            double, int64_t, double, std::optional<double>, std::optional<double>>;

  const std::optional<at::Tensor>&target, &row_weight;
  double temperature;
  c10::string_view divergence;
  double beta, hard_weight;
  int64_t ignore_index;
  double label_smoothing;
  std::optional<double> student_softcap, teacher_softcap;
};

struct DistillationCall : Distillation {
  const at::ScalarType dtype, compute;  // of the logits; of the losses
  c10::DimVector shape;                 // of the rows
  const at::TensorOptions options;      // of the losses: type and device
  at::Tensor targets;                   // int64 and contiguous; undefined without targets

  // `dtype` and `logits` are the type and sizes of either logits.
  DistillationCall(c10::Device device, at::ScalarType dtype, at::IntArrayRef logits, const DistillationOptions& given);
  DistillationCall(const DistillationCall&) = delete;  // it points into itself

  void use_upstream(const at::Tensor& grad_rows);  // one for each row, or expanded to their shape

  // Makes the tensor of a loss per row, which the kernel writes.
  at::Tensor losses();

  // All rows: the kernel's view, with the logits that it points into.
  struct Whole {
    Distillation call;
    at::Tensor logits[2];
  };
  // Gradients are contiguous, or undefined where they are not wanted.
  Whole whole(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& student_grad,
              const at::Tensor& teacher_grad) const;

  // Rows `begin` to `end`, their logits in contiguous (rows, classes). Each gradient, where wanted, replaces its
  // logits.
  Distillation in_place(int64_t begin, int64_t end, const at::Tensor& student, const at::Tensor& teacher,
                        bool student_grad, bool teacher_grad) const;

 protected:
  at::Tensor row_weight_, upstream_;
};

}  // namespace tlk
