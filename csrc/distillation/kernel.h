// One call of the distillation kernels: plain pointers and numbers, no torch header.
#pragma once
#include <stdint.h>

#include "../core/types.h"

namespace tlk {

// Between two distributions over the classes, 0 and 1:
//   kl: of 0 from 1        js: share_0 * kl(0, mixture) + share_1 * kl(1, mixture)        tv: half the sum of |p_0 -
//   p_1|
enum class Divergence { kl, js, tv };

// The logits of one of the two, classes contiguous; row i starts at i / inner * stride[0] + i % inner * stride[1].
struct Side {
  const void* x = nullptr;
  int64_t stride[2] = {};
  void* grad = nullptr;  // in the type of the logits; may be their own memory; null: not wanted
  int64_t grad_stride[2] = {};
  double share = 0;
};

struct Distillation {
  Divergence divergence = Divergence::kl;
  int64_t rows = 0, inner = 1, classes = 0;
  Side side[2];
  int student = 0;  // which side it is: that of the cross entropy
  double inv_temperature = 1;
  double soft = 1;  // factor of the divergence
  double hard = 0;  // factor of the cross entropy
  double smoothing = 0;
  const int64_t* target = nullptr;  // null: no row is ignored
  int64_t ignore_index = 0;
  PerPosition row_weight;  // compute type; may be null
  PerPosition grad_loss;   // upstream, compute type; needed where a gradient is wanted
  void* loss = nullptr;    // one per row, compute type; null: not wanted
};

// Rows begin to end. `kept` holds kept_numbers() of the compute type: what a row's later sweeps need of its first one.
using DistillationRows = void (*)(const Distillation&, int64_t begin, int64_t end, void* kept);
using DistillationTable = DistillationRows(Scalar logits, Divergence divergence, bool hard);

constexpr int64_t kLeastBlock = 512;  // classes for which one peak is kept, at the least

constexpr int64_t whole_vectors(int64_t classes) { return (classes + 15) / 16 * 16; }
constexpr int64_t blocks_of(int64_t classes) { return (classes + kLeastBlock - 1) / kLeastBlock; }
constexpr int64_t kept_numbers(int64_t classes) { return 2 * (whole_vectors(classes) + blocks_of(classes)); }

}  // namespace tlk
