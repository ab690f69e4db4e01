// How a call of cross entropy is carried out: where a row is between its sweeps, and by how many threads.
#pragma once
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "../core/cuda/device.cuh"

namespace tlk {

enum class Place { lanes, registers, shared, memory, column_shared, column_memory };

// The first that serves a call is taken. A call that reads V logits a row of b bytes and writes their gradient moves
// (reads + 1) * V * b bytes a row. By reasoning on 2026-11-21, no GPU at hand:
//
//   lanes      A row of 45 would leave most of a warp idle and its reductions would be as long as a whole one's: 2 to
//              32 lanes with 8 numbers each, several rows a warp.
//   warp       Four loads of 16 bytes a lane; no barrier, and a block is eight rows, as blocks are slow to start.
//   registers  The same in a block, up to 1024 threads at 64 registers of 64 bytes: loads in flight are 64 bytes a
//              thread, 64 KB a multiprocessor, where 4.8 TB/s at 1 us on 132 of them ask for 36 KB.
//   shared     All loads of a row are in flight at once. Up to half of a multiprocessor's memory, so that one block
//              computes while another loads; without clusters up to all of it, which beats a second read.
//   cluster    2 to 8 such blocks share a row, four numbers a reduction pass between them: 128256 bfloat16 are 4 x 63
//              KB, three blocks a multiprocessor.
//   sweeps     Read twice, the second time from L2 as long as a row for each multiprocessor fits there: one block of
//              1024 threads each.
//   columns    Classes not contiguous. A thread for each position, neighbours beside each other: 32 KB a block of 128
//              keep seven blocks on a multiprocessor.
//   column sweeps  More classes: read twice, at full occupancy.
constexpr int kBytesInLane = 64;  // of a row, in registers
// The most threads of a block: 64 registers are not enough for each where every option is looked at, nor for float64.
constexpr int most_threads(bool full, int64_t size) { return full || size == 8 ? 512 : 1024; }

struct CrossEntropyStrategy {
  const char* name;
  Place place;
  int threads;         // the most of a block
  int blocks;          // the most that share a row
  int least_sm;        // compute capability
  int64_t most_bytes;  // of the part of a row, or of the rows, that a block has; 0: as many as there are
  int reads;           // of each logit
  bool whole_block() const { return most_bytes > kBytesInLane * kWarp; }
  bool columns() const { return place == Place::column_shared || place == Place::column_memory; }
};

constexpr int64_t kHalfShared = 112 << 10;  // of a multiprocessor of sm_90

constexpr CrossEntropyStrategy kCrossEntropyStrategies[] = {
    {"lanes", Place::lanes, 128, 1, 80, 0, 1},
    {"warp", Place::registers, 256, 1, 80, kBytesInLane * kWarp, 1},
    {"registers", Place::registers, 1024, 1, 80, kBytesInLane * 1024, 1},
    {"shared", Place::shared, 512, 1, 80, kHalfShared, 1},
    {"cluster", Place::shared, 512, 8, 90, kHalfShared, 1},
    {"large shared", Place::shared, 512, 1, 80, 227 << 10, 1},
    {"sweeps", Place::memory, 1024, 1, 80, 0, 2},
    {"columns", Place::column_shared, 128, 1, 80, 32 << 10, 1},
    {"column sweeps", Place::column_memory, 128, 1, 80, 0, 2},
};

// A strategy for a call.
struct CrossEntropyPlan {
  const CrossEntropyStrategy* strategy = nullptr;
  Grid grid;
  int lanes = 0;  // of a warp for a row; 0: the whole block
};

// For tests and measurements: the one strategy that is taken where it can be, and no other.
inline const char*& forced_cross_entropy_strategy() {
  static const char* name = nullptr;
  return name;
}

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Fills in the plan, or returns false where the strategy cannot serve `rows` rows of `classes` numbers of `size` bytes.
inline bool fits(const CrossEntropyStrategy& strategy, const Device& device, int64_t rows, int64_t classes,
                 int64_t size, int64_t scratch, bool full, CrossEntropyPlan& plan) {
  constexpr int kBytes = 16;  // of a pack
  constexpr int kNumbersInLane = 8;
  const int64_t packs = divided_up(classes * size, kBytes);
  int64_t per_block = 1, blocks = 1;  // rows of a block; blocks of a row
  int64_t threads = std::min(strategy.threads, most_threads(full, size)), shared = 0;
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
        threads = divided_up(divided_up(packs * kBytes, kBytesInLane), kWarp) * kWarp;
        if (threads < 2 * kWarp) threads = 2 * kWarp;
        shared = scratch;
      }
      break;
    case Place::shared:
      for (blocks = strategy.blocks > 1 ? 2 : 1;; blocks *= 2) {
        shared = (divided_up(packs, blocks) + 2) * kBytes + scratch;  // InShared::bytes
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
  const int64_t all = divided_up(rows, per_block) * blocks;
  if (device.sm < strategy.least_sm || all > 0x7fffffff || classes > 0x7fffffff) return false;
  plan.strategy = &strategy;
  plan.grid.blocks = dim3(unsigned(all));
  plan.grid.threads = int(threads);
  plan.grid.shared = shared;
  plan.grid.cluster = int(blocks);
  return true;
}

// False where no strategy, or not the forced one, can serve the call.
inline bool plan_cross_entropy(const Device& device, int64_t rows, int64_t classes, int64_t size, int64_t scratch,
                               bool columns, bool full, CrossEntropyPlan& plan) {
  const char* const forced = forced_cross_entropy_strategy();
  for (const CrossEntropyStrategy& strategy : kCrossEntropyStrategies) {
    if (strategy.columns() != columns || (forced && strcmp(forced, strategy.name) != 0)) continue;
    if (fits(strategy, device, rows, classes, size, scratch, full, plan)) return true;
  }
  return false;
}

}  // namespace tlk
