// What the calls of several losses' kernels are made of.
#pragma once
#include <stdint.h>

namespace tlk {

enum class Scalar { f64, f32, bf16, f16 };

// A value per position, or (stride 0) one for all.
struct PerPosition {
  const void* data = nullptr;
  int64_t stride = 0;
};

}  // namespace tlk
