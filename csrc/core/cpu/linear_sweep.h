// The sweep over chunks of a linear layer's rows, on a CPU.
#pragma once
#include <vector>

#include "../linear_layer.h"

namespace tlk {

class CpuLinearSweep : public LinearSweep {
 public:
  // Rows, in order, that get no gradient and give none: the products would make NaN of 0 * NaN.
  using Absent = std::vector<int64_t>;

  CpuLinearSweep(const LinearLayer& layer, LinearNeeds needs, Absent absent, int64_t chunk_rows);

  // The type of the logits, in which the products are made: `dtype` where this CPU multiplies it faster than float32.
  // TLKERNELS_BF16_GEMM=1 (or 0) in the environment says so of bfloat16, for tests.
  static at::ScalarType logits_type(at::ScalarType dtype);
  static int64_t row_bytes(const LinearLayer& layer);  // of a row's logits

  // How many rows of logits to hold at once. `more_bytes`: what each row takes besides its logits.
  static int64_t rows_of_a_chunk(const LinearLayer& layer, bool needs_weight, int64_t more_bytes);

  at::Tensor logits(int64_t begin, int64_t end);
  void take(int64_t begin, int64_t end, const at::Tensor& gradient);
  LinearGradients gradients();

 private:
  template <class Body>
  void for_tiles(Body body);
  std::vector<int64_t> absent_of(int64_t begin, int64_t end) const;

  const at::ScalarType type_;  // of the logits
  const at::Tensor bias_;      // in type_
  const int64_t classes_;
  const int64_t tile_;  // classes whose weights are converted at once, where the weight is not of type_
  const Absent absent_;
  at::Tensor logits_, x_;  // of the current chunk, x in type_
};

}  // namespace tlk
