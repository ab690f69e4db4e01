// Cross entropy on CUDA: the kernels, and the launch of the strategy that the table chooses. The work on one row is in
// cuda_row.cuh.
#pragma once
#include "cuda_row.cuh"
#include "cuda_table.h"

namespace tlk {

// The calling thread's row and the team that shares it.
struct RowTeam {
  Team team;
  int64_t row;
  TLK_DEVICE RowTeam(int lanes, int blocks)
      : team(lanes ? lanes : kWarp, blocks, lanes ? nullptr : shared_memory<char>()),
        row(lanes ? int64_t(blockIdx.x) * (int(blockDim.x) / lanes) + int(threadIdx.x) / lanes
                  : int64_t(blockIdx.x) / blocks) {}
};

// Contiguous classes: a row by some lanes of a warp, a block, or a cluster of blocks.
template <class T, class Store, int kThreads, bool kFull>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_rows(const __grid_constant__ CrossEntropyOnDevice call,                    // the tensors and options
                       const __grid_constant__ CrossEntropyConstants<Compute<T>> constants,  // derived from the options
                       int lanes,     // of a warp per row; 0: whole blocks
                       int blocks) {  // per row
  RowTeam row_team(lanes, blocks);
  CrossEntropyRow<T, kFull> row(call, constants, row_team.row);
  Store store;
  row.run(store, row_team.team, shared_memory<char>() + Team::kScratch);
  row_team.team.wait_for_readers();
}

// Classes that are not contiguous: a row by one thread.
template <class T, bool kShared, bool kFull>
__global__ void __launch_bounds__(128)
    cross_entropy_columns(const __grid_constant__ CrossEntropyOnDevice call,                      // as above
                          const __grid_constant__ CrossEntropyConstants<Compute<T>> constants) {  // as above
  RowTeam row_team(1, 1);
  CrossEntropyRow<T, kFull> row(call, constants, row_team.row);
  InColumn<T, kShared> store(call.x.class_stride, call.grad.class_stride);
  row.run(store, row_team.team, shared_memory<char>());
}

template <class T, bool kFull>
cudaError_t launch_cross_entropy(const CrossEntropyOnDevice& call, const CrossEntropyPlan& plan, cudaStream_t stream) {
  const CrossEntropyConstants<Compute<T>> constants(call);
  constexpr int kMost = most_threads(kFull, sizeof(T));
  const auto rows = [&](auto kernel) {
    return launch(plan.grid, stream, kernel, call, constants, plan.lanes, plan.grid.cluster);
  };
  const auto columns = [&](auto kernel) { return launch(plan.grid, stream, kernel, call, constants); };
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

// Launches cross entropy of logits of type T; cudaErrorNotSupported if no strategy can serve the call.
template <class T>
cudaError_t cross_entropy(const CrossEntropyOnDevice& call, cudaStream_t stream) {
  if (call.rows == 0 || call.classes == 0) return cudaSuccess;
  Device device;
  if (const cudaError_t error = current_device(device)) return error;
  const bool contiguous = call.x.class_stride == 1 && (!call.grad.data || call.grad.class_stride == 1);
  CrossEntropyPlan plan;
  const bool columns = !contiguous && call.classes > 1;
  bool aligned = reinterpret_cast<uintptr_t>(call.x.data) % 16 == 0;
  for (int axis = 0; axis < call.axes; ++axis) aligned &= call.x.stride[axis] * int64_t(sizeof(T)) % 16 == 0;
  const bool full = !call.indices || call.softcap != 0 || call.smoothing != 0 || call.entropy || call.correct;
  if (!plan_cross_entropy(device, call.rows, call.classes, sizeof(T), Team::kScratch, columns, aligned, full, plan))
    return cudaErrorNotSupported;
  return full ? launch_cross_entropy<T, true>(call, plan, stream) : launch_cross_entropy<T, false>(call, plan, stream);
}

}  // namespace tlk
