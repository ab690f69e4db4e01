// In the place of torch's header: the tensors of the host run are CPU tensors, and its ops take the place of theirs
// only while a test wants them to (switch.h).
#pragma once
#include <cuda_runtime.h>
#include <torch/library.h>

#include "../../switch.h"

namespace c10::cuda {
struct HostStream {
  operator cudaStream_t() const { return nullptr; }
};
inline HostStream getCurrentCUDAStream() { return {}; }
}  // namespace c10::cuda
