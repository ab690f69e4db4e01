#include "cpu_call.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

namespace tlk {

CpuDistillationCall::CpuDistillationCall(c10::Device device, at::ScalarType dtype_, at::IntArrayRef logits,
                                         const DistillationOptions& given)
    : DistillationCall(device, dtype_, logits, given) {
  for (int64_t i = 0; target && i < rows; ++i)
    TORCH_CHECK_INDEX(target[i] == ignore_index || (target[i] >= 0 && target[i] < classes),
                      "target: expected class indices in [0, ", classes, ") or ignore_index (", ignore_index, "), got ",
                      target[i], " at row ", i);
  grad_loss = upstream_of_all_.set(1, compute);
}

void CpuDistillationCall::use_mean() {
  denominator_ = double(target ? rows - std::count(target, target + rows, ignore_index) : rows);
  grad_loss = upstream_of_all_.set(1 / denominator_, compute);
}

void CpuDistillationCall::launch(const Distillation& part) const {
  if (part.rows == 0) return;
  const bool softcap = part.has_softcap();
  const DistillationRows kernel = distillation_kernels()(scalar_of(dtype), part.divergence, part.hard != 0, softcap);
  struct alignas(64) Line {
    char bytes[64];
  };
  const size_t bytes = size_t(kept_numbers(part.classes, softcap)) * c10::elementSize(compute);
  constexpr int64_t kGrain = 1 << 13;  // elements for which a second thread is worth its start
  at::parallel_for(0, part.rows, std::max<int64_t>(1, kGrain / part.classes), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Line[]> kept(new Line[(bytes + sizeof(Line) - 1) / sizeof(Line)]);
    kernel(part, begin, end, kept.get());
  });
}

}  // namespace tlk
