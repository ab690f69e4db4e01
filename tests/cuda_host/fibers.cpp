#include "fibers.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_host {

const Thread* now = nullptr;

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif

struct Context {
  ucontext_t context;
  jmp_buf jump;
  bool started = false;
  void* stack = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;
};

struct Copy {
  void* to;
  const void* from;
  size_t size;
};

struct Fiber : Context {
  Thread thread;
  std::deque<std::vector<Copy>> copies = {{}};  // the last group is not committed
  bool done = true;
  const char* waits = nullptr;  // what it waits for
  Place place{};
  unsigned arrived = 0, waited = 0;  // how many barriers of the cluster
};

// Lanes that exchange values. A lane can be one exchange ahead of another, not two, so two sets of slots are enough.
struct Group {
  unsigned mask, arrived = 0;
  size_t generation = 0;
  const char* what = nullptr;
  Place place{};
  alignas(16) char slots[2][32][kExchanged];
};

struct ClusterBarrier {
  size_t arrived = 0;
  unsigned passed = 0;  // how often all threads have arrived
  Place place{};        // where the first one has arrived
  std::vector<Fiber*> waiting;
};

// The barrier of the cluster that a block must wait for before it ends, because another block reads its shared memory.
struct Lifetime {
  unsigned barrier = 0;  // counted from 1; 0: none
  std::string reader;
};

Context main_context;
Fiber* self = nullptr;  // the running one
std::deque<std::unique_ptr<Fiber>> fibers;
std::deque<Fiber*> ready;
std::vector<std::vector<std::unique_ptr<Group>>> groups;  // by warp
std::vector<std::vector<Fiber*>> block_barriers;          // by block: the threads that wait
ClusterBarrier cluster_barrier;
std::vector<char*> shared_memory;  // by block
std::vector<Lifetime> lifetimes;   // by block
size_t shared_bytes = 0, block_threads = 0, cluster_threads = 0;
const std::function<void()>* body = nullptr;
std::string failure;
unsigned order = 1;  // a pseudo-random number, the same in every run, for the order in which threads run

void jump_to(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_size);
  to.started = true;
  swapcontext(&from.context, &to.context);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#else
  // Not swapcontext, which has a system call for the signal mask.
  from.started = true;
  if (_setjmp(from.jump)) return;
  if (to.started) _longjmp(to.jump, 1);
  to.started = true;
  setcontext(&to.context);
#endif
}

// Switches to a thread that can run, or to `run` if there is none. Returns when `from` can run.
void next_from(Context& from) {
  Context* to = &main_context;
  if (failure.empty() && !ready.empty()) {
    Fiber* fiber = ready.front();
    ready.pop_front();
    fiber->waits = nullptr;
    self = fiber;
    now = &fiber->thread;
    threadIdx = now->index, blockIdx = now->block_index;
    to = fiber;
  }
  if (to != &from) jump_to(from, *to);
}

// Adds threads to those that can run, in a varying order: kernels that rely on an order without a barrier fail.
template <class Threads>
void release(Threads& threads) {
  order = order * 1664525u + 1013904223u;
  if (order >> 31)
    ready.insert(ready.end(), threads.begin(), threads.end());
  else
    ready.insert(ready.end(), threads.rbegin(), threads.rend());
}

void wait(const char* what, Place place) {
  self->waits = what, self->place = place;
  next_from(*self);
}

void entry() {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!main_context.stack) main_context.stack = const_cast<void*>(bottom), main_context.stack_size = size;
#endif
  for (;;) {  // one thread of each block in turn
    try {
      (*body)();
    } catch (const std::exception& error) {
      failure = error.what();
    }
    self->done = true;
    next_from(*self);
  }
}

std::string text(Place place) {
  const char* name = std::strrchr(place.file, '/');
  return std::string(name ? name + 1 : place.file) + ":" + std::to_string(place.line);
}

std::string text(const Thread& thread) {
  return "thread " + std::to_string(thread.index.x) + " of block " + std::to_string(thread.block_index.x);
}

