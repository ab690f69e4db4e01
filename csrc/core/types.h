// Types that the kernels of several losses share; no torch header.
#pragma once
#include <stdint.h>

namespace tlk {

enum class Scalar { f64, f32, bf16, f16 };

// Values for each position, or (stride 0) one value for all.
struct PerPosition {
  const void* data = nullptr;
  int64_t stride = 0;
};

}  // namespace tlk
