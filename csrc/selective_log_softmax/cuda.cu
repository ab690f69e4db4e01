// selective_log_softmax on CUDA tensors: one thread for each row, or for each selected class of a row.
#include "cuda_call.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include "../core/cuda/device.cuh"
#include "../cross_entropy/cuda_call.h"
#include "ops.h"

namespace tlk {

constexpr int kSelectThreads = 128;

template <class A>
__global__ void __launch_bounds__(kSelectThreads) prepare_rows(const __grid_constant__ SelectedClasses c) {
  const int64_t row = int64_t(blockIdx.x) * kSelectThreads + threadIdx.x;
  if (row < c.rows) prepare_row<A>(c, row);
}

template <class T>
__global__ void __launch_bounds__(kSelectThreads) selected_log_probs(const __grid_constant__ SelectedClasses c) {
  const int64_t i = int64_t(blockIdx.x) * kSelectThreads + threadIdx.x;
  if (i < c.rows * c.count) write_log_prob<T>(c, i);
}

template <class T>
__global__ void __launch_bounds__(kSelectThreads) selected_logits(const __grid_constant__ SelectedClasses c) {
  const int64_t i = int64_t(blockIdx.x) * kSelectThreads + threadIdx.x;
  if (i < c.rows * c.count) static_cast<ComputeOf<T>*>(c.x)[i] = selected_logit<T>(c, i);
}

// The thread of a class's first place in its row writes the gradient, and adds the upstreams of the others in order.
template <class T>
__global__ void __launch_bounds__(kSelectThreads) selected_gradients(const __grid_constant__ SelectedClasses c) {
  const int64_t i = int64_t(blockIdx.x) * kSelectThreads + threadIdx.x;
  if (i >= c.rows * c.count) return;
  const int64_t row = i / c.count, y = c.index[i];
  if (y < 0 || c.target[row] != kElsewhere) return;
  for (int64_t other = row * c.count; other < i; ++other)
    if (c.index[other] == y) return;
  const auto* const upstream = static_cast<const ComputeOf<T>*>(c.grad_log_probs);
  ComputeOf<T> sum = upstream[i];
  for (int64_t other = i + 1; other < (row + 1) * c.count; ++other)
    if (c.index[other] == y) sum += upstream[other];
  write_selected_gradient<T>(c, i, sum);
}

template <class Kernel>
static void run(const SelectedClasses& part, int64_t threads, cudaStream_t stream, Kernel kernel) {
  if (threads == 0) return;
  Grid grid;
  grid.blocks = dim3(unsigned((threads + kSelectThreads - 1) / kSelectThreads));
  grid.threads = kSelectThreads;
  check_launch(launch(grid, stream, kernel, part), "selective_log_softmax");
}

void CudaSelective::prepare(const SelectiveCall& call) const {
  if (checks_values()) call.check_index();
  const bool wide = call.compute == at::kDouble;
  run(call, call.rows, device_.stream(), wide ? prepare_rows<double> : prepare_rows<float>);
}

#define TLK_RUN_BY_TYPE(kernel)                                                              \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits, "selective_log_softmax", \
                                  [&] { run(part, part.rows * part.count, device_.stream(), kernel<scalar_t>); })

void CudaSelective::write_log_probs(const SelectedClasses& part, at::ScalarType logits) const {
  TLK_RUN_BY_TYPE(selected_log_probs);
}
void CudaSelective::gather(const SelectedClasses& part, at::ScalarType logits) const {
  TLK_RUN_BY_TYPE(selected_logits);
}
void CudaSelective::write_gradients(const SelectedClasses& part, at::ScalarType logits) const {
  TLK_RUN_BY_TYPE(selected_gradients);
}

TORCH_LIBRARY_IMPL(tlkernels, CUDA, m) { SelectiveLogSoftmaxOps<CudaCrossEntropyCall, CudaSelective>::implement(m); }

}  // namespace tlk
