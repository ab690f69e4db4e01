#include "pool.h"

#if defined(__linux__)

#include <sys/mman.h>

#include <mutex>
#include <vector>

namespace tlk {
namespace {

constexpr size_t kHuge = size_t(2) << 20;
constexpr size_t kKept = 4;  // blocks: a model rarely has more losses of large gradients at once

struct Block {
  void* begin;
  size_t bytes;
};

std::mutex mutex;

std::vector<Block>& kept() {  // oldest first; never destroyed, since tensors may outlive static objects
  static auto* blocks = new std::vector<Block>;
  return *blocks;
}

Block map(size_t bytes) {
  void* mapped = mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK(mapped != MAP_FAILED, "tlkernels: no memory for a gradient of ", bytes, " bytes");
  char* const start = static_cast<char*>(mapped);
  char* const begin = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(start) + kHuge - 1) & ~(kHuge - 1));
  if (begin > start) munmap(start, size_t(begin - start));
  const size_t after = size_t(start + kHuge - begin);
  if (after) munmap(begin + bytes, after);
  (void)madvise(begin, bytes, MADV_HUGEPAGE);  // if refused, pages are small and the result is the same
  return {begin, bytes};
}

void release(void* context) {
  const std::unique_ptr<Block> block(static_cast<Block*>(context));
  // Without MADV_FREE, a block that is kept would hold its memory.
  if (madvise(block->begin, block->bytes, MADV_FREE) != 0) {
    munmap(block->begin, block->bytes);
    return;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  kept().push_back(*block);
  if (kept().size() > kKept) {
    munmap(kept().front().begin, kept().front().bytes);
    kept().erase(kept().begin());
  }
}

}  // namespace

at::DataPtr pooled_memory(size_t bytes) {
  bytes = (bytes + kHuge - 1) & ~(kHuge - 1);
  auto block = std::make_unique<Block>(Block{nullptr, 0});
  {
    const std::lock_guard<std::mutex> lock(mutex);
    // The smallest that fits: a larger one may be what the next tensor needs. Of several, the newest.
    auto best = kept().rend();
    for (auto b = kept().rbegin(); b != kept().rend(); ++b) {
      const bool fits = b->bytes >= bytes && b->bytes - bytes <= bytes / 4;
      if (fits && (best == kept().rend() || b->bytes < best->bytes)) best = b;
    }
    if (best != kept().rend()) {
      *block = *best;
      kept().erase(std::next(best).base());
    }
  }
  if (!block->begin) *block = map(bytes);
  void* const begin = block->begin;
  return {begin, block.release(), &release, at::Device(at::kCPU)};
}

}  // namespace tlk

#else

namespace tlk {
at::DataPtr pooled_memory(size_t bytes) { return c10::GetAllocator(at::kCPU)->allocate(bytes); }
}  // namespace tlk

#endif
