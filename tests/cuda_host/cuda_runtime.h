// Replaces the toolkit's header for g++, as far as the CUDA kernels use it. A kernel's threads are fibers (fibers.h).
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- in a block and in a warp ----

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_host::barrier({file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_host::exchange(mask, "", 1, "__syncwarp", {file, line});
}

namespace cuda_host {

// The values that the lanes have exchanged.
template <class T>
struct Lanes {
  const char* slots;
  T operator[](unsigned lane) const {
    T value;
    memcpy(&value, slots + lane * kExchanged, sizeof value);
    return value;
  }
};
template <class T>
Lanes<T> lanes(unsigned mask, const T& value, const char* what, Place place) {
  return {exchange(mask, &value, sizeof value, what, place)};
}

template <class T>
T shuffle(unsigned mask, T value, unsigned from, int width, const char* what, Place place) {
  const Lanes<T> all = lanes(mask, value, what, place);
  const unsigned lane = now->lane;
  if (lane / unsigned(width) != from / unsigned(width) || from > 31) return value;  // the lane's, as on a GPU
  if (!(mask >> from & 1)) fail("a shuffle reads a lane that the mask leaves out", place);
  return all[from];
}

}  // namespace cuda_host

#define CUDA_HOST_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_HOST_PLACE) {
  return cuda_host::shuffle(mask, value, cuda_host::now->lane ^ unsigned(bits), width, "__shfl_xor_sync", {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, CUDA_HOST_PLACE) {
  return cuda_host::shuffle(mask, value, cuda_host::now->lane - by, width, "__shfl_up_sync", {file, line});
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, CUDA_HOST_PLACE) {
  const unsigned lane = cuda_host::now->lane / unsigned(width) * unsigned(width) + unsigned(from) % unsigned(width);
  return cuda_host::shuffle(mask, value, lane, width, "__shfl_sync", {file, line});
}
#undef CUDA_HOST_PLACE

// ---- numbers ----

using std::min;

template <class To, class From>
To cuda_host_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned x) { return cuda_host_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return cuda_host_bits<unsigned>(x); }
// Products that are not fused with a sum: x86 code without -mfma fuses none.
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }

// ---- on the host ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801
};
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "an error of the host run" : "no error"; }
using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value);

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace cuda_host {
cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel, Launch& launch);
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  cuda_host::Launch launch;
  const cudaError_t error = cuda_host::check(*config, reinterpret_cast<const void*>(kernel), launch);
  if (error == cudaSuccess) cuda_host::run(launch, [&] { kernel(Params(args)...); });
  return error;
}
