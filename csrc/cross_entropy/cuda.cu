// Cross entropy on CUDA tensors: the launch of its kernels.
#include "cuda.cuh"

#include <ATen/ATen.h>

#include "../core/cuda/dtype.h"
#include "cuda_call.h"
#include "ops.h"

namespace tlk {

using at::Tensor;

CudaCrossEntropyCall::CudaCrossEntropyCall(const Tensor& like, at::IntArrayRef logits, PositionSizes shape_,
                                           int64_t classes_, const Tensor& target_, const CrossEntropyOptions& options)
    : CrossEntropyCall(like.scalar_type(), logits, std::move(shape_), classes_, target_, options), device_(like) {
  if (indices) check_classes(target, classes, ignore_index, elsewhere ? -1 : 0);
}

void CudaCrossEntropyCall::use_mean() {
  if (!indices) {
    reduction_.factor = 1 / double(rows);
    return;
  }
  reduction_.count(target, ignore_index, classes, weight, compute, device_.stream());
  // As in PyTorch, where only classes of weight 0 count. Without these options 0 / 0 gives NaN by itself.
  if (weight && (smoothing != 0 || z_loss != 0)) reduction_.divisor.masked_fill_(reduction_.divisor.eq(0), NAN);
}

void CudaCrossEntropyCall::launch(const CrossEntropy& part, at::ScalarType logits, at::ScalarType probabilities) const {
  CrossEntropyOnDevice call;
  static_cast<CrossEntropy&>(call) = part;
  call.factor = reduction_.factor;
  call.divisor = reduction_.divisor_data();
  call.wide_probabilities = !indices && probabilities == compute;
  with_type(logits, [&](auto type) {
    check_launch(cross_entropy<typename decltype(type)::T>(call, device_.stream()), "cross_entropy");
  });
}

// Forces a strategy, for tests and measurements; null: the table chooses.
extern "C" __attribute__((visibility("default"))) void tlk_force_cross_entropy_strategy(const char* name) {
  forced_cross_entropy_strategy() = nullptr;
  for (const CrossEntropyStrategy& strategy : kCrossEntropyStrategies)
    if (name && strcmp(name, strategy.name) == 0) forced_cross_entropy_strategy() = strategy.name;
}

TORCH_LIBRARY_IMPL(tlkernels, CUDA, m) { CrossEntropyOps<CudaCrossEntropyCall>::implement(m); }

}  // namespace tlk
