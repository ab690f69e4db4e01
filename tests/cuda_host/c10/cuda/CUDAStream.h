// Replaces torch's header. Tensors of the host run are CPU tensors, whose ops it replaces while a test asks for it
// (switch.h).
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
