// Shared by the CUDA ops: the current device and stream, checks of values, errors of launches.
#pragma once
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdlib>
#include <cstring>

#include "../call.h"

namespace tlk {

// Makes a device the current one while it lives.
struct OnDevice {
  explicit OnDevice(c10::Device device) : guard(device) {}
  explicit OnDevice(const at::Tensor& tensor) : OnDevice(tensor.device()) {}
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream(); }

 private:
  c10::cuda::CUDAGuard guard;
};

// Whether TLKERNELS_CHECK=1 is in the environment: ops then check values on the device, and the host waits for them.
inline bool checks_values() {
  const char* const wanted = std::getenv("TLKERNELS_CHECK");
  return wanted && std::strcmp(wanted, "1") == 0;
}

// Raises IndexError with TLKERNELS_CHECK=1 if a class index is out of range. Without the check, its loss is NaN.
inline void check_classes(const at::Tensor& target, int64_t classes, int64_t ignore_index, int64_t least = 0) {
  if (!checks_values()) return;
  const at::Tensor bad = target.ne(ignore_index).logical_and_(target.lt(least).logical_or_(target.ge(classes)));
  TORCH_CHECK_INDEX(!bad.any().item<bool>(), "target: expected class indices in [", least, ", ", classes,
                    ") or ignore_index (", ignore_index, "), got ", target.masked_select(bad)[0].item<int64_t>());
}

inline void check_launch(cudaError_t error, const char* what) {
  TORCH_CHECK(error == cudaSuccess, what, ": the kernel was not launched: ", cudaGetErrorString(error));
}

}  // namespace tlk
