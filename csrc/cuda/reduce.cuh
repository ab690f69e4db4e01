// Sums and the like over the threads of a warp, a block and a cluster, in a fixed order. All threads take part and all
// get the result.
#pragma once
#include "ptx.cuh"

namespace tlk {

struct Sum {
  template <class A>
  static TLK_DEVICE A join(A a, A b) {
    return a + b;
  }
  template <class A>
  static TLK_DEVICE A none() {
    return A(0);
  }
};
// A NaN stays.
struct Max {
  template <class A>
  static TLK_DEVICE A join(A a, A b) {
    return a > b || a != a ? a : b;
  }
  template <class A>
  static TLK_DEVICE A none() {
    return -A(INFINITY);
  }
};

template <class Op, class A>
TLK_DEVICE A reduce_warp(A value) {
#pragma unroll
  for (int with = kWarp / 2; with > 0; with /= 2) value = Op::join(value, __shfl_xor_sync(0xffffffffu, value, with));
  return value;
}

// `scratch` is shared memory for kWarp numbers; the next use of it may follow at once. The threads are whole warps.
template <class Op, class A>
TLK_DEVICE A reduce_block(A value, A* scratch) {
  value = reduce_warp<Op>(value);
  const int warps = int(blockDim.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  if (warps == 1) return value;
  __syncthreads();  // whoever reads the last result has
  if (lane == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  return reduce_warp<Op>(lane < warps ? scratch[lane] : Op::template none<A>());
}

// The same over `blocks` blocks of a cluster; `scratch` has room for one number more.
template <class Op, class A>
TLK_DEVICE A reduce_cluster(A value, A* scratch, int blocks) {
  value = reduce_block<Op>(value, scratch);
  if (blocks == 1) return value;
  cluster_sync();  // whoever reads the last result has
  if (threadIdx.x == 0) scratch[kWarp] = value;
  cluster_sync();
  A all = Op::template none<A>();
  for (int rank = 0; rank < blocks; ++rank) all = Op::join(all, load_from(scratch + kWarp, unsigned(rank)));
  return all;
}

}  // namespace tlk
