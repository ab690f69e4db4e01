// The arguments of InfoNCE's ops on every device, and their checks, which read no values of tensors.
#pragma once
#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "../core/call.h"
#include "kernel.h"

namespace tlk {

// In the order of the ops' schemas. tlkernels/losses/info_nce/ops.py says what they mean.
struct InfoNceArguments {
  using ArgumentTypes =
      Types<const at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, const at::Tensor&,
            const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
            const std::optional<at::Tensor>&, int64_t, bool, bool, bool, double>;

  const at::Tensor& query;
  const std::optional<at::Tensor>&key, &negatives;
  const at::Tensor& logit_scale;
  const std::optional<at::Tensor>&target, &mask, &query_ids, &key_ids;
  int64_t self_column;
  bool by_label, symmetric, normalize;
  double label_smoothing;

  // Raise ValueError unless the tensors fit together.
  void check() const;
  void check_backward(const at::Tensor& grad_loss, const at::Tensor& state) const;

  bool paired() const { return !key; }
  Set set() const { return by_label ? Set::label : label_smoothing > 0 ? Set::all : Set::none; }
  int64_t rows() const { return query.size(0); }
  int64_t keys() const { return key ? key->size(0) : query.size(0); }
  int64_t classes() const { return keys() + (negatives ? negatives->size(-2) : 0); }
  // The type to compute in.
  at::ScalarType compute() const;
  const at::Tensor& ids_of_keys() const { return key_ids ? *key_ids : *query_ids; }
};

// By query, key, negatives and logit_scale; without elements where not needed.
using InfoNceGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

}  // namespace tlk
