// Kernels with one fault each, which the host run must report. `faults NAME` runs one; `none` has no fault.
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "../../../csrc/core/cuda/reduce.cuh"

using namespace tlk;

namespace {

constexpr int kThreads = 96;

// The sum of 0 ... 95 by core/cuda/reduce.cuh, in two blocks of a cluster.
__global__ void none(float* out) {
  Team team(kWarp, 2, shared_memory<char>());
  out[threadIdx.x] = team.reduce<Sum>(float(threadIdx.x));
  team.has_read();
  team.wait_for_readers();
}

__global__ void thread_leaves_before_barrier(float* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void two_barriers(float* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void shuffle_in_a_branch(float* out) {
  float v = float(threadIdx.x);
  if (threadIdx.x % 32 < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
  out[threadIdx.x] = v;
}

__global__ void two_collectives(float* out) {
  float v = 0;
  if (threadIdx.x % 32 < 16)
    v = __shfl_xor_sync(0xffffffffu, v, 1);
  else
    __syncwarp();
  out[threadIdx.x] = v;
}

__global__ void mask_without_the_caller(float* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 0); }

__global__ void lane_outside_the_mask(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 20);
}

__global__ void missing_barrier(float* out) {
  float* const shared = shared_memory<float>();
  shared[threadIdx.x] = 1;
  out[threadIdx.x] = shared[(threadIdx.x + 1) % kThreads];
}

__global__ void missing_wait(float* out) {
  float* const shared = shared_memory<float>();
  alignas(16) static const float ones[4] = {1, 1, 1, 1};
  cp_async_16(shared + 4 * threadIdx.x, ones);
  cp_async_commit();
  out[threadIdx.x] = shared[4 * threadIdx.x];
}

__global__ void unwritten_shared_memory(float* out) { out[threadIdx.x] = shared_memory<float>()[threadIdx.x]; }

__global__ void unaligned_load(float* out) {
  const uint4 v = load_streaming(reinterpret_cast<const uint4*>(out + 1));
  out[threadIdx.x] = float(v.x);
}

__global__ void block_leaves_its_cluster(float* out) {
  if (blockIdx.x % 2 == 1) return;
  cluster_arrive(), cluster_wait();
  out[threadIdx.x] = 0;
}

__global__ void ends_without_waiting(float* out) {
  Team team(kWarp, 2, shared_memory<char>());
  out[threadIdx.x] = team.reduce<Sum>(float(threadIdx.x));
  team.has_read();
}

__global__ void ends_without_a_barrier(float* out) {
  Team team(kWarp, 2, shared_memory<char>());
  out[threadIdx.x] = team.reduce<Sum>(float(threadIdx.x));
}

__global__ void reads_after_arriving(float* out) {
  Team team(kWarp, 2, shared_memory<char>());
  const float sum = team.reduce<Sum>(float(threadIdx.x));
  team.has_read();
  out[threadIdx.x] = sum + 0 * load_from(shared_memory<float>(), 1 - cluster_rank());
  team.wait_for_readers();
}

__global__ void reads_without_waiting(float* out) {
  shared_memory<float>()[threadIdx.x] = 1;
  cluster_arrive();
  out[threadIdx.x] += load_from(shared_memory<float>() + threadIdx.x, 1 - cluster_rank());
  cluster_wait();
  cluster_arrive(), cluster_wait();
}

__global__ void arrives_twice(float* out) {
  cluster_arrive();
  cluster_arrive();
  cluster_wait();
  out[threadIdx.x] = 0;
}

__global__ void waits_without_arriving(float* out) {
  cluster_wait();
  out[threadIdx.x] = 0;
}

// Only AddressSanitizer reports these.
__global__ void reads_past_the_end(float* out) { out[0] = out[kThreads + int(threadIdx.x)]; }
__global__ void writes_past_shared_memory(float*) { shared_memory<float>()[1024 + threadIdx.x] = 0; }

struct Fault {
  const char* name;
  void (*kernel)(float*);
};
#define FAULT(name) {#name, name}
const Fault kFaults[] = {
    FAULT(none),
    FAULT(thread_leaves_before_barrier),
    FAULT(two_barriers),
    FAULT(shuffle_in_a_branch),
    FAULT(two_collectives),
    FAULT(mask_without_the_caller),
    FAULT(lane_outside_the_mask),
    FAULT(missing_barrier),
    FAULT(missing_wait),
    FAULT(unwritten_shared_memory),
    FAULT(unaligned_load),
    FAULT(block_leaves_its_cluster),
    FAULT(ends_without_waiting),
    FAULT(ends_without_a_barrier),
    FAULT(reads_after_arriving),
    FAULT(reads_without_waiting),
    FAULT(arrives_twice),
    FAULT(waits_without_arriving),
    FAULT(reads_past_the_end),
    FAULT(writes_past_shared_memory),
};

}  // namespace

// Prints "right", "nan", "wrong" or the host run's error.
int main(int count, char** names) {
  for (const Fault& fault : kFaults) {
    if (count < 2 || std::strcmp(names[1], fault.name) != 0) continue;
    std::vector<float> out(kThreads);
    Grid grid;
    grid.blocks = dim3(2), grid.threads = kThreads, grid.shared = 4096, grid.cluster = 2;
    try {
      launch(grid, cudaStream_t(nullptr), fault.kernel, out.data());
      bool right = true, nan = false;
      for (float v : out) right &= v == 9120, nan |= v != v;
      std::puts(right ? "right" : nan ? "nan" : "wrong");
    } catch (const std::runtime_error& error) {
      std::puts(error.what());
    }
    return 0;
  }
  std::puts("no such fault");
  return 2;
}
