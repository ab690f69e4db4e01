// Sums over positions, in an order that depends on their number alone: of losses, of what counts in a mean.
#pragma once
#include "reduce.cuh"

namespace tlk {

// Of losses.
template <class A>
struct Values {
  const A* data;
  TLK_DEVICE double at(int64_t i) const { return double(data[i]); }
};

// The number of targets that are not ignored, or the sum of their classes' weights (may be null). An index out of range
// has no weight; its loss is NaN.
template <class A>
struct Counted {
  const int64_t* target;
  int64_t ignore_index, classes;
  const A* weight;
  TLK_DEVICE double at(int64_t i) const {
    const int64_t y = target[i];
    if (y == ignore_index) return 0;
    if (!weight) return 1;
    return y >= 0 && y < classes ? double(weight[y]) : 0;
  }
};

constexpr int kSumThreads = 512;
constexpr int64_t kSumEach = 16;  // numbers of a thread of a sum in one block
constexpr int kMostParts = 512;   // blocks of a larger one

// A block's part of the sum; of one block, `factor` times the sum over `divisor`, which may be null.
template <class Load, class Out>
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(Load load, int64_t n, double factor, const double* divisor, Out* out) {
  double part = 0;
  const int64_t step = int64_t(gridDim.x) * kSumThreads;
  for (int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x; i < n; i += step) part += load.at(i);
  Team team(kWarp, 1, shared_memory<char>());
  const double total = team.reduce<Sum>(part);
  if (team.leads()) out[blockIdx.x] = Out(divisor ? factor * total / *divisor : factor * total);
}

// Writes factor * sum / *divisor. `parts` has room for kMostParts numbers.
template <class Load, class Out>
cudaError_t sum(Load load, int64_t n, double factor, const double* divisor, Out* out, double* parts,
                cudaStream_t stream) {
  Grid grid;
  grid.threads = kSumThreads;
  grid.shared = Team::kScratch;
  const int64_t blocks = (n + kSumThreads * kSumEach - 1) / (kSumThreads * kSumEach);
  if (blocks <= 1) return launch(grid, stream, sum_kernel<Load, Out>, load, n, factor, divisor, out);
  grid.blocks = dim3(unsigned(blocks < kMostParts ? blocks : kMostParts));
  const double* const undivided = nullptr;
  const cudaError_t error = launch(grid, stream, sum_kernel<Load, double>, load, n, 1.0, undivided, parts);
  if (error) return error;
  const int64_t count = grid.blocks.x;
  grid.blocks = dim3(1);
  return launch(grid, stream, sum_kernel<Values<double>, Out>, Values<double>{parts}, count, factor, divisor, out);
}

}  // namespace tlk
