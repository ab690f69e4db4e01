#include "cpu_call.h"
#include "ops.h"

TORCH_LIBRARY_IMPL(tlkernels, CPU, m) { tlk::CrossEntropyOps<tlk::CpuCrossEntropyCall>::implement(m); }
