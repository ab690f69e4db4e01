// values *= factor, with the factor in device memory. If it is 1, as an upstream gradient mostly is, no value is read.
#pragma once
#include "vector.cuh"

namespace tlk {

constexpr int kScaleThreads = 256;
constexpr int kScalePacks = 2;   // packs that a thread loads before it stores the first
constexpr int kScaleBlocks = 8;  // blocks per multiprocessor; no more fit, and a grid with nothing to do is small

struct Factor {
  const void* data;  // one number in device memory
  Scalar type;       // its type
};

// The factor, rounded to A as torch's cast would, without a launch for the cast.
template <class A>
TLK_DEVICE A read(const Factor& factor) {
  switch (factor.type) {
    case Scalar::f64:
      return A(*static_cast<const double*>(factor.data));
    case Scalar::f32:
      return A(*static_cast<const float*>(factor.data));
    case Scalar::bf16:
      return A(widen(*static_cast<const bf16*>(factor.data)));
    case Scalar::f16:
      return A(widen(*static_cast<const f16*>(factor.data)));
  }
  return A(1);
}

template <class T>
__global__ void __launch_bounds__(kScaleThreads) scale_kernel(T* values,      // (n), contiguous
                                                              Factor factor,  // one number
                                                              int64_t n) {    // how many values
  const auto by = read<Compute<T>>(factor);
  if (by == 1) return;
  const int64_t head = head_of(values, n), packs = (n - head) / kLanes<T>, tail = head + packs * kLanes<T>;
  uint4* const aligned = reinterpret_cast<uint4*>(values + head);
  const int64_t step = int64_t(gridDim.x) * kScaleThreads;
  for (int64_t first = int64_t(blockIdx.x) * kScaleThreads + threadIdx.x; first < packs; first += kScalePacks * step) {
    uint4 bits[kScalePacks] = {};
#pragma unroll
    for (int i = 0; i < kScalePacks; ++i)
      if (first + i * step < packs) bits[i] = load_streaming(aligned + first + i * step);
#pragma unroll
    for (int i = 0; i < kScalePacks; ++i) {
      if (first + i * step >= packs) break;
      Pack<T> pack(bits[i]);
#pragma unroll
      for (int k = 0; k < kLanes<T>; ++k) pack.lane[k] = narrow<T>(widen(pack.lane[k]) * by);
      store_streaming(aligned + first + i * step, pack.bits);
    }
  }
  if (blockIdx.x > 0) return;
  for (int64_t i = threadIdx.x; i < head + n - tail; i += kScaleThreads) {
    T& value = values[i < head ? i : tail + i - head];
    value = narrow<T>(widen(value) * by);
  }
}

// Multiplies n contiguous values by the factor.
template <class T>
cudaError_t scale(T* values, Factor factor, int64_t n, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  Device device;
  if (const cudaError_t error = current_device(device)) return error;
  constexpr int64_t each = int64_t(kScaleThreads) * kScalePacks * kLanes<T>;
  const int64_t wanted = (n + each - 1) / each, most = int64_t(device.multiprocessors) * kScaleBlocks;
  Grid grid;
  grid.blocks = dim3(unsigned(wanted < most ? wanted : most));
  grid.threads = kScaleThreads;
  return launch(grid, stream, scale_kernel<T>, values, factor, n);
}

}  // namespace tlk
