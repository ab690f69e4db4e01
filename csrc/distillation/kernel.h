// Arguments of the distillation kernels, without torch.
#pragma once
#include <stdint.h>

#include "../core/types.h"

namespace tlk {

// The divergence of two distributions p_0 and p_1 over the classes:
//   kl: KL(p_0 || p_1)
//   js: share_0 * KL(p_0 || m) + share_1 * KL(p_1 || m), m = share_0 * p_0 + share_1 * p_1
//   tv: half the sum of |p_0 - p_1|
enum class Divergence { kl, js, tv };

// The logits of one distribution, (rows, classes) with contiguous classes. Row i starts at element
// i / inner * stride[0] + i % inner * stride[1].
struct Side {
  const void* x = nullptr;
  int64_t stride[2] = {};
  void* grad = nullptr;  // of the logits, in their type; may be their memory; null: not wanted
  int64_t grad_stride[2] = {};
  double share = 0;    // of js
  double softcap = 0;  // the logits are softcap * tanh(x / softcap); 0: x
};

struct Distillation {
  Divergence divergence = Divergence::kl;
  int64_t rows = 0, inner = 1, classes = 0;
  Side side[2];
  int student = 0;  // the side that is the student, which has the cross entropy
  double inv_temperature = 1;
  double soft = 1;  // factor of the divergence
  double hard = 0;  // factor of the cross entropy
  double smoothing = 0;
  const int64_t* target = nullptr;  // (rows): class indices; null: no row is ignored
  int64_t ignore_index = 0;
  PerPosition row_weight;  // compute type; may be null. A row of weight 0 is ignored
  PerPosition grad_loss;   // upstream gradient, compute type; required if a gradient is wanted
  void* loss = nullptr;    // (rows), compute type; null: not wanted

  bool has_softcap() const { return side[0].softcap != 0 || side[1].softcap != 0; }
};

// Rows begin to end - 1. `kept` is scratch of kept_numbers() of the compute type, from a row's first sweep to its later
// ones. `softcap` says whether any side has one.
using DistillationRows = void (*)(const Distillation&, int64_t begin, int64_t end, void* kept);
using DistillationTable = DistillationRows(Scalar logits, Divergence divergence, bool hard, bool softcap);

constexpr int64_t kLeastBlock = 512;  // the least number of classes that share one kept peak

constexpr int64_t whole_vectors(int64_t classes) { return (classes + 15) / 16 * 16; }
constexpr int64_t blocks_of(int64_t classes) { return (classes + kLeastBlock - 1) / kLeastBlock; }
constexpr int64_t kept_numbers(int64_t classes, bool softcap) {
  return 2 * ((softcap ? 2 : 1) * whole_vectors(classes) + blocks_of(classes));
}

}  // namespace tlk
