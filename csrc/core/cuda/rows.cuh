// How many threads work on a row of classes, and where they keep it between their sweeps so that each number is read
// from memory once. The number of classes alone decides: a row's result does not depend on the number of rows.
#pragma once
#include "reduce.cuh"

namespace tlk {

constexpr int kRowThreads = 512;    // the most threads of a block
constexpr int kSweepThreads = 256;  // threads of a block whose row is not in registers
// The most packs of each tensor's row in a thread's registers. Fewer in float64, whose exponentials need registers.
template <class T>
constexpr int kRowPacks = sizeof(T) == 8 ? 2 : 4;

enum class Keep { registers, shared, nothing };  // where a row is kept

struct RowPlan {
  static constexpr int64_t kScratch = (Team::kScratch + 15) / 16 * 16;  // bytes of the reductions

  Keep keep = Keep::registers;
  int threads = kRowThreads;  // threads of a block that share a row: one warp, or the whole block
  int rows = 1;               // rows per block
  int cluster = 1;            // blocks per row
  int64_t packs = 0;          // packs of each tensor's row per block
  int64_t shared = 0;         // bytes of shared memory per block
};

// The plan for rows of `tensors` tensors, of which a thread's registers hold `thread_packs` packs each. By size of the
// row, by reasoning on 2026-11-21, without a GPU:
//
//   2 KB of a tensor   One warp, in registers; 4 rows per block, no barrier. Less if thread_packs is below 4.
//   32 KB of a tensor  One block of up to 512 threads, in registers. Less if thread_packs is below 4.
//   shared memory      One block of 256 threads: at 128 registers each, two fit on a multiprocessor. Up to half of a
//                      block's limit with clusters (113 KB on sm_90), so that one row loads while another is computed;
//                      up to all of it without (99 KB on sm_86, 163 KB on sm_80).
//   8 times as much    sm_90 and later: a cluster of 2, 4 or 8 blocks, each with a part of the row in shared memory; up
//                      to all of a block's limit if 8 blocks at half are too few.
//   above              Nothing is kept: each sweep reads the row again, from the second-level cache if all rows in
//                      flight fit there.
template <class T>
RowPlan plan_rows(const Device& device, int64_t classes, int tensors, int thread_packs) {
  constexpr int64_t kBlockRows = 4;
  RowPlan plan;
  const int64_t packs = (classes * int64_t(sizeof(T)) + 15) / 16;
  plan.packs = packs;
  plan.shared = RowPlan::kScratch;
  if (packs <= kWarp * thread_packs) {
    plan.threads = kWarp, plan.rows = kBlockRows, plan.shared = 0;
  } else if (packs <= kRowThreads * thread_packs) {
    while (plan.threads / 2 * thread_packs >= packs) plan.threads /= 2;
  } else {
    plan.threads = kSweepThreads;
    const auto block = [&](int cluster) {
      return 16 * tensors * ((packs + cluster - 1) / cluster) + RowPlan::kScratch;
    };
    if (device.sm >= 90)
      while (plan.cluster < 8 && block(plan.cluster) > device.shared_bytes / 2) plan.cluster *= 2;
    if (block(plan.cluster) <= device.shared_bytes) {
      plan.keep = Keep::shared;
      plan.packs = (packs + plan.cluster - 1) / plan.cluster;
      plan.shared = block(plan.cluster);
    } else {
      plan.keep = Keep::nothing;
      plan.cluster = 1;
    }
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

// The threads that share the calling thread's row; `cluster` is plan.cluster, or 1 where the kernel knows it. Shared
// memory holds the reductions' scratch first, then the row.
TLK_DEVICE Team team_of(const RowPlan& plan, int cluster) {
  return Team(kWarp, cluster, plan.rows > 1 ? nullptr : shared_memory<char>());
}
// The calling thread's row.
TLK_DEVICE int64_t row_of(const RowPlan& plan) {
  return int64_t(blockIdx.x / unsigned(plan.cluster)) * plan.rows + threadIdx.x / unsigned(plan.threads);
}

}  // namespace tlk
