// The logits of a linear layer in chunks of rows, and the matrix products that take their gradients back to the layer.
#pragma once
#include <ATen/ATen.h>

#include <array>
#include <vector>

#include "../linear_layer.h"

namespace tlk {

struct LinearChunks {
  int64_t rows;     // of a chunk: `logits` and what lies beside them exist for so many rows at once
  int64_t classes;  // of a tile of the weight, where a product is not made in the weight's own type
};

// The table of sizes. `row_bytes`: what a row of a chunk takes.
LinearChunks linear_chunks(int64_t rows, int64_t features, int64_t classes, int64_t row_bytes);

// The type that products of `dtype` are made in, which is the logits' type: its own where the CPU multiplies it faster
// than float32.
at::ScalarType product_type(at::ScalarType dtype);

// For each chunk in turn: `logits`, then where gradients are needed `take` with what has become of them.
class LinearSweep {
 public:
  // `needs`: the gradients of input, weight, bias. `row_bytes`: beside the logits. `absent`: rows, in order, that have
  // no part in any gradient, whatever the products make of them: 0 * NaN is NaN.
  LinearSweep(const LinearLayer& layer, std::array<bool, 3> needs, int64_t row_bytes, std::vector<int64_t> absent = {});

  int64_t chunk_rows() const { return chunks_.rows; }
  at::Tensor logits(int64_t begin, int64_t end);                      // in memory that the next chunk uses again
  void take(int64_t begin, int64_t end, const at::Tensor& gradient);  // of these logits
  bool differentiates() const { return needs_[0] || needs_[1] || needs_[2]; }
  std::array<at::Tensor, 3> gradients();  // as the layer's tensors came; without elements where not needed

 private:
  template <class Body>
  void for_tiles(Body body);
  std::vector<int64_t> absent_of(int64_t begin, int64_t end) const;

  const LinearLayer& layer_;
  const at::Tensor bias_;  // in type_
  const std::array<bool, 3> needs_;
  const at::ScalarType type_;
  const int64_t classes_;
  const std::vector<int64_t> absent_;
  LinearChunks chunks_;
  at::Tensor logits_, x_;  // of the current chunk, x in type_
  at::Tensor grad_input_, grad_weight_, grad_bias_;
};

}  // namespace tlk
