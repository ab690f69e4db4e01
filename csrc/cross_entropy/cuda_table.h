// Strategies of cross entropy: where a row is kept between its sweeps, and how many threads work on it.
#pragma once
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "../core/cuda/device.cuh"

namespace tlk {

// The class of row_store.cuh that keeps a row.
enum class Place { lanes, registers, shared, memory, column_shared, column_memory };

// The first strategy that can serve a call is taken. A row of V logits of b bytes, with its gradient, moves
// (reads + 1) * V * b bytes. By reasoning on 2026-11-21, where no figure is given; figures are ms on an H200 for
// forward and backward in bfloat16, 2026-11-27 (bench/results):
//
//   lanes          Short rows: 2 to 32 lanes with 8 numbers each, several rows per warp. A whole warp would be mostly
//                  idle on 45 classes: 65536 x 45 takes 0.034, by warps 0.114.
//   warp           Four loads of 16 bytes per lane, no barrier; eight rows per block, as blocks are slow to start.
//   registers      The same in a block. 32768 x 4096 takes 0.20, shared 0.60.
//   shared         All loads of a row are in flight at once, and several blocks share a multiprocessor, so that one
//                  computes while another loads. Fewer threads have more numbers each, so the reductions cost less, if
//                  three blocks fit: 32768 x 16384 takes 0.66 with 256 threads, 0.95 with 512, in registers 0.88; 32768
//                  x 32768 1.21, 1.41 and 2.14. Not of rows that are not aligned: 8192 x 50257 takes 1.14 with 256
//                  threads, 1.01 with 512. Without clusters up to all of a multiprocessor's memory, which beats a
//                  second read.
//   sweeps         The row is read twice, the second time from L2 if the rows in flight fit there. 16384 x 131072 takes
//                  3.16 with 512 threads, 3.21 with 1024, by a cluster 3.74; 8192 x 262144 3.17, 3.23 and 3.87. Of rows
//                  that are not aligned only as the last resort: 8192 x 50257 takes 1.17.
//   cluster        2 to 8 blocks share a row and exchange four numbers per reduction.
//   columns        Classes that are not contiguous: one thread per position, neighbouring positions next to each
//                  other. With 32 KB for a block of 128 threads, seven blocks fit on a multiprocessor.
//   column sweeps  More classes: read twice, at full occupancy.
constexpr int kBytesInLane = 64;  // of a row in a thread's registers
// The most threads of a block. 64 registers a thread are too few for float64, and with every option (full).
constexpr int most_threads(bool full, int64_t size) { return full || size == 8 ? 512 : 1024; }

struct CrossEntropyStrategy {
  const char* name;
  Place place;
  int threads;         // the most threads of a block
  int blocks;          // the most blocks that share a row
  int least_sm;        // the least compute capability
  int64_t most_bytes;  // the most bytes of logits that a block keeps; 0: no limit
  int reads;           // how often each logit is read
  bool aligned;        // only rows that begin at multiples of 16 bytes
  bool whole_block() const { return most_bytes > kBytesInLane * kWarp; }
  bool columns() const { return place == Place::column_shared || place == Place::column_memory; }
};

constexpr int64_t kHalfShared = 112 << 10;  // half of a multiprocessor's shared memory, sm_90

constexpr int64_t kThirdShared = 74 << 10;  // a third of it

constexpr CrossEntropyStrategy kCrossEntropyStrategies[] = {
    {"lanes", Place::lanes, 128, 1, 80, 0, 1, false},
    {"warp", Place::registers, 256, 1, 80, kBytesInLane * kWarp, 1, false},
    {"registers", Place::registers, 256, 1, 80, kBytesInLane * 256, 1, false},
    {"shared", Place::shared, 256, 1, 90, kThirdShared, 1, true},
    {"registers", Place::registers, 512, 1, 80, kBytesInLane * 512, 1, false},
    {"shared", Place::shared, 512, 1, 80, kHalfShared, 1, false},
    {"sweeps", Place::memory, 512, 1, 90, 0, 2, true},
    {"cluster", Place::shared, 512, 8, 90, kHalfShared, 1, false},
    {"large shared", Place::shared, 512, 1, 80, 227 << 10, 1, false},
    {"sweeps", Place::memory, 1024, 1, 80, 0, 2, false},
    {"columns", Place::column_shared, 128, 1, 80, 32 << 10, 1, false},
    {"column sweeps", Place::column_memory, 128, 1, 80, 0, 2, false},
};

// A strategy for a call.
struct CrossEntropyPlan {
  const CrossEntropyStrategy* strategy = nullptr;
  Grid grid;
  int lanes = 0;  // lanes of a warp per row; 0: the whole block
};

// For tests and measurements.
struct ForcedCrossEntropyStrategy {
  const char* name = nullptr;  // of the only strategy that may be taken; null: any
  int threads = 0;             // the most threads of a block; 0: the strategy's
};
inline ForcedCrossEntropyStrategy& forced_cross_entropy_strategy() {
  static ForcedCrossEntropyStrategy forced;
  return forced;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether the strategy can serve `rows` rows of `classes` numbers of `size` bytes; if so, fills in the plan. `scratch`:
// bytes of shared memory for reductions.
inline bool fits(const CrossEntropyStrategy& strategy, const Device& device, int64_t rows, int64_t classes,
                 int64_t size, int64_t scratch, bool full, CrossEntropyPlan& plan) {
  constexpr int kBytes = 16;  // per pack
  constexpr int kNumbersInLane = 8;
  const int64_t packs = divide_up(classes * size, kBytes);
  int64_t per_block = 1, blocks = 1;  // rows per block; blocks per row
  const int forced_threads = forced_cross_entropy_strategy().threads;
  int64_t threads = std::min(forced_threads ? forced_threads : strategy.threads, most_threads(full, size)), shared = 0;
  plan.lanes = 0;
  switch (strategy.place) {
    case Place::lanes:
      if (classes > kNumbersInLane * kWarp) return false;
      for (plan.lanes = 2; plan.lanes * kNumbersInLane < classes;) plan.lanes *= 2;
      per_block = threads / plan.lanes;
      break;
    case Place::registers:
      if (packs * kBytes > kBytesInLane * (strategy.whole_block() ? threads : kWarp)) return false;
      if (!strategy.whole_block()) {
        plan.lanes = kWarp;
        per_block = threads / kWarp;
      } else {
        threads = divide_up(divide_up(packs * kBytes, kBytesInLane), kWarp) * kWarp;
        if (threads < 2 * kWarp) threads = 2 * kWarp;
        shared = scratch;
      }
      break;
    case Place::shared:
      for (blocks = strategy.blocks > 1 ? 2 : 1;; blocks *= 2) {
        shared = (divide_up(packs, blocks) + 2) * kBytes + scratch;  // InShared::bytes
        if (shared <= strategy.most_bytes && shared <= device.shared_bytes) break;
        if (blocks >= strategy.blocks) return false;
      }
      break;
    case Place::memory:
      shared = scratch;
      break;
    case Place::column_shared:
      shared = classes * threads * size;
      if (shared > strategy.most_bytes) return false;
      [[fallthrough]];
    case Place::column_memory:
      plan.lanes = 1;
      per_block = threads;
      break;
  }
  const int64_t all = divide_up(rows, per_block) * blocks;
  if (device.sm < strategy.least_sm || all > 0x7fffffff || classes > 0x7fffffff) return false;
  plan.strategy = &strategy;
  plan.grid.blocks = dim3(unsigned(all));
  plan.grid.threads = int(threads);
  plan.grid.shared = shared;
  plan.grid.cluster = int(blocks);
  return true;
}

// Whether a strategy, or the forced one, can serve the call; if so, fills in the plan.
inline bool plan_cross_entropy(const Device& device, int64_t rows, int64_t classes, int64_t size, int64_t scratch,
                               bool columns, bool aligned, bool full, CrossEntropyPlan& plan) {
  const char* const forced = forced_cross_entropy_strategy().name;
  for (const CrossEntropyStrategy& strategy : kCrossEntropyStrategies) {
    if (strategy.columns() != columns || (strategy.aligned && !aligned)) continue;
    if (forced && strcmp(forced, strategy.name) != 0) continue;
    if (fits(strategy, device, rows, classes, size, scratch, full, plan)) return true;
  }
  return false;
}

}  // namespace tlk
