// Ops that replace those of the CPU while a test asks for it: TORCH_LIBRARY_IMPL only notes them here.
#pragma once
#include <torch/library.h>

namespace cuda_host {
struct Registration {
  explicit Registration(void (*registers)(torch::Library&));
};
}  // namespace cuda_host

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, key, m)                                                           \
  static void cuda_host_##library##_##key(torch::Library&);                                           \
  static const cuda_host::Registration cuda_host_made_##library##_##key(cuda_host_##library##_##key); \
  static void cuda_host_##library##_##key(torch::Library& m)
