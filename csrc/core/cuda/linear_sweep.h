// The logits of a linear layer in chunks of rows on a GPU, and the matrix products that take their gradients back to
// the layer: the library's, as are the CPU's (csrc/core/cpu/linear_sweep.h).
#pragma once
#include <array>

#include "../linear_layer.h"

namespace tlk {

// For each chunk in turn: `logits`, then where gradients are needed `take` with what has become of them.
class DeviceLinearSweep {
 public:
  // `needs`: the gradients of input, weight, bias. `absent`: (rows, 1), true in rows that have no part in any gradient,
  // whatever the products make of them: 0 * NaN is NaN; or undefined. `most`: rows of a chunk.
  DeviceLinearSweep(const LinearLayer& layer, std::array<bool, 3> needs, const at::Tensor& absent,
                    int64_t most = INT64_MAX);

  // What a sweep over that layer alone would take.
  static int64_t rows_of_a_chunk(const LinearLayer& layer, bool weight_needed);

  int64_t chunk_rows() const { return chunk_rows_; }
  at::Tensor logits(int64_t begin, int64_t end);                      // in memory that the next chunk uses again
  void take(int64_t begin, int64_t end, const at::Tensor& gradient);  // of these logits
  bool differentiates() const { return needs_[0] || needs_[1] || needs_[2]; }
  std::array<at::Tensor, 3> gradients();  // as the layer's tensors came; without elements where not needed

 private:
  const LinearLayer& layer_;
  const std::array<bool, 3> needs_;
  const at::Tensor absent_;
  int64_t chunk_rows_;
  at::Tensor logits_, grad_input_, grad_weight_, grad_bias_;
};

}  // namespace tlk
