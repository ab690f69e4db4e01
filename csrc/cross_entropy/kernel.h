// Arguments of the cross-entropy kernels. Without torch: every instruction set's translation unit includes this.
#pragma once
#include <stdint.h>

#include "../core/types.h"

namespace tlk {

constexpr int kMaxAxes = 6;

// A tensor as (positions, classes). Strides in elements; `stride` has one for each axis of CrossEntropy::size.
template <class Pointer>
struct Strided {
  Pointer data = nullptr;
  int64_t stride[kMaxAxes] = {};
  int64_t class_stride = 0;
};

struct CrossEntropy {
  // Positions are every axis but the class axis, neighbouring axes merged if all tensors allow it. Position i is row i.
  int axes = 0;
  int64_t size[kMaxAxes] = {};  // of each axis
  int64_t rows = 0;
  int64_t classes = 0;

  Strided<const void*> x;              // logits
  Strided<const void*> probabilities;  // the targets, if `indices` is null
  const int64_t* indices = nullptr;    // (rows): class indices, the targets
  const void* weight = nullptr;        // (classes), compute type; may be null

  int64_t ignore_index = 0;
  double smoothing = 0, inv_temperature = 1, softcap = 0, z_loss = 0;  // softcap 0: none
  double weight_sum = 0;                                               // sum of `weight`; the number of classes without
  double spread_over = 1;  // classes of the whole vocabulary, over which smoothing is spread
  bool elsewhere = false;  // class index -1: the row counts, and its target is in another part of the vocabulary

  // Normaliser, (rows), compute type. `peak`: the largest logit, or with a softcap tanh(logit / softcap); `log_sum`:
  // log of the sum of exponentials relative to it. As one number, lse would lose log_sum at logits of 1e4.
  void* peak = nullptr;
  void* log_sum = nullptr;
  bool normaliser_given = false;  // the normaliser is read, not computed, and `entropy` if there is grad_entropy

  // Results; null: not wanted.
  void* loss = nullptr;      // (rows), compute type
  void* entropy = nullptr;   // (rows), compute type
  bool* correct = nullptr;   // (rows)
  Strided<void*> grad;       // of the logits, in their type; may be the logits' memory
  PerPosition grad_loss;     // upstream gradient, compute type
  PerPosition grad_lse;      // upstream gradient of lse = peak * softcap / temperature + log_sum; may be null
  PerPosition grad_entropy;  // upstream gradient of the entropy; may be null; needs normaliser and entropy given
  PerPosition row_weight;  // factor of the loss and of grad_loss, compute type; a row of weight 0 is not read; or null
};

// If the class axis is contiguous in every tensor, `begin` and `end` count rows; `scratch` has one number of the
// compute type for each class and may be null. Otherwise positions are the vector lanes: `begin` and `end` count tiles
// of `width` positions of the last axis; `scratch` has classes * width numbers of the compute type.
using CrossEntropyRows = void (*)(const CrossEntropy&, int64_t begin, int64_t end, void* scratch);
using CrossEntropyTiles = void (*)(const CrossEntropy&, int64_t begin, int64_t end, int width, void* scratch);

// Writes tanh(x / softcap) of numbers of the compute type, as the kernels above compute it.
using CrossEntropyBound = void (*)(const void* x, void* f, int64_t numbers, double softcap);

struct CrossEntropyKernels {
  CrossEntropyRows rows;
  CrossEntropyTiles tiles;
  CrossEntropyBound bound;
};

// `probabilities`: the type of targets that are probabilities, the logits' type or float.
using CrossEntropyTable = CrossEntropyKernels(Scalar logits, Scalar probabilities, bool softcap);

constexpr int kMaxTileWidth = 256;

// The longest rows whose exponentials are kept for the gradient; longer ones would leave the second-level cache.
constexpr int64_t kMaxStash = 1 << 16;

}  // namespace tlk
