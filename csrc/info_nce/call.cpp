#include "call.h"

namespace tlk {

at::ScalarType InfoNceArguments::compute() const {
  at::ScalarType type = compute_type(query.scalar_type());
  for (const auto* x : {&key, &negatives})
    if (*x && (*x)->scalar_type() == at::kDouble) type = at::kDouble;
  return type;
}

void InfoNceArguments::check() const {
  TORCH_CHECK_VALUE(query.dim() == 2, "query: expected shape (N, D), got ", query.sizes());
  TORCH_CHECK_VALUE(!key || (key->dim() == 2 && key->size(1) == query.size(1)), "key: expected shape (K, ",
                    query.size(1), "), got ", key ? key->sizes() : at::IntArrayRef());
  TORCH_CHECK_VALUE(!negatives || ((negatives->dim() == 2 || (negatives->dim() == 3 && negatives->size(0) == rows())) &&
                                   negatives->size(-1) == query.size(1)),
                    "negatives: expected shape (M, D) or (N, M, D), got ",
                    negatives ? negatives->sizes() : at::IntArrayRef());
  TORCH_CHECK_VALUE(logit_scale.dim() == 0, "logit_scale: expected a 0-d tensor, got shape ", logit_scale.sizes());
  TORCH_CHECK_VALUE(!symmetric || (!paired() && rows() == keys() && !target && !by_label),
                    "symmetric: expected as many keys as queries and the default target");
  TORCH_CHECK_VALUE(!negatives || (!paired() && !by_label), "negatives: expected none here");
  TORCH_CHECK_VALUE(!target || (target->dim() == 1 && target->size(0) == rows()), "target: expected ", rows(),
                    " columns, one per query, got shape ", target ? target->sizes() : at::IntArrayRef());
  TORCH_CHECK_VALUE(!mask || (mask->scalar_type() == at::kBool && mask->dim() == 2 && mask->size(0) == rows() &&
                              (mask->size(1) == keys() || mask->size(1) == classes())),
                    "mask: expected bool of shape (", rows(), ", ", keys(), ") or (", rows(), ", ", classes(),
                    "), got ", mask ? mask->scalar_type() : at::kBool, " of shape ",
                    mask ? mask->sizes() : at::IntArrayRef());
  TORCH_CHECK_VALUE(!by_label || query_ids, "query_ids: expected labels");
  TORCH_CHECK_VALUE(!query_ids || (query_ids->dim() == 1 && query_ids->size(0) == rows() && ids_of_keys().dim() == 1 &&
                                   ids_of_keys().size(0) == keys()),
                    "ids: expected one for each of ", rows(), " queries and ", keys(), " keys, got shapes ",
                    query_ids ? query_ids->sizes() : at::IntArrayRef(), " and ",
                    query_ids ? ids_of_keys().sizes() : at::IntArrayRef());
}

void InfoNceArguments::check_backward(const at::Tensor& grad_loss, const at::Tensor& state) const {
  TORCH_CHECK_VALUE(state.scalar_type() == at::kDouble && state.numel() == (symmetric ? 2 : 1) * kStatistics * rows(),
                    "state: expected what info_nce_fwd returned, got ", state.scalar_type(), " of shape ",
                    state.sizes());
  TORCH_CHECK_VALUE(grad_loss.dim() == 1 && grad_loss.numel() == rows(), "grad_loss: expected shape (", rows(),
                    ",), got ", grad_loss.sizes());
}

}  // namespace tlk
