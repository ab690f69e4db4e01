// The only file with inline PTX: dynamic shared memory, asynchronous copies, clusters, tensor cores. The host run has
// these functions in C++, in tests/cuda_host/ptx_host.h.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device.cuh"

#ifdef TLK_CUDA_HOST
#include <ptx_host.h>
#else

namespace tlk {

// The block's shared memory, aligned to 128 bytes. All shared memory is requested at launch.
template <class T>
TLK_DEVICE T* shared_memory() {
  extern __shared__ __align__(128) unsigned char tlk_shared[];
  return reinterpret_cast<T*>(tlk_shared);
}

// Loads or stores 16 bytes at an aligned address, without keeping them in the first-level cache.
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

// Starts a copy of 16 bytes to shared memory, of zeros if not `valid`. A commit makes the copies started since the last
// one a group; cp_async_wait waits for all groups but the last kPending.
TLK_DEVICE void cp_async_16(void* shared, const void* global, bool valid = true) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
TLK_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
TLK_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 2^x with a relative error below 2^-22; results below 2^-126 are 0.
TLK_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger of two pairs of 16-bit numbers, each in 32 bits; NaN only where both are.
template <class T>
TLK_DEVICE unsigned larger_pair(unsigned a, unsigned b);
template <>
TLK_DEVICE unsigned larger_pair<__nv_bfloat16>(unsigned a, unsigned b) {
  unsigned c;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
template <>
TLK_DEVICE unsigned larger_pair<__half>(unsigned a, unsigned b) {
  unsigned c;
  asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

// The block's index in its cluster.
TLK_DEVICE unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// The two halves of a barrier of all threads of the cluster. Reads and writes before arriving, in global memory too,
// come before those after waiting. Arriving therefore takes until the thread's pending stores are done.
TLK_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
TLK_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The value at p's offset in the shared memory of block `rank` of the cluster.
template <class T>
TLK_DEVICE T load_from(const T* p, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  const unsigned own_address = static_cast<unsigned>(__cvta_generic_to_shared(p));
  unsigned address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own_address), "r"(rank));
  T value;
  if constexpr (sizeof(T) == 4) {
    unsigned bits;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(bits) : "r"(address) : "memory");
    memcpy(&value, &bits, sizeof value);
  } else {
    unsigned long long bits;
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(bits) : "r"(address) : "memory");
    memcpy(&value, &bits, sizeof value);
  }
  return value;
#else
  return *p;
#endif
}

// Loads four 8 x 8 matrices of 16-bit numbers from shared memory. Lane l passes the address of row l % 8 of matrix l /
// 8 and receives columns 2 * (l % 4) and 2 * (l % 4) + 1 of row l / 4 of each matrix.
TLK_DEVICE void ldmatrix_x4(unsigned (&matrices)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

// c += a b on tensor cores, with a 16 x 16 and b 16 x 8 of the 16-bit type T, distributed over the warp as mma.m16n8k16
// defines: lane l holds columns 2 * (l % 4) and 2 * (l % 4) + 1 of rows l / 4 and l / 4 + 8 of c.
template <class T>
TLK_DEVICE void mma_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
#define TLK_MMA(T, name)                                                                            \
  template <>                                                                                       \
  TLK_DEVICE void mma_16x8x16<T>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                      \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                      \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                            \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                            \
  }
TLK_MMA(__nv_bfloat16, "bf16")
TLK_MMA(__half, "f16")
#undef TLK_MMA

}  // namespace tlk

#endif
