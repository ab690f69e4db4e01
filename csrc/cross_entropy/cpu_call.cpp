#include "cpu_call.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>

namespace tlk {

CpuCrossEntropyCall::CpuCrossEntropyCall(const at::Tensor& like, at::IntArrayRef logits, PositionSizes shape_,
                                         int64_t classes_, const at::Tensor& target_,
                                         const CrossEntropyOptions& options)
    : CrossEntropyCall(like.scalar_type(), logits, std::move(shape_), classes_, target_, options) {
  if (weight) weight_sum = sum_in_order(weight_);
  count_ = !indices ? double(rows) : compute == at::kDouble ? checked_count<double>() : checked_count<float>();
  grad_loss = upstream_of_all_.set(1, compute);
}

template <class A>
double CpuCrossEntropyCall::checked_count() const {
  const A* w = static_cast<const A*>(weight);
  double count = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t y = indices[i];
    if (y == ignore_index) continue;
    if (elsewhere && y == -1) {  // its class's weight is not known here
      count += w ? 0.0 : 1.0;
      continue;
    }
    TORCH_CHECK_INDEX(y >= 0 && y < classes, "target: expected class indices in [0, ", classes, ") or ignore_index (",
                      ignore_index, "), got ", y, " at position ", i);
    count += w ? double(w[y]) : 1.0;
  }
  return count;
}

void CpuCrossEntropyCall::use_mean() {
  denominator_ = count_ == 0 ? std::numeric_limits<double>::quiet_NaN() : count_;  // as PyTorch's mean of nothing
  grad_loss = upstream_of_all_.set(1 / denominator_, compute);
}

constexpr int64_t kGrain = 1 << 14;  // elements for which a second thread is worth its start

static CrossEntropyKernels kernels_of(const CrossEntropy& call, at::ScalarType logits, at::ScalarType probabilities) {
  const Scalar type = scalar_of(logits);
  return cross_entropy_kernels()(type, call.indices ? type : scalar_of(probabilities), call.softcap != 0);
}

void CpuCrossEntropyCall::launch(const CrossEntropy& call, at::ScalarType logits, at::ScalarType probabilities) const {
  const CrossEntropyKernels kernels = kernels_of(call, logits, probabilities);
  const bool class_contiguous =
      classes == 1 || (call.x.class_stride == 1 && (indices || call.probabilities.class_stride == 1) &&
                       (!call.grad.data || call.grad.class_stride == 1));
  const int64_t bytes = classes * int64_t(c10::elementSize(compute));  // of a row in the compute type
  // Fewer classes would leave most of a vector empty: positions fill it, though they have to be gathered.
  constexpr int64_t kNarrow = 8;
  if (class_contiguous && classes > kNarrow) {
    const bool stash = call.grad.data && !normaliser_given && classes <= kMaxStash && c10::elementSize(logits) == 2;
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / classes), [&](int64_t begin, int64_t end) {
      std::unique_ptr<char[]> scratch(stash ? new char[size_t(bytes)] : nullptr);
      kernels.rows(call, begin, end, scratch.get());
    });
    return;
  }
  constexpr int64_t kScratch = 256 << 10;  // bytes: a quarter of a second-level cache, the rest is for the logits
  const int64_t width = std::clamp<int64_t>(kScratch / bytes / 16 * 16, 16, kMaxTileWidth);
  const int64_t line = call.size[axes - 1], tiles = (line + width - 1) / width * (rows / line);
  at::parallel_for(0, tiles, std::max<int64_t>(1, kGrain / (classes * std::min(width, line))),
                   [&](int64_t begin, int64_t end) {
                     std::unique_ptr<char[]> scratch(new char[size_t(width * bytes)]);
                     kernels.tiles(call, begin, end, int(width), scratch.get());
                   });
}

void CpuCrossEntropyCall::run_in_place(const CrossEntropy& part, at::ScalarType logits,
                                       at::ScalarType probabilities) const {
  // With the normaliser given, the kernel reads a logit before it writes there.
  CrossEntropy forward = part, backward = part;
  forward.grad.data = nullptr;
  backward.normaliser_given = true;
  backward.loss = nullptr;
  backward.correct = nullptr;
  const CrossEntropyRows kernel = kernels_of(part, logits, probabilities).rows;
  constexpr int64_t kBlock = 64 << 10;  // elements that the second sweep finds in the second-level cache
  const int64_t block = std::max<int64_t>(1, kBlock / classes);
  at::parallel_for(0, part.rows, std::max<int64_t>(1, kGrain / classes), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += block) {
      if (!part.normaliser_given) kernel(forward, i, std::min(last, i + block), nullptr);
      if (part.grad.data) kernel(backward, i, std::min(last, i + block), nullptr);
    }
  });
}

}  // namespace tlk
