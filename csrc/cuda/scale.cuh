// values *= factor, which is in memory: where it is 1, as an upstream gradient mostly is, nothing is read or written.
#pragma once
#include "vector.cuh"

namespace tlk {

constexpr int kScaleThreads = 256;
constexpr int kScalePacks = 4;  // of a thread: 16 KB a block, so that a grid with nothing to do is small

template <class T>
__global__ void __launch_bounds__(kScaleThreads) scale_kernel(T* values, const Compute<T>* factor, int64_t n) {
  const Compute<T> by = *factor;
  if (by == 1) return;
  const int64_t head = head_of(values, n), packs = (n - head) / kLanes<T>, tail = head + packs * kLanes<T>;
  uint4* const aligned = reinterpret_cast<uint4*>(values + head);
  const int64_t first = int64_t(blockIdx.x) * kScaleThreads * kScalePacks + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kScalePacks; ++i) {
    const int64_t at = first + i * kScaleThreads;
    if (at >= packs) break;
    Pack<T> pack(load_streaming(aligned + at));
#pragma unroll
    for (int k = 0; k < kLanes<T>; ++k) pack.lane[k] = narrow<T>(widen(pack.lane[k]) * by);
    store_streaming(aligned + at, pack.bits);
  }
  if (blockIdx.x > 0) return;
  for (int64_t i = threadIdx.x; i < head + n - tail; i += kScaleThreads) {
    T& value = values[i < head ? i : tail + i - head];
    value = narrow<T>(widen(value) * by);
  }
}

// n contiguous values; `factor` is of their compute type.
template <class T>
cudaError_t scale(T* values, const Compute<T>* factor, int64_t n, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  constexpr int64_t each = int64_t(kScaleThreads) * kScalePacks * kLanes<T>;
  Grid grid;
  grid.blocks = dim3(unsigned((n + each - 1) / each));
  grid.threads = kScaleThreads;
  return launch(grid, stream, scale_kernel<T>, values, factor, n);
}

}  // namespace tlk
