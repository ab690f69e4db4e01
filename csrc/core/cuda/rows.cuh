// A loss over rows of classes: how many threads a row gets and where it is kept between the sweeps over it, so that
// each number is read from memory once. Decided by the number of classes alone, so that a row's bits do not depend on
// how many there are.
#pragma once
#include "reduce.cuh"

namespace tlk {

constexpr int kRowThreads = 512;    // of a block at the most
constexpr int kSweepThreads = 256;  // of one whose row is not in registers
// Packs of a tensor's row that a thread holds at a time, at the most. Of float64 fewer, whose exponentials take
// registers themselves.
template <class T>
constexpr int kRowPacks = sizeof(T) == 8 ? 2 : 4;

enum class Keep { registers, shared, nothing };

struct RowPlan {
  static constexpr int64_t kScratch = (Team::kScratch + 15) / 16 * 16;  // bytes of the reductions

  Keep keep = Keep::registers;
  int threads = kRowThreads;  // of a row in a block: one warp, or the whole block
  int rows = 1;               // of a block
  int cluster = 1;            // blocks of a row
  int64_t packs = 0;          // of each tensor's row in a block
  int64_t shared = 0;         // bytes of a block
};

// Bytes of the rows that are read and kept, one of each of `tensors`. By reasoning on 2026-11-21, no GPU at hand:
//
//   2 KB of a tensor   a warp in registers, 4 rows in a block, no barrier; with fewer than 4 packs a thread less
//   32 KB of a tensor  a block of up to 512 threads in registers; as above
//   shared memory      a block of 256 threads: at 128 registers each two fit on a multiprocessor. With clusters up to
//   half of what a block may have (113 KB on sm_90), so that one row
//                      loads while another is computed; without, up to all of it (99 KB on sm_86, 163 on sm_80)
//   8 times as much    sm_90 and later: a cluster of 2, 4 or 8 blocks, each with its part in shared memory; up to all
//                      of it where 8 blocks at half are too few
//   above              nothing is kept: each further sweep reads the row again, from the second-level cache where all
//                      rows in work fit there
// A thread holds `held` packs of each tensor.
template <class T>
RowPlan plan_rows(const Device& device, int64_t classes, int tensors, int held) {
  constexpr int64_t kBlockRows = 4;
  RowPlan plan;
  const int64_t packs = (classes * int64_t(sizeof(T)) + 15) / 16;
  plan.packs = packs;
  plan.shared = RowPlan::kScratch;
  if (packs <= kWarp * held) {
    plan.threads = kWarp, plan.rows = kBlockRows, plan.shared = 0;
  } else if (packs <= kRowThreads * held) {
    while (plan.threads / 2 * held >= packs) plan.threads /= 2;
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

// The threads of a row in `cluster` blocks, a constant where kernels know it. The reductions' shared memory comes
// first, then the row's.
TLK_DEVICE Team team_of(const RowPlan& plan, int cluster) {
  return Team(kWarp, cluster, plan.rows > 1 ? nullptr : shared_memory<char>());
}
TLK_DEVICE int64_t row_of(const RowPlan& plan) {
  return int64_t(blockIdx.x / unsigned(plan.cluster)) * plan.rows + threadIdx.x / unsigned(plan.threads);
}

}  // namespace tlk
