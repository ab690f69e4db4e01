// csrc/cuda/ptx.cuh in C++. Included by it alone.
#pragma once
#include <cuda_runtime.h>

namespace tlk {

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(cuda_host::now->shared);
}

inline uint4 load_streaming(const uint4* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) cuda_host::fail("a load of 16 bytes is not aligned", CUDA_HOST_HERE);
  return *p;
}
inline void store_streaming(uint4* p, uint4 v) {
  if (reinterpret_cast<uintptr_t>(p) % 16) cuda_host::fail("a store of 16 bytes is not aligned", CUDA_HOST_HERE);
  *p = v;
}

// The copy happens as late as it may, so that a wait that is missing shows.
inline void cp_async_16(void* shared, const void* global, bool there = true) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16)
    cuda_host::fail("a copy of 16 bytes is not aligned", CUDA_HOST_HERE);
  cuda_host::copy_later(shared, there ? global : nullptr, 16);
}
inline void cp_async_commit() { cuda_host::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  cuda_host::wait_for_copies(kPending);
}

inline float exp2_approximate(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0 : y;
}

inline unsigned cluster_rank() { return cuda_host::now->cluster_rank; }
inline void cluster_sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_host::barrier(cuda_host::Scope::cluster, {file, line});
}
template <class T>
T load_from(const T* p, unsigned rank) {
  return *static_cast<const T*>(cuda_host::shared_of(p, rank));
}

}  // namespace tlk
