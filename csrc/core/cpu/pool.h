// Memory for large gradients.
#pragma once
#include <c10/core/Allocator.h>

namespace tlk {

// At least `bytes`, uninitialised, on huge pages. Page faults of new memory take longer than the loss (measured for 500
// MB: 145 ms page by page, 56 ms in huge pages, against 52 ms to copy it), and each training step needs the same size.
// So freed memory stays mapped, but marked MADV_FREE: the system takes it back when it is short of memory, and until
// then it can be used again at no cost.
at::DataPtr pooled_memory(size_t bytes);

}  // namespace tlk
