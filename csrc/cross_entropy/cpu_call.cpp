#include "cpu_call.h"

#include <limits>
#include <utility>

namespace tlk {

CheckedCrossEntropy::CheckedCrossEntropy(at::ScalarType dtype, at::IntArrayRef logits, PositionSizes shape_,
                                         int64_t classes_, const at::Tensor& target_,
                                         const CrossEntropyOptions& options)
    : CrossEntropyCall(dtype, logits, std::move(shape_), classes_, target_, options) {
  if (weight) weight_sum = sum_in_order(weight_);
  if (!indices)
    denominator = double(rows);
  else if (compute == at::kDouble)
    check_indices<double>();
  else
    check_indices<float>();
  if (denominator == 0) denominator = std::numeric_limits<double>::quiet_NaN();  // as a mean of nothing is in PyTorch
}

template <class A>
void CheckedCrossEntropy::check_indices() {
  const A* w = static_cast<const A*>(weight);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t y = indices[i];
    if (y == ignore_index) continue;
    TORCH_CHECK_INDEX(y >= 0 && y < classes, "target: expected class indices in [0, ", classes, ") or ignore_index (",
                      ignore_index, "), got ", y, " at position ", i);
    denominator += w ? double(w[y]) : 1.0;
  }
}

void CheckedCrossEntropy::use_upstream(double by_loss) {
  upstream_double_ = by_loss;
  upstream_float_ = float(by_loss);
  grad_loss = {compute == at::kDouble ? static_cast<const void*>(&upstream_double_) : &upstream_float_, 0};
}

}  // namespace tlk
