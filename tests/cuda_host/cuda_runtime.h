// In the place of the toolkit's header, for g++: a kernel's threads run as fibers (fibers.h). Only what the CUDA kernels use.
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

constexpr int warpSize = 32;

#define CUDA_HOST_VECTOR(T, name)                                                    \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_HOST_VECTOR(float, float)
CUDA_HOST_VECTOR(double, double)
CUDA_HOST_VECTOR(int, int)
CUDA_HOST_VECTOR(unsigned, uint)
#undef CUDA_HOST_VECTOR

// ---- within a block and a warp ----

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_host::barrier({file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_host::exchange(mask, "", 1, "__syncwarp", {file, line});
}

namespace cuda_host {

// Every lane's value, by lane.
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
  if (lane / unsigned(width) != from / unsigned(width) || from > 31) return value;  // the own one, as on a GPU
  if (!(mask >> from & 1)) fail("a shuffle reads a lane that the mask leaves out", place);
  return all[from];
}

template <class T>
unsigned votes(unsigned mask, T predicate, const char* what, Place place) {
  const Lanes<bool> all = lanes(mask, bool(predicate), what, place);
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) result |= unsigned(all[lane]) << lane;
  return result;
}

}  // namespace cuda_host

#define CUDA_HOST_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32, CUDA_HOST_PLACE) {
  return cuda_host::shuffle(mask, value, cuda_host::now->lane ^ unsigned(with), width, "__shfl_xor_sync", {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, CUDA_HOST_PLACE) {
  return cuda_host::shuffle(mask, value, cuda_host::now->lane + by, width, "__shfl_down_sync", {file, line});
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
inline unsigned __ballot_sync(unsigned mask, bool predicate, CUDA_HOST_PLACE) {
  return cuda_host::votes(mask, predicate, "__ballot_sync", {file, line});
}
inline bool __any_sync(unsigned mask, bool predicate, CUDA_HOST_PLACE) {
  return cuda_host::votes(mask, predicate, "__any_sync", {file, line}) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate, CUDA_HOST_PLACE) {
  return cuda_host::votes(mask, predicate, "__all_sync", {file, line}) == mask;
}
#undef CUDA_HOST_PLACE

template <class T>
T atomicAdd(T* p, T value) {
  const T before = *p;
  *p = before + value;
  return before;
}
template <class T>
T atomicMax(T* p, T value) {
  const T before = *p;
  if (value > before) *p = value;
  return before;
}
template <class T>
T atomicMin(T* p, T value) {
  const T before = *p;
  if (value < before) *p = value;
  return before;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- numbers ----

using std::max;
using std::min;

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class To, class From>
To cuda_host_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned x) { return cuda_host_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return cuda_host_bits<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_host_bits<float>(x); }
inline int __float_as_int(float x) { return cuda_host_bits<int>(x); }
inline double __longlong_as_double(long long x) { return cuda_host_bits<double>(x); }
inline long long __double_as_longlong(double x) { return cuda_host_bits<long long>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
// Products that are not fused with a sum; x86 code without -mfma has no other.
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }

// ---- the host's side ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801
};
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "an error of the host run" : "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};
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
