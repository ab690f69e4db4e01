#include "cpu_call.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

namespace tlk {

CheckedDistillation::CheckedDistillation(at::IntArrayRef logits, at::ScalarType dtype_,
                                         const std::optional<at::Tensor>& target_in,
                                         const std::optional<at::Tensor>& row_weight_in,
                                         const DistillationOptions& options_)
    : DistillationCall(logits, at::TensorOptions().dtype(dtype_), target_in, row_weight_in, options_),
      denominator(double(rows)) {
  if (!target) return;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t y = target[i];
    if (y == ignore_index)
      denominator -= 1;
    else
      TORCH_CHECK_INDEX(y >= 0 && y < classes, "target: expected class indices in [0, ", classes, ") or ignore_index (",
                        ignore_index, "), got ", y, " at row ", i);
  }
}

void CheckedDistillation::use_upstream(double grad_row) {
  upstream_ = at::scalar_tensor(grad_row, options);
  grad_loss = {upstream_.const_data_ptr(), 0};
}

std::vector<int64_t> CheckedDistillation::absent() const {
  std::vector<int64_t> found;
  for (int64_t i = 0; target && i < rows; ++i)
    if (target[i] == ignore_index) found.push_back(i);
  return found;
}

void run_rows(const Distillation& call, at::ScalarType dtype) {
  if (call.rows == 0) return;
  const DistillationRows rows = kernels().distillation(scalar_of(dtype), call.divergence, call.hard != 0);
  struct alignas(64) Line {
    char bytes[64];
  };
  const size_t bytes = size_t(kept_numbers(call.classes)) * c10::elementSize(compute_type(dtype));
  constexpr int64_t kGrain = 1 << 13;  // elements for which a second thread is worth its start
  at::parallel_for(0, call.rows, std::max<int64_t>(1, kGrain / call.classes), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Line[]> kept(new Line[(bytes + sizeof(Line) - 1) / sizeof(Line)]);
    rows(call, begin, end, kept.get());
  });
}

}  // namespace tlk
