// Memory for large gradients.
#pragma once
#include <c10/core/Allocator.h>

namespace tlk {

// At least `bytes`, uninitialised, on huge pages. A fresh 500 MB costs more in page faults than a loss in arithmetic
// (measured: 145 ms page by page, 56 ms in huge pages, against 52 ms to copy it), and a training step wants the same
// size again. So what is let go is kept mapped, but marked MADV_FREE: the system takes it back when it is short of
// memory, and until then using it again costs nothing.
at::DataPtr pooled_memory(size_t bytes);

}  // namespace tlk
