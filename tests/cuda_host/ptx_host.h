// The functions of csrc/core/cuda/ptx.cuh in C++. Only that file includes this one.
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

// The copy happens as late as allowed, so that a missing wait is seen.
inline void cp_async_16(void* shared, const void* global, bool valid = true) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16)
    cuda_host::fail("a copy of 16 bytes is not aligned", CUDA_HOST_HERE);
  cuda_host::copy_later(shared, valid ? global : nullptr, 16);
}
inline void cp_async_commit() { cuda_host::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  cuda_host::wait_for_copies(kPending);
}

inline float fast_exp2(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0 : y;
}

inline unsigned cluster_rank() { return cuda_host::now->cluster_rank; }
inline void cluster_arrive(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_host::cluster_arrive({file, line});
}
inline void cluster_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_host::cluster_wait({file, line});
}
template <class T>
T load_from(const T* p, unsigned rank) {
  return *static_cast<const T*>(cuda_host::read_shared_of(p, rank));
}

// Reads at once, so that a write by another thread before the next barrier is seen.
inline void ldmatrix_x4(unsigned (&matrices)[4], const void* row, const char* file = __builtin_FILE(),
                        int line = __builtin_LINE()) {
  if (reinterpret_cast<uintptr_t>(row) % 16) cuda_host::fail("a row of ldmatrix is not aligned", {file, line});
  const auto rows = cuda_host::lanes(0xffffffffu, row, "ldmatrix", {file, line});
  const unsigned lane = cuda_host::now->lane;
  for (unsigned k = 0; k < 4; ++k)
    memcpy(&matrices[k], static_cast<const char*>(rows[8 * k + lane / 4]) + lane % 4 * 4, 4);
}

inline float wide(__nv_bfloat16 v) { return __bfloat162float(v); }
inline float wide(__half v) { return __half2float(v); }

template <class T>
unsigned larger_pair(unsigned a, unsigned b) {
  T left[2], right[2];
  memcpy(left, &a, sizeof a);
  memcpy(right, &b, sizeof b);
  for (int i = 0; i < 2; ++i) {
    const float x = wide(left[i]), y = wide(right[i]);
    if (x != x || x < y) left[i] = right[i];
  }
  memcpy(&a, left, sizeof a);
  return a;
}

// Sums are rounded after each product; tensor cores are at least as accurate.
template <class T>
void mma_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
  struct Operands {
    T a[4][2], b[2][2];  // a: rows g and g + 8 of features 2t.., then of features 8 + 2t..; b: of the same features
  } mine;
  memcpy(mine.a, a, sizeof mine.a);
  memcpy(mine.b[0], &b0, sizeof b0);
  memcpy(mine.b[1], &b1, sizeof b1);
  const auto all = cuda_host::lanes(0xffffffffu, mine, "mma", {file, line});
  const unsigned lane = cuda_host::now->lane;
  for (unsigned t = 0; t < 4; ++t) {
    const Operands left = all[lane / 4 * 4 + t];
    for (unsigned column = 0; column < 2; ++column) {
      const Operands right = all[(lane % 4 * 2 + column) * 4 + t];
      for (unsigned half = 0; half < 2; ++half)
        for (unsigned k = 0; k < 4; ++k)
          c[2 * half + column] += wide(left.a[k / 2 * 2 + half][k % 2]) * wide(right.b[k / 2][k % 2]);
    }
  }
}

}  // namespace tlk
