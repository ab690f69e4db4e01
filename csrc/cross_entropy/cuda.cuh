// Cross entropy on CUDA: kernels, and the launch of the one that the table chooses.
#pragma once
#include "cuda_row.cuh"
#include "cuda_table.h"

namespace tlk {

// The team of the calling thread and the number of its row.
struct TeamOf {
  Team team;
  int64_t row;
  TLK_DEVICE TeamOf(int lanes, int blocks)
      : team(lanes ? lanes : kWarp, blocks, lanes ? nullptr : shared_memory<char>()),
        row(lanes ? int64_t(blockIdx.x) * (int(blockDim.x) / lanes) + int(threadIdx.x) / lanes
                  : int64_t(blockIdx.x) / blocks) {}
};

template <class T, class Store, int kThreads, bool kFull>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_rows(const __grid_constant__ CrossEntropyOnDevice call,
                       const __grid_constant__ CrossEntropyNumbers<Compute<T>> numbers, int lanes, int blocks) {
  TeamOf of(lanes, blocks);
  RowOf<T, kFull> row(call, numbers, of.row);
  Store store;
  row.run(store, of.team, shared_memory<char>() + Team::kScratch);
  of.team.wait_for_readers();
}

template <class T, bool kShared, bool kFull>
__global__ void __launch_bounds__(128)
    cross_entropy_columns(const __grid_constant__ CrossEntropyOnDevice call,
                          const __grid_constant__ CrossEntropyNumbers<Compute<T>> numbers) {
  TeamOf of(1, 1);
  RowOf<T, kFull> row(call, numbers, of.row);
  InColumn<T, kShared> store(call.x.class_stride, call.grad.class_stride);
  row.run(store, of.team, shared_memory<char>());
}

template <class T, bool kFull>
cudaError_t launch_cross_entropy(const CrossEntropyOnDevice& call, const CrossEntropyPlan& plan, cudaStream_t stream) {
  const CrossEntropyNumbers<Compute<T>> numbers(call);
  constexpr int kMost = most_threads(kFull, sizeof(T));
  const auto rows = [&](auto kernel) {
    return launch(plan.grid, stream, kernel, call, numbers, plan.lanes, plan.grid.cluster);
  };
  const auto columns = [&](auto kernel) { return launch(plan.grid, stream, kernel, call, numbers); };
  switch (plan.strategy->place) {
    case Place::lanes:
      return rows(cross_entropy_rows<T, InLanes<T>, 128, kFull>);
    case Place::registers:
      return rows(cross_entropy_rows<T, InRegisters<T>, kMost, kFull>);
    case Place::shared:
      return rows(cross_entropy_rows<T, InShared<T>, 512, kFull>);
    case Place::memory:
      return rows(cross_entropy_rows<T, InMemory<T>, kMost, kFull>);
    case Place::column_shared:
      return columns(cross_entropy_columns<T, true, kFull>);
    case Place::column_memory:
      return columns(cross_entropy_columns<T, false, kFull>);
  }
  return cudaErrorInvalidValue;
}

// All rows of a call with logits of type T; cudaErrorNotSupported where no strategy serves it.
template <class T>
cudaError_t cross_entropy(const CrossEntropyOnDevice& call, cudaStream_t stream) {
  if (call.rows == 0 || call.classes == 0) return cudaSuccess;
  Device device;
  if (const cudaError_t error = current_device(device)) return error;
  const bool contiguous = call.x.class_stride == 1 && (!call.grad.data || call.grad.class_stride == 1);
  CrossEntropyPlan plan;
  const bool columns = !contiguous && call.classes > 1;
  const bool full = !call.indices || call.softcap != 0 || call.smoothing != 0 || call.entropy || call.correct;
  if (!plan_cross_entropy(device, call.rows, call.classes, sizeof(T), Team::kScratch, columns, full, plan))
    return cudaErrorNotSupported;
  return full ? launch_cross_entropy<T, true>(call, plan, stream) : launch_cross_entropy<T, false>(call, plan, stream);
}

}  // namespace tlk
