// A call of selective_log_softmax: checks its arguments and keeps the tensors that the kernels' pointers point into.
#pragma once
#include <ATen/ATen.h>

#include <optional>

#include "../cross_entropy/call.h"
#include "kernel.h"

namespace tlk {

struct SelectiveCall : SelectedClasses {
  const at::ScalarType compute;  // the type of the results
  at::Tensor target;             // of each row; `prepare` of a device's kernels writes it

  SelectiveCall(at::ScalarType dtype, const at::Tensor& index, int64_t rows, int64_t classes, double temperature,
                std::optional<double> softcap);
  SelectiveCall(const SelectiveCall&) = delete;  // it points into itself

  // The options of cross entropy's call on the same logits.
  CrossEntropyOptions options() const;

  void use_upstream(const at::Tensor& grad_log_probs, const std::optional<at::Tensor>& grad_entropy);
  void use_normaliser(const at::Tensor& peak, const at::Tensor& log_sum, const at::Tensor& entropy);

  // Gives a call of cross entropy, whose target is this call's, the upstreams and the normaliser.
  void pass_on(CrossEntropyCall& call) const;

  // Log-probabilities that the kernels write.
  at::Tensor output();

  // Raises IndexError if a class is out of range; on a GPU the host waits for it.
  void check_index() const;

  // The same call for rows from `begin` on, whose logits (rows, classes) or gradient are in `logits`.
  SelectedClasses of(const at::Tensor& logits, int64_t begin = 0) const;

 private:
  const double temperature_;
  const std::optional<at::Tensor> no_weight_;
  at::Tensor index_, x_, upstream_, upstream_sum_;
  std::optional<at::Tensor> upstream_entropy_;
  at::Tensor peak_, log_sum_, entropy_, entropy_values_;
};

}  // namespace tlk
