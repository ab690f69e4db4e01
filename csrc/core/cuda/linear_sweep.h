// The sweep over chunks of a linear layer's rows, on a GPU.
#pragma once
#include "../linear_layer.h"

namespace tlk {

class CudaLinearSweep : public LinearSweep {
 public:
  CudaLinearSweep(const LinearLayer& layer, const CountedRows& counted, LinearNeeds needs, int64_t chunk_rows);

  // As CpuLinearSweep::count, without waiting for the device: only with `num_valid` are ignored rows left out of the
  // products, and it is checked only where TLKERNELS_CHECK=1 asks for it.
  static CountedRows count(int64_t rows, const at::Tensor& valid, const at::Tensor& used,
                           std::optional<int64_t> num_valid);

  // The type of the logits.
  static at::ScalarType logits_type(at::ScalarType dtype) { return dtype; }
  static int64_t row_bytes(const LinearLayer& layer) { return layer.classes() * int64_t(layer.weight.element_size()); }

  // How many rows of logits to hold at once. TLKERNELS_CHUNK_BYTES in the environment sets their bytes, for tests.
  static int64_t rows_of_a_chunk(const LinearLayer& layer, const CountedRows& counted, bool needs_weight,
                                 int64_t more_bytes);

  at::Tensor logits(int64_t begin, int64_t end);
  void take(int64_t begin, int64_t end, const at::Tensor& gradient);

 private:
  at::Tensor logits_, x_;  // of the current chunk
};

}  // namespace tlk
