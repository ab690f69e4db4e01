// Everything that is not plain C++ or a documented intrinsic: inline PTX, shared memory of a size known at launch,
// clusters. Nothing else has asm. The host run has these functions in C++, in tests/cuda_host/ptx_host.h.
#pragma once
#include "device.cuh"

#ifdef TLK_CUDA_HOST
#include <ptx_host.h>
#else

namespace tlk {

// The block's shared memory, aligned to 128 bytes. All shared memory is asked for at launch.
template <class T>
TLK_DEVICE T* shared_memory() {
  extern __shared__ __align__(128) unsigned char tlk_shared[];
  return reinterpret_cast<T*>(tlk_shared);
}

// 16 bytes at an aligned address, which the next read does not want in the first-level cache.
TLK_DEVICE uint4 load_streaming(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
TLK_DEVICE void store_streaming(uint4* p, uint4 v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// Copies 16 bytes to shared memory, zeros where they are not `there`, while the thread goes on. Those that were asked
// for before the commit are one group; a wait is for all groups but the last kPending.
TLK_DEVICE void cp_async_16(void* shared, const void* global, bool there = true) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(there ? 16 : 0) : "memory");
}
TLK_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
TLK_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 2^x within 2^-22 of it; numbers below 2^-126 are 0.
TLK_DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A block's number in its cluster.
TLK_DEVICE unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// A barrier of all threads of the cluster, which orders their accesses to each other's shared memory.
TLK_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
#endif
}

// The number at the same place in the shared memory of another block of the cluster.
template <class T>
TLK_DEVICE T load_from(const T* p, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  const unsigned here = static_cast<unsigned>(__cvta_generic_to_shared(p));
  unsigned there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  T value;
  if constexpr (sizeof(T) == 4) {
    unsigned bits;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(bits) : "r"(there) : "memory");
    memcpy(&value, &bits, sizeof value);
  } else {
    unsigned long long bits;
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(bits) : "r"(there) : "memory");
    memcpy(&value, &bits, sizeof value);
  }
  return value;
#else
  return *p;
#endif
}

}  // namespace tlk

#endif
