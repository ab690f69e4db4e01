#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../cross_entropy/cpu_call.h"
#include "cpu_call.h"
#include "ops.h"

namespace tlk {

constexpr int64_t kGrain = 1 << 10;  // classes for which a second thread is worth its start

void CpuSelective::prepare(const SelectiveCall& call) const {
  for (int64_t row = 0; row < call.rows; ++row) {
    const bool in_range = call.compute == at::kDouble ? prepare_row<double>(call, row) : prepare_row<float>(call, row);
    if (!in_range) call.check_index();
  }
}

// Calls body(i, T()) for every selected class, with T the type of the logits.
template <class Body>
static void for_classes(const SelectedClasses& part, at::ScalarType logits, Body body) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits, "selective_log_softmax", [&] {
    at::parallel_for(0, part.rows * part.count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i, scalar_t());
    });
  });
}

// f of the logits at `x`, by the tanh of cross entropy's kernels: another one would differ from the peak, which is the
// largest f, by a rounding, and a log-probability could be above 0.
static std::unique_ptr<char[]> bounded(SelectedClasses& part, const void* x, at::ScalarType logits) {
  if (part.softcap == 0) return nullptr;
  const int64_t numbers = part.rows * part.count;
  std::unique_ptr<char[]> f(new char[size_t(numbers) * sizeof(double)]);
  cross_entropy_kernels()(scalar_of(logits), scalar_of(logits), true).bound(x, f.get(), numbers, part.softcap);
  part.f = f.get();
  return f;
}

void CpuSelective::write_log_probs(const SelectedClasses& given, at::ScalarType logits) const {
  SelectedClasses part = given;
  std::unique_ptr<char[]> x, f;
  if (part.softcap != 0) {
    x.reset(new char[size_t(part.rows * part.count) * sizeof(double)]);
    part.x = x.get();
    gather(part, logits);
    f = bounded(part, part.x, logits);
  }
  for_classes(part, logits, [&](int64_t i, auto type) { write_log_prob<decltype(type)>(part, i); });
}

void CpuSelective::gather(const SelectedClasses& part, at::ScalarType logits) const {
  for_classes(part, logits, [&](int64_t i, auto type) {
    using T = decltype(type);
    static_cast<ComputeOf<T>*>(part.x)[i] = selected_logit<T>(part, i);
  });
}

// A class may be selected several times in a row: its upstreams are summed in a row of zeros.
template <class T>
static void write_row_gradients(const SelectedClasses& part, int64_t row, ComputeOf<T>* sums) {
  const auto* const upstream = static_cast<const ComputeOf<T>*>(part.grad_log_probs);
  const int64_t begin = row * part.count, end = begin + part.count;
  for (int64_t i = begin; i < end; ++i)
    if (part.index[i] >= 0) sums[part.index[i]] += upstream[i];
  for (int64_t i = begin; i < end; ++i)
    if (part.index[i] >= 0) write_selected_gradient<T>(part, i, sums[part.index[i]]);
  for (int64_t i = begin; i < end; ++i)
    if (part.index[i] >= 0) sums[part.index[i]] = 0;
}

void CpuSelective::write_gradients(const SelectedClasses& given, at::ScalarType logits) const {
  SelectedClasses part = given;
  const std::unique_ptr<char[]> f = bounded(part, part.x, logits);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits, "selective_log_softmax_bwd", [&] {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, part.count));
    at::parallel_for(0, part.rows, grain, [&](int64_t begin, int64_t end) {
      std::vector<ComputeOf<scalar_t>> sums(size_t(part.classes));
      for (int64_t row = begin; row < end; ++row) write_row_gradients<scalar_t>(part, row, sums.data());
    });
  });
}

TORCH_LIBRARY_IMPL(tlkernels, CPU, m) { SelectiveLogSoftmaxOps<CpuCrossEntropyCall, CpuSelective>::implement(m); }

}  // namespace tlk
