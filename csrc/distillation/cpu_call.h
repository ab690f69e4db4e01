// A call of distillation on CPU tensors, whose values the host has looked at.
#pragma once
#include <vector>

#include "call.h"
#include "../core/cpu/tensor.h"

namespace tlk {

struct CheckedDistillation : DistillationCall {
  double denominator;  // rows that count

  CheckedDistillation(at::IntArrayRef logits, at::ScalarType dtype, const std::optional<at::Tensor>& target,
                      const std::optional<at::Tensor>& row_weight, const DistillationOptions& options);

  using DistillationCall::use_upstream;
  void use_upstream(double grad_row);  // one for all

  std::vector<int64_t> absent() const;  // rows that are ignored

 private:
  at::Tensor upstream_;
};

// Every row of the call.
void run_rows(const Distillation& call, at::ScalarType dtype);

}  // namespace tlk
