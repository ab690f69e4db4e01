// Runs the threads of a block as fibers of one host thread. A fiber switches only where it waits for others.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <functional>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Those of the running thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_host {

// What a kernel's thread knows of itself.
struct Thread {
  uint3 index, block_index;
  unsigned lane = 0, cluster_rank = 0, cluster_size = 1;
  char* shared = nullptr;
};
extern const Thread* now;  // the running thread

// A place in the source, for error messages.
struct Place {
  const char* file;
  int line;
};
#define CUDA_HOST_HERE \
  cuda_host::Place { __builtin_FILE(), __builtin_LINE() }

// A collective: every lane of `mask` passes some bytes. Returns those of all lanes, kExchanged bytes apart; they are
// valid until the lane waits again.
constexpr size_t kExchanged = 64;
const char* exchange(unsigned mask, const void* value, size_t size, const char* what, Place place);

void barrier(Place place);  // of the block
// The two halves of a barrier of the cluster.
void cluster_arrive(Place place);
void cluster_wait(Place place);

// Copies of the thread, in groups; a copy happens only when its group is waited for. `from` null: zeros.
void copy_later(void* to, const void* from, size_t size);
void commit_copies();
void wait_for_copies(size_t pending_groups);

// The address in the shared memory of block `rank` that corresponds to `p` in this block's, to be read at once. The
// launch fails unless that block, before it ends, waits for a barrier of the cluster at which the calling thread
// arrives later.
const void* read_shared_of(const void* p, unsigned rank);

// Makes the launch throw.
[[noreturn]] void fail(const char* what, Place place);

struct Launch {
  dim3 grid, block;
  size_t shared = 0;
  unsigned cluster = 1;
};
// Throws std::runtime_error if threads wait for ever or for different things, or `fail` was called.
void run(const Launch& launch, const std::function<void()>& kernel);

}  // namespace cuda_host
