// The sweep over chunks of a linear layer's rows, on a GPU.
#pragma once
#include "../linear_layer.h"

namespace tlk {

class CudaLinearSweep : public LinearSweep {
 public:
  // (rows, 1), True in rows that get no gradient and give none: the products would make NaN of 0 * NaN. Or undefined.
  using Absent = at::Tensor;

  CudaLinearSweep(const LinearLayer& layer, LinearNeeds needs, Absent absent, int64_t chunk_rows);

  // The type of the logits.
  static at::ScalarType logits_type(at::ScalarType dtype) { return dtype; }
  static int64_t row_bytes(const LinearLayer& layer) { return layer.classes() * int64_t(layer.weight.element_size()); }

  // How many rows of logits to hold at once. TLKERNELS_CHUNK_BYTES in the environment sets their bytes, for tests.
  static int64_t rows_of_a_chunk(const LinearLayer& layer, bool needs_weight, int64_t more_bytes);

  at::Tensor logits(int64_t begin, int64_t end);
  void take(int64_t begin, int64_t end, const at::Tensor& gradient);

 private:
  const Absent absent_;
  at::Tensor logits_;  // of the current chunk
};

}  // namespace tlk
