// The device and kernel launches, without torch. With the cuda_runtime.h of tests/cuda_host, g++ compiles the kernels
// for the host.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

namespace tlk {

#define TLK_DEVICE __device__ __forceinline__

struct Device {
  int sm = 0;  // 90 for compute capability 9.0
  int multiprocessors = 0;
  int64_t shared_bytes = 0;  // the most that a block may have
};

inline cudaError_t current_device(Device& device) {
  int index = 0, major = 0, minor = 0, shared = 0;
  if (const cudaError_t error = cudaGetDevice(&index)) return error;
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(&value, attribute, index);
  };
  if (const cudaError_t error = ask(major, cudaDevAttrComputeCapabilityMajor)) return error;
  if (const cudaError_t error = ask(minor, cudaDevAttrComputeCapabilityMinor)) return error;
  if (const cudaError_t error = ask(shared, cudaDevAttrMaxSharedMemoryPerBlockOptin)) return error;
  device.sm = 10 * major + minor;
  device.shared_bytes = shared;
  return ask(device.multiprocessors, cudaDevAttrMultiProcessorCount);
}

constexpr int kWarp = 32;

struct Grid {
  dim3 blocks;
  int threads = 0;
  int64_t shared = 0;  // bytes
  int cluster = 1;     // blocks along x that share memory; sm_90 and later
};

// Launches kernel(args...) on the stream.
template <class... Params, class... Args>
cudaError_t launch(const Grid& grid, cudaStream_t stream, void (*kernel)(Params...), const Args&... args) {
  constexpr int64_t kWithoutOptIn = 48 << 10;
  if (grid.shared > kWithoutOptIn) {
    const auto size = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const auto error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), size, int(grid.shared)))
      return error;
  }
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(grid.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.blocks;
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = size_t(grid.shared);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

}  // namespace tlk
