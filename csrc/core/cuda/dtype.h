// From a tensor's dtype to the kernels' type.
#pragma once
#include "../call.h"
#include "vector.cuh"

namespace tlk {

template <class T_>
struct Type {
  using T = T_;
};

// Calls run(Type<T>()) for the kernels' type T of `dtype`.
template <class Run>
void with_type(at::ScalarType dtype, Run run) {
  switch (scalar_of(dtype)) {
    case Scalar::f64:
      return run(Type<double>());
    case Scalar::f32:
      return run(Type<float>());
    case Scalar::bf16:
      return run(Type<bf16>());
    case Scalar::f16:
      return run(Type<f16>());
  }
}

}  // namespace tlk
