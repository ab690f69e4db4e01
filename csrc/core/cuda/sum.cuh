// Sums over positions: of losses, and of a mean's denominator. The order depends on the number of positions alone.
#pragma once
#include "reduce.cuh"

namespace tlk {

// Sums losses.
template <class A>
struct Values {
  const A* data;
  TLK_DEVICE double at(int64_t i) const { return double(data[i]); }
};

// Counts targets that are not ignored or, with `weight`, sums the weights of their classes. An index out of range adds
// 0; its loss is NaN.
template <class A>
struct Counted {
  const int64_t* target;  // (n)
  int64_t ignore_index, classes;
  const A* weight;  // (classes), or null
  TLK_DEVICE double at(int64_t i) const {
    const int64_t y = target[i];
    if (y == ignore_index) return 0;
    if (!weight) return 1;
    return y >= 0 && y < classes ? double(weight[y]) : 0;
  }
};

constexpr int kSumThreads = 512;
constexpr int64_t kSumEach = 16;  // the most numbers per thread of a sum in one block
constexpr int kMostParts = 512;   // the most blocks of a larger sum

// Writes factor * (the block's part of the sum) / *divisor.
template <class Load, class Out>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(Load load,      // load.at(i): the i-th number, as double
                                                          int64_t n,      // how many
                                                          double factor,  // of the sum
                                                          const double* divisor,  // one number; null: 1
                                                          Out* out) {             // (blocks)
  double part = 0;
  const int64_t step = int64_t(gridDim.x) * kSumThreads;
  for (int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x; i < n; i += step) part += load.at(i);
  Team team(kWarp, 1, shared_memory<char>());
  const double total = team.reduce<Sum>(part);
  if (team.leads()) out[blockIdx.x] = Out(divisor ? factor * total / *divisor : factor * total);
}

// Writes factor * sum / *divisor to `out`. `divisor` may be null; `parts` is scratch of kMostParts numbers.
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