void expect_same_barrier(Place first, Place place) {
  if (first.line != place.line || std::strcmp(first.file, place.file) != 0)
    fail(("threads are at different barriers: another is at " + text(first)).c_str(), place);
}

void prepare(size_t count) {
  while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = *fibers[i];
    if (fiber.started && fiber.done) continue;
    if (!fiber.stack) {
      fiber.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (fiber.stack == MAP_FAILED) throw std::bad_alloc();
      fiber.stack_size = kStack;
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fiber.stack, kStack);  // of a thread that ended in an error
#endif
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
    fiber.started = false;
  }
}

void run_cluster(const Launch& launch, uint3 first) {
  const unsigned threads = launch.block.x;
  prepare(cluster_threads);
  groups.clear();
  groups.resize(launch.cluster * ((threads + 31) / 32));
  block_barriers.assign(launch.cluster, {});
  cluster_barrier = {};
  lifetimes.assign(launch.cluster, {});
  for (unsigned rank = 0; rank < launch.cluster; ++rank) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, shared_bytes ? shared_bytes : 1)) throw std::bad_alloc();
    std::memset(memory, 0xff, shared_bytes);  // NaN in every type
    shared_memory.push_back(static_cast<char*>(memory));
  }
  std::vector<Fiber*> all;
  for (unsigned i = 0; i < cluster_threads; ++i) {
    Fiber& fiber = *fibers[i];
    const unsigned rank = i / threads;
    fiber.done = false, fiber.waits = nullptr, fiber.copies = {{}}, fiber.arrived = fiber.waited = 0;
    fiber.thread = {{i % threads, 0, 0}, {first.x + rank, first.y, first.z}, i % threads % 32, rank, launch.cluster,
                    shared_memory[rank]};
    all.push_back(&fiber);
  }
  ready.clear();
  release(all);
  next_from(main_context);
  now = nullptr;
  for (char* memory : shared_memory) free(memory);
  shared_memory.clear();
  size_t ended = 0;
  const Fiber* waiting = nullptr;
  for (unsigned i = 0; i < cluster_threads; ++i) {
    ended += fibers[i]->done;
    if (!fibers[i]->done && !waiting) waiting = fibers[i].get();
  }
  if (failure.empty() && waiting)
    failure = text(waiting->thread) + " waits for ever at " + waiting->waits + " (" + text(waiting->place) +
              "): " + std::to_string(ended) + " of " + std::to_string(cluster_threads) + " threads have ended";
  for (unsigned rank = 0; failure.empty() && rank < launch.cluster; ++rank) {
    unsigned waited = 0;
    for (unsigned i = 0; i < threads; ++i) waited = std::max(waited, fibers[rank * threads + i]->waited);
    if (waited < lifetimes[rank].barrier)
      failure = "block " + std::to_string(first.x + rank) + " may end while " + lifetimes[rank].reader +
                " reads its shared memory";
  }
  if (!failure.empty()) throw std::runtime_error("CUDA kernel on the host: " + failure);
}

}  // namespace

const char* exchange(unsigned mask, const void* value, size_t size, const char* what, Place place) {
  const unsigned lane = now->lane, first = now->index.x - lane, warps = (block_threads + 31) / 32;
  const unsigned warp = now->cluster_rank * warps + first / 32;
  if (!(mask >> lane & 1)) fail("the mask leaves out the thread that calls", place);
  if (block_threads - first < 32 && mask >> (block_threads - first))
    fail("the mask has threads that are not there", place);
  if (size > kExchanged) fail("too many bytes to exchange", place);
  Group* group = nullptr;
  for (auto& candidate : groups[warp])
    if (candidate->mask == mask) group = candidate.get();
  if (!group) {
    groups[warp].push_back(std::make_unique<Group>());
    group = groups[warp].back().get();
    group->mask = mask;
  }
  if (!group->arrived) {
    group->what = what, group->place = place;
  } else if (std::strcmp(group->what, what) != 0 || group->place.line != place.line) {
    fail((std::string("lanes of one mask are at ") + what + " and at " + group->what + " (" + text(group->place) + ")")
             .c_str(),
         place);
  }
  const size_t generation = group->generation;
  std::memcpy(group->slots[generation % 2][lane], value, size);
  group->arrived |= 1u << lane;
  if (group->arrived == mask) {
    group->arrived = 0;
    ++group->generation;
    std::vector<Fiber*> others;
    for (unsigned other = 0; other < 32; ++other)
      if (other != lane && mask >> other & 1)
        others.push_back(fibers[now->cluster_rank * block_threads + first + other].get());
    release(others);
  } else {
    wait(what, place);
  }
  return group->slots[generation % 2][0];
}

