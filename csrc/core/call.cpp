#include "call.h"

namespace tlk {

Scalar scalar_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return Scalar::f64;
    case at::kFloat:
      return Scalar::f32;
    case at::kBFloat16:
      return Scalar::bf16;
    case at::kHalf:
      return Scalar::f16;
    default:
      TORCH_CHECK_TYPE(false, "expected float64, float32, bfloat16 or float16, got ", dtype);
  }
}

PerPosition per_position(at::Tensor& values) {
  bool one = true;
  for (int64_t axis = 0; axis < values.dim(); ++axis) one &= values.stride(axis) == 0 || values.size(axis) == 1;
  if (!one) values = values.contiguous();
  return {values.const_data_ptr(), one ? 0 : 1};
}

}  // namespace tlk
