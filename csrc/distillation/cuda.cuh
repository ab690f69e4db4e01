// Distillation on a GPU: the kernel, and the choice of its variant.
#pragma once
#include "cuda_row.cuh"

namespace tlk {

// Blocks per multiprocessor that the compiler must leave registers for. With 0 it decides itself: it goes down to 64
// registers if that spills little, so that two blocks of 512 threads fit. For rows not in registers, three blocks would
// spill 100 words.
template <class T>
constexpr int least_blocks(bool whole) {
  return !whole ? 2 : sizeof(T) == 8 ? 1 : 0;
}

// A row by one warp, one block, or a cluster of blocks.
template <class T, Divergence kD, bool kWhole, int kGrads, bool kCap>
__global__ void __launch_bounds__(kWhole ? kRowThreads : kSweepThreads, least_blocks<T>(kWhole))
    distillation_kernel(const __grid_constant__ DistillationOnDevice call,  // the tensors and options
                        const __grid_constant__ RowPlan plan) {             // rows per block, or blocks per row
  DistillationRow<T, kD, kWhole, kGrads, kCap> row(call, plan);
  if (row.row < call.rows) row.run();
  row.team.wait_for_readers();
}

template <class T, Divergence kD, int kGrads, bool kCap>
cudaError_t distillation_of(const DistillationOnDevice& call, cudaStream_t stream) {
  Device device;
  if (const cudaError_t error = current_device(device)) return error;
  const RowPlan plan = plan_rows<T>(device, call.classes, 2, DistillationRow<T, kD, true, kGrads, kCap>::kPacks);
  if ((call.rows + plan.rows - 1) / plan.rows * plan.cluster > 0x7fffffff) return cudaErrorNotSupported;
  const auto kernel = plan.keep == Keep::registers ? distillation_kernel<T, kD, true, kGrads, kCap>
                                                   : distillation_kernel<T, kD, false, kGrads, kCap>;
  return launch(grid_of(plan, call.rows), stream, kernel, call, plan);
}

template <class T, Divergence kD, int kGrads>
cudaError_t distillation_of(const DistillationOnDevice& call, cudaStream_t stream) {
  return call.has_softcap() ? distillation_of<T, kD, kGrads, true>(call, stream)
                            : distillation_of<T, kD, kGrads, false>(call, stream);
}

// Side 0's gradient alone has a kernel only in kl, where the student may be either side. In js and tv it would be the
// teacher's, which hardly any training asks for.
template <class T, Divergence kD>
cudaError_t distillation_of(const DistillationOnDevice& call, cudaStream_t stream) {
  const bool of_0 = call.side[0].grad, of_1 = call.side[1].grad;
  if (!of_0 && !of_1) return distillation_of<T, kD, 0>(call, stream);
  if (!of_0) return distillation_of<T, kD, 2>(call, stream);
  if constexpr (kD == Divergence::kl)
    if (!of_1) return distillation_of<T, kD, 1>(call, stream);
  return distillation_of<T, kD, 3>(call, stream);
}

template <class T>
cudaError_t distillation_of(const DistillationOnDevice& call, cudaStream_t stream) {
  switch (call.divergence) {
    case Divergence::kl:
      return distillation_of<T, Divergence::kl>(call, stream);
    case Divergence::js:
      return distillation_of<T, Divergence::js>(call, stream);
    default:
      return distillation_of<T, Divergence::tv>(call, stream);
  }
}

// Launches distillation of logits of that type. A class index out of range makes its row NaN.
inline cudaError_t distillation(const DistillationOnDevice& call, Scalar logits, cudaStream_t stream) {
  if (call.rows == 0) return cudaSuccess;
  switch (logits) {
    case Scalar::f64:
      return distillation_of<double>(call, stream);
    case Scalar::f32:
      return distillation_of<float>(call, stream);
    case Scalar::bf16:
      return distillation_of<bf16>(call, stream);
    default:
      return distillation_of<f16>(call, stream);
  }
}

}  // namespace tlk