void barrier(Place place) {
  std::vector<Fiber*>& waiting = block_barriers[now->cluster_rank];
  if (!waiting.empty()) expect_same_barrier(waiting.front()->place, place);
  if (waiting.size() + 1 < block_threads) {
    waiting.push_back(self);
    wait("__syncthreads", place);
    return;
  }
  std::vector<Fiber*> others;
  others.swap(waiting);
  release(others);
}

void cluster_arrive(Place place) {
  ClusterBarrier& at = cluster_barrier;
  if (self->arrived != self->waited)
    fail("arrives at a barrier of the cluster before it has waited for the last one", place);
  if (at.arrived == 0)
    at.place = place;
  else
    expect_same_barrier(at.place, place);
  ++self->arrived;
  if (++at.arrived < cluster_threads) return;
  at.arrived = 0;
  ++at.passed;
  std::vector<Fiber*> others;
  others.swap(at.waiting);
  release(others);
}

void cluster_wait(Place place) {
  if (self->arrived == self->waited) fail("waits for a barrier of the cluster at which it has not arrived", place);
  if (cluster_barrier.passed < self->arrived) {
    cluster_barrier.waiting.push_back(self);
    wait("a barrier of the cluster", place);
  }
  self->waited = self->arrived;
}

void copy_later(void* to, const void* from, size_t size) { self->copies.back().push_back({to, from, size}); }

void commit_copies() { self->copies.emplace_back(); }

void wait_for_copies(size_t pending_groups) {
  for (; self->copies.size() > pending_groups + 1; self->copies.pop_front())
    for (const Copy& copy : self->copies.front())
      if (copy.from)
        std::memcpy(copy.to, copy.from, copy.size);
      else
        std::memset(copy.to, 0, copy.size);
}

const void* read_shared_of(const void* p, unsigned rank) {
  const ptrdiff_t offset = static_cast<const char*>(p) - now->shared;
  if (offset < 0 || size_t(offset) >= shared_bytes || rank >= now->cluster_size)
    fail("not an address in the shared memory of a block of the cluster", CUDA_HOST_HERE);
  Lifetime& of = lifetimes[rank];
  if (rank != now->cluster_rank && of.barrier <= self->arrived) of = {self->arrived + 1, text(*now)};
  return shared_memory[rank] + offset;
}

void fail(const char* what, Place place) {
  failure = text(*now) + ": " + what + " (" + text(place) + ")";
  next_from(*self);
  abort();  // `run` throws and never comes back
}

void run(const Launch& launch, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (launch.block.y != 1 || launch.block.z != 1) throw std::runtime_error("blocks have one dimension here");
  if (launch.grid.x % launch.cluster) throw std::runtime_error("the grid is not whole clusters");
  body = &kernel;
  blockDim = launch.block, gridDim = launch.grid;
  failure.clear();
  block_threads = launch.block.x, cluster_threads = block_threads * launch.cluster, shared_bytes = launch.shared;
  for (unsigned z = 0; z < launch.grid.z; ++z)
    for (unsigned y = 0; y < launch.grid.y; ++y)
      for (unsigned x = 0; x < launch.grid.x; x += launch.cluster) run_cluster(launch, {x, y, z});
}

}  // namespace cuda_host
