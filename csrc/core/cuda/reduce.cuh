// Reductions over some lanes of a warp, or over all threads that share a row. The order is fixed, every thread takes
// part and every thread gets the result.
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
// Ignores NaN, as fmax does.
struct Max {
  template <class A>
  static TLK_DEVICE A join(A a, A b) {
    return fmax(a, b);
  }
  template <class A>
  static TLK_DEVICE A none() {
    return -A(INFINITY);
  }
};
struct Min {
  static TLK_DEVICE long long join(long long a, long long b) { return a < b ? a : b; }
  template <class A>
  static TLK_DEVICE A none() {
    return A(0x7fffffffffffffffll);
  }
};

// Reduces over groups of `lanes` consecutive lanes; `lanes` is a power of two.
template <class Op, class A>
TLK_DEVICE A reduce_warp(A value, int lanes = kWarp) {
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    value = Op::join(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// The threads that share a row: some lanes of a warp, or a block of whole warps, or a cluster of blocks.
class Team {
 public:
  static constexpr int kMost = 5;  // the most numbers that are reduced at once
  // Bytes of shared memory that a team of more than one warp needs: two sets of partial results.
  static constexpr int kScratch = 2 * kMost * (kWarp + 1) * int(sizeof(double));

  // `lanes` of a warp if `scratch` is null; else `blocks` whole blocks, each with kScratch bytes of shared memory.
  TLK_DEVICE Team(int lanes, int blocks, void* scratch)
      : blocks_(blocks), lanes_(lanes), scratch_(static_cast<char*>(scratch)) {}

  TLK_DEVICE int thread() const { return scratch_ ? int(threadIdx.x) : int(threadIdx.x) % lanes_; }  // in its block
  TLK_DEVICE int threads() const { return scratch_ ? int(blockDim.x) : lanes_; }
  TLK_DEVICE int blocks() const { return blocks_; }
  TLK_DEVICE unsigned rank() const { return blocks_ > 1 ? cluster_rank() : 0; }
  TLK_DEVICE bool leads() const { return thread() == 0 && rank() == 0; }

  // Reduces each of N numbers.
  template <class Op, int N, class A>
  TLK_DEVICE void reduce(A (&value)[N]) {
    static_assert(N <= kMost && sizeof(A) <= sizeof(double));
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = reduce_warp<Op>(value[i], lanes_);
    if (!scratch_) return __syncwarp();  // a barrier, as in a block: what was read before may be overwritten after
    // Two sets in turn: before one is written again, all threads have passed the other's barrier.
    A* const part = reinterpret_cast<A*>(scratch_ + turn_ * (kScratch / 2));
    turn_ = 1 - turn_;
    const int warps = int(blockDim.x) / kWarp, lane = int(threadIdx.x) % kWarp;
    if (lane == 0)
      for (int i = 0; i < N; ++i) part[i * (kWarp + 1) + threadIdx.x / kWarp] = value[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i)
      value[i] = reduce_warp<Op>(lane < warps ? part[i * (kWarp + 1) + lane] : Op::template none<A>());
    if (blocks_ == 1) return;
    if (threadIdx.x == 0)
      for (int i = 0; i < N; ++i) part[i * (kWarp + 1) + kWarp] = value[i];
    cluster_arrive(), cluster_wait();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A* const block_result = part + i * (kWarp + 1) + kWarp;
      value[i] = reduce_warp<Op>(lane < blocks_ ? load_from(block_result, unsigned(lane)) : Op::template none<A>());
    }
  }
  template <class Op, class A>
  TLK_DEVICE A reduce(A value) {
    A values[1] = {value};
    reduce<Op>(values);
    return values[0];
  }

  // A barrier of the team's threads.
  TLK_DEVICE void sync() const {
    if (blocks_ > 1)
      cluster_arrive(), cluster_wait();
    else if (scratch_)
      __syncthreads();
    else
      __syncwarp();
  }

  // A block must not end while another block reads its sums. Every thread calls has_read() once, after the last
  // reduction and before it stores much (arriving waits for its stores), and wait_for_readers() at its end.
  TLK_DEVICE void has_read() const {
    if (blocks_ > 1) cluster_arrive();
  }
  TLK_DEVICE void wait_for_readers() const {
    if (blocks_ > 1) cluster_wait();
  }

 private:
  int blocks_, lanes_, turn_ = 0;
  char* scratch_;
};

}  // namespace tlk
