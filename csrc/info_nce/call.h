// What the calls of InfoNCE's ops share on every device: their arguments, and checks that read no values.
#pragma once
#include <ATen/ATen.h>

#include <optional>

#include "../core/call.h"
#include "kernel.h"

namespace tlk {

// In the order of the schemas in tlkernels/losses/info_nce/ops.py, which say what they mean.
struct InfoNceArguments {
  const at::Tensor& query;
  const std::optional<at::Tensor>&key, &negatives;
  const at::Tensor& logit_scale;
  const std::optional<at::Tensor>&target, &mask, &query_ids, &key_ids;
  int64_t own;
  bool by_label, symmetric, normalize;
  double label_smoothing;

  // Raises ValueError unless they fit together.
  void check() const;

  bool paired() const { return !key; }
  Set set() const { return by_label ? Set::label : label_smoothing > 0 ? Set::all : Set::none; }
  int64_t rows() const { return query.size(0); }
  int64_t keys() const { return key ? key->size(0) : query.size(0); }
  int64_t classes() const { return keys() + (negatives ? negatives->size(-2) : 0); }
  // The type that all is computed in.
  at::ScalarType compute() const;
  const at::Tensor& ids_of_keys() const { return key_ids ? *key_ids : *query_ids; }
};

#define TLK_INFO_NCE_PARAMETERS                                                                                       \
  const at::Tensor &query, const std::optional<at::Tensor>&key, const std::optional<at::Tensor>&negatives,            \
      const at::Tensor &logit_scale, const std::optional<at::Tensor>&target, const std::optional<at::Tensor>&mask,    \
      const std::optional<at::Tensor>&query_ids, const std::optional<at::Tensor>&key_ids, int64_t own, bool by_label, \
      bool symmetric, bool normalize, double label_smoothing
#define TLK_INFO_NCE_ARGUMENTS                                                                                 \
  tlk::InfoNceArguments {                                                                                      \
    query, key, negatives, logit_scale, target, mask, query_ids, key_ids, own, by_label, symmetric, normalize, \
        label_smoothing                                                                                        \
  }

}  // namespace tlk
