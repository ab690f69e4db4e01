// The sweep over chunks of a linear layer's rows, on a CPU.
#pragma once
#include "../linear_layer.h"

namespace tlk {

class CpuLinearSweep : public LinearSweep {
 public:
  CpuLinearSweep(const LinearLayer& layer, const CountedRows& counted, LinearNeeds needs, int64_t chunk_rows);

  // `valid` and `used`: True in rows that are not ignored, and in rows whose weight is not 0; undefined: all. Checks
  // `num_valid`, the number of valid rows.
  static CountedRows count(int64_t rows, const at::Tensor& valid, const at::Tensor& used,
                           std::optional<int64_t> num_valid);

  // The type of the logits, in which the products are made: `dtype` where this CPU multiplies it faster than float32.
  // TLKERNELS_BF16_GEMM=1 (or 0) in the environment says so of bfloat16, for tests.
  static at::ScalarType logits_type(at::ScalarType dtype);
  static int64_t row_bytes(const LinearLayer& layer);  // of a row's logits

  // How many rows of logits to hold at once. `more_bytes`: what each row takes besides its logits.
  static int64_t rows_of_a_chunk(const LinearLayer& layer, const CountedRows& counted, bool needs_weight,
                                 int64_t more_bytes);

  at::Tensor logits(int64_t begin, int64_t end);
  void take(int64_t begin, int64_t end, const at::Tensor& gradient);
  LinearGradients gradients();

 private:
  template <class Body>
  void for_tiles(Body body);

  const at::ScalarType type_;  // of the logits
  const at::Tensor bias_;      // in type_
  const int64_t classes_;
  const int64_t tile_;     // classes whose weights are converted at once, where the weight is not of type_
  at::Tensor logits_, x_;  // of the current chunk, x in type_
};

}  // namespace tlk
