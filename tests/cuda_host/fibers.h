// The threads of a block as fibers of one host thread, which switch only where they wait for one another.
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

// Of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_host {

// A thread, and what else it knows of itself.
struct Thread {
  uint3 index, block_index;
  unsigned lane = 0, cluster_rank = 0, cluster_size = 1;
  char* shared = nullptr;
};
extern const Thread* now;

struct Place {
  const char* file;
  int line;
};
#define CUDA_HOST_HERE \
  cuda_host::Place { __builtin_FILE(), __builtin_LINE() }

// A collective: every lane of `mask` gives some bytes, and each gets those of all, kExchanged apart by lane, to be
// read before it waits again.
constexpr size_t kExchanged = 64;
const char* exchange(unsigned mask, const void* value, size_t size, const char* what, Place place);

void barrier(Place place);  // of the block
// The barrier of the cluster: a thread goes on when it has arrived, and waits for the others later.
void cluster_arrive(Place place);
void cluster_wait(Place place);

// Copies of the thread in groups, done at the wait for theirs; of null they are zeros.
void copy_later(void* to, const void* from, size_t size);
void commit_copies();
void wait_for_copies(size_t pending_groups);

// A block's shared memory, at the place that `p` has in this one's, to be read at once. The launch fails unless that
// block waits, before it ends, for a barrier of the cluster at which the thread that calls arrives after this.
const void* read_shared_of(const void* p, unsigned rank);

// Ends the launch with an error.
[[noreturn]] void fail(const char* what, Place place);

struct Launch {
  dim3 grid, block;
  size_t shared = 0;
  unsigned cluster = 1;
};
// Throws std::runtime_error where threads wait for ever, or for different things, or `fail` was called.
void run(const Launch& launch, const std::function<void()>& kernel);

}  // namespace cuda_host
