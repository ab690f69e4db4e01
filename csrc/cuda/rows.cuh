// A loss over rows of classes: how many threads a row gets and where it is kept between the sweeps over it, so that
// each number is read from memory once. Decided by the number of classes alone, so that a row's bits do not depend on
// how many there are.
#pragma once
#include "reduce.cuh"
#include "vector.cuh"

namespace tlk {

constexpr int kRowThreads = 512;  // of a block at the most
constexpr int kRowPacks = 4;      // of a tensor's row that a thread holds at a time

enum class Keep { registers, shared, nothing };

struct RowPlan {
  Keep keep = Keep::registers;
  int threads = kRowThreads;  // of a row in a block: one warp, or the whole block
  int rows = 1;               // of a block
  int cluster = 1;            // blocks of a row
  int64_t packs = 0;          // of each tensor's row in a block
  int64_t shared = 0;         // bytes of a block
};

// Bytes of a tensor's row, when `tensors` of them are read and kept:
//
//   up to 2 KB         a warp in registers, 4 rows in a block, no barrier
//   up to 32 KB        a block in registers
//   shared / tensors   a block in shared memory: 48 KB of two tensors on sm_86, 81 on sm_80, 113 on sm_90
//   8 times as much    sm_90 and later: a cluster of 2, 4 or 8 blocks, each with its part in shared memory
//   above              nothing is kept: each further sweep reads the row again, from the second-level cache where all
//                      rows in work fit there
//
// `numbers` of type `number_bytes` are reduced at a time.
inline RowPlan plan_rows(const Device& device, int64_t classes, int64_t itemsize, int tensors, int numbers,
                         int64_t number_bytes) {
  constexpr int64_t kBlockRows = 4;
  RowPlan plan;
  const int64_t packs = (classes * itemsize + 15) / 16;
  const int64_t scratch = numbers * (kWarp + 1) * number_bytes;
  plan.packs = packs;
  plan.shared = scratch;
  if (packs <= kWarp * kRowPacks) {
    plan.threads = kWarp, plan.rows = kBlockRows, plan.shared = 0;
  } else if (packs <= kRowThreads * kRowPacks) {
    while (plan.threads / 2 * kRowPacks >= packs) plan.threads /= 2;
  } else {
    const int most = device.sm >= 90 ? 8 : 1;
    while (plan.cluster < most && 16 * tensors * plan.packs + scratch > device.shared_bytes) {
      plan.cluster *= 2;
      plan.packs = (packs + plan.cluster - 1) / plan.cluster;
    }
    plan.keep = 16 * tensors * plan.packs + scratch <= device.shared_bytes ? Keep::shared : Keep::nothing;
    if (plan.keep == Keep::nothing) plan.cluster = 1, plan.packs = packs;
    if (plan.keep == Keep::shared) plan.shared += 16 * tensors * plan.packs;
  }
  return plan;
}

inline Grid grid_of(const RowPlan& plan, int64_t rows) {
  Grid grid;
  grid.blocks = dim3(unsigned((rows + plan.rows - 1) / plan.rows * plan.cluster));
  grid.threads = plan.threads * plan.rows;
  grid.shared = plan.shared;
  grid.cluster = plan.cluster;
  return grid;
}

// Which row a thread works on, and where in it.
struct RowPlace {
  int64_t row;
  int thread;          // of the row's in this block
  int64_t begin, end;  // of this block's packs

  TLK_DEVICE explicit RowPlace(const RowPlan& plan) {
    const unsigned rank = plan.cluster > 1 ? blockIdx.x % unsigned(plan.cluster) : 0;
    row = int64_t(blockIdx.x / unsigned(plan.cluster)) * plan.rows + threadIdx.x / unsigned(plan.threads);
    thread = int(threadIdx.x) % plan.threads;
    begin = int64_t(rank) * plan.packs, end = begin + plan.packs;
  }
};

// Each of N numbers over all threads of the row; `scratch` has room for N * (kWarp + 1).
template <class Op, int N, class A>
TLK_DEVICE void reduce_row(A (&values)[N], A* scratch, const RowPlan& plan) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = reduce_warp<Op>(values[i]);
  const int warps = plan.threads / kWarp, lane = int(threadIdx.x) % kWarp;
  if (warps == 1) return;
  __syncthreads();  // whoever reads the last results has
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) scratch[i * kWarp + int(threadIdx.x) / kWarp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i)
    values[i] = reduce_warp<Op>(lane < warps ? scratch[i * kWarp + lane] : Op::template none<A>());
  if (plan.cluster == 1) return;
  A* const ours = scratch + N * kWarp;
  cluster_sync();  // whoever reads the last results has
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) ours[i] = values[i];
  }
  cluster_sync();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = Op::template none<A>();
    for (int rank = 0; rank < plan.cluster; ++rank)
      values[i] = Op::join(values[i], load_from(ours + i, unsigned(rank)));
  }
}

}  // namespace tlk
