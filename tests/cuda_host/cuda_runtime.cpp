// The device that the host run pretends to be.
#include <cuda_runtime.h>

#include <cstdlib>
#include <map>
#include <string>

namespace {

std::map<const void*, size_t> allowed;  // bytes of shared memory of kernels that have opted in to more

// TLKERNELS_CUDA_HOST_SM=80 is a device without clusters.
int sm() {
  const char* text = std::getenv("TLKERNELS_CUDA_HOST_SM");
  return text ? std::atoi(text) : 90;
}

constexpr size_t kWithoutOptIn = 48 << 10;

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = sm() / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = sm() % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = sm() == 90 ? 227 << 10 : sm() == 80 ? 163 << 10 : 99 << 10;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (value > most) return cudaErrorInvalidValue;
  allowed[function] = size_t(value);
  return cudaSuccess;
}

cudaError_t cuda_host::check(const cudaLaunchConfig_t& config, const void* kernel, Launch& launch) {
  launch.grid = config.gridDim, launch.block = config.blockDim, launch.shared = config.dynamicSmemBytes;
  for (unsigned i = 0; i < config.numAttrs; ++i) launch.cluster = config.attrs[i].val.clusterDim.x;
  const auto [x, y, z] = launch.grid;
  if (x == 0 || y == 0 || z == 0 || x > 0x7fffffffu || y > 0xffffu || z > 0xffffu) return cudaErrorInvalidConfiguration;
  if (launch.block.x == 0 || launch.block.x > 1024) return cudaErrorInvalidConfiguration;
  if (launch.cluster > 1 && (sm() < 90 || launch.cluster > 16 || x % launch.cluster))
    return cudaErrorInvalidConfiguration;
  const auto opted_in = allowed.find(kernel);
  const size_t most = opted_in == allowed.end() ? kWithoutOptIn : std::max(opted_in->second, kWithoutOptIn);
  return launch.shared > most ? cudaErrorInvalidValue : cudaSuccess;
}
