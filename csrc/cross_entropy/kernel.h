// One call of the cross-entropy kernels: plain pointers and numbers, no torch header, so that every instruction set's
// translation unit can include it.
#pragma once
#include <stdint.h>

#include "../core/types.h"

namespace tlk {

constexpr int kMaxAxes = 6;

// A tensor seen as positions x classes; strides in elements, one per axis of `CrossEntropy::size`.
template <class Pointer>
struct Strided {
  Pointer data = nullptr;
  int64_t stride[kMaxAxes] = {};
  int64_t class_stride = 0;
};

struct CrossEntropy {
  // Positions: every axis but the class axis, neighbours merged where all tensors allow it. Position i is row i.
  int axes = 0;
  int64_t size[kMaxAxes] = {};
  int64_t rows = 0;
  int64_t classes = 0;

  Strided<const void*> x;              // logits
  Strided<const void*> probabilities;  // the targets, or
  const int64_t* indices = nullptr;    // the targets, one per position
  const void* weight = nullptr;        // per class, compute type; may be null

  int64_t ignore_index = 0;
  double smoothing = 0, inv_temperature = 1, softcap = 0, z_loss = 0;  // softcap 0: none
  double weight_sum = 0;                                               // over the classes; their number without weight

  // Normaliser, compute type: `peak` is the largest logit of a row (with a softcap, tanh of logit / softcap), `log_sum`
  // the logarithm of the sum of exponentials taken from there. Their sum in one number would lose log_sum at logits of
  // 1e4.
  void* peak = nullptr;
  void* log_sum = nullptr;
  bool normaliser_given = false;  // read it instead of computing it
  bool skip_ignored = true;       // an ignored row is not read; its normaliser is written as 0

  // Results, compute type; a null pointer is not written.
  void* loss = nullptr;
  void* entropy = nullptr;
  bool* correct = nullptr;
  Strided<void*> grad;    // of the logits, in their type; may be the logits' own memory
  PerPosition grad_loss;  // upstream, compute type
  PerPosition grad_lse;   // upstream of lse = peak * softcap / temperature + log_sum; may be null
};

// Class axis contiguous in every tensor: `begin` and `end` are rows, and `scratch`, which may be null, has room for a
// number of the compute type for each class.
// Otherwise positions are the vector lanes: `begin` and `end` are tiles of `width` positions of the last axis, and
// `scratch` holds classes * width numbers of the compute type.
using CrossEntropyRows = void (*)(const CrossEntropy&, int64_t begin, int64_t end, void* scratch);
using CrossEntropyTiles = void (*)(const CrossEntropy&, int64_t begin, int64_t end, int width, void* scratch);

struct CrossEntropyKernels {
  CrossEntropyRows rows;
  CrossEntropyTiles tiles;
};

// `probabilities` is the type of such a target: the logits' own or float.
using CrossEntropyTable = CrossEntropyKernels(Scalar logits, Scalar probabilities, bool softcap);

constexpr int kMaxTileWidth = 256;

// Rows whose exponentials are worth keeping for the gradient: longer ones would leave the second-level cache.
constexpr int64_t kMaxStash = 1 << 16;

}  // namespace tlk
