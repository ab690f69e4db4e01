// The classes that are selected in each row: their log-probabilities and gradients, with one arithmetic on every
// device. All other classes are the work of cross entropy's kernels, for which the row's target is elsewhere. With z
// the logits after softcap and temperature, f as in cross entropy, p = softmax(z), and upstreams g of the
// log-probabilities and h of the entropy:
//
//   log_prob_k = (f_k - peak) * softcap / T - log_sum
//   dx_c       = (sum_{k: index_k = c} g_k - p_c * (sum_k g_k + h * (log p_c + entropy))) * f'(x_c) / T
#pragma once
#include <math.h>
#include <stdint.h>

#include <type_traits>

#include "../core/types.h"

#if defined(__CUDACC__)
#define TLK_EVERYWHERE __host__ __device__ inline
#else
#define TLK_EVERYWHERE inline
#endif

namespace tlk {

// Targets that cross entropy's kernels get. A row without a class is ignored. One with a class out of range, which only
// the CPU refuses, has a target out of range and so becomes NaN.
constexpr int64_t kElsewhere = -1, kNoClass = -2;

struct SelectedClasses {
  int64_t rows = 0, count = 0, classes = 0;  // count: selected classes of a row
  const int64_t* index = nullptr;            // (rows, count); -1: no class
  int64_t* target = nullptr;                 // (rows)
  double inv_temperature = 1, softcap = 0;   // softcap 0: none

  // The logits, and in the backward their gradient, of which the selected classes are written.
  void* logits = nullptr;
  int64_t row_stride = 0, class_stride = 0;

  // Of the compute type, contiguous.
  const void *peak = nullptr, *log_sum = nullptr, *entropy = nullptr;  // (rows)
  void* x = nullptr;                                                   // (rows, count): logits of the classes
  const void* f = nullptr;                                             // (rows, count): f of them; null: not computed
  void* log_probs = nullptr;                                           // (rows, count)
  const void* grad_log_probs = nullptr;                                // (rows, count); null in the forward
  void* grad_lse = nullptr;                                            // (rows): -sum_k g_k
  PerPosition grad_entropy;                                            // may be null
};

template <class T>
using ComputeOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Writes the row's target and -sum_k g_k. Returns whether all classes are in range.
template <class A>
TLK_EVERYWHERE bool prepare_row(const SelectedClasses& c, int64_t row) {
  const A* const upstream = static_cast<const A*>(c.grad_log_probs);
  int64_t target = kNoClass;
  bool in_range = true;
  A sum = 0;
  for (int64_t i = row * c.count; i < (row + 1) * c.count; ++i) {
    if (c.index[i] == -1) continue;
    in_range &= c.index[i] >= 0 && c.index[i] < c.classes;
    target = in_range ? kElsewhere : c.classes;
    if (upstream) sum += upstream[i];
  }
  c.target[row] = target;
  if (upstream) static_cast<A*>(c.grad_lse)[row] = -sum;
  return in_range;
}

// The logit of class index[i].
template <class T>
TLK_EVERYWHERE ComputeOf<T> selected_logit(const SelectedClasses& c, int64_t i) {
  if (c.index[i] < 0 || c.index[i] >= c.classes) return 0;
  return ComputeOf<T>(static_cast<const T*>(c.logits)[i / c.count * c.row_stride + c.index[i] * c.class_stride]);
}

// f of class index[i], whose logit is x.
template <class A>
TLK_EVERYWHERE A capped(const SelectedClasses& c, int64_t i, A x) {
  if (c.f) return static_cast<const A*>(c.f)[i];
  return c.softcap != 0 ? A(tanh(x / A(c.softcap))) : x;
}
template <class A>
TLK_EVERYWHERE A log_probability(const SelectedClasses& c, int64_t row, A f) {
  const A to_z = A(c.inv_temperature * (c.softcap != 0 ? c.softcap : 1));
  const A log_p = (f - static_cast<const A*>(c.peak)[row]) * to_z - static_cast<const A*>(c.log_sum)[row];
  return log_p > 0 ? A(0) : log_p;  // on a GPU tanh may be rounded otherwise than in the rows' kernel
}

template <class T>
TLK_EVERYWHERE void write_log_prob(const SelectedClasses& c, int64_t i) {
  using A = ComputeOf<T>;
  const int64_t row = i / c.count;
  A value = -A(INFINITY);
  if (c.index[i] != -1) value = log_probability(c, row, capped(c, i, selected_logit<T>(c, i)));
  const bool in_range = c.target[row] == kElsewhere || c.target[row] == kNoClass;
  static_cast<A*>(c.log_probs)[i] = in_range ? value : A(NAN);
}

// Writes the gradient of class index[i], where `sum` is that of its upstreams in all its places of the row. The logit
// is x[i]: the gradient may be in the logits' memory.
template <class T>
TLK_EVERYWHERE void write_selected_gradient(const SelectedClasses& c, int64_t i, ComputeOf<T> sum) {
  using A = ComputeOf<T>;
  const int64_t row = i / c.count;
  const A f = capped(c, i, static_cast<const A*>(c.x)[i]);
  const A log_p = log_probability(c, row, f), p = A(exp(log_p));
  A rest = static_cast<const A*>(c.grad_lse)[row];
  if (c.grad_entropy.data && p != 0) {
    const A h = static_cast<const A*>(c.grad_entropy.data)[row * c.grad_entropy.stride];
    rest -= h * (log_p + static_cast<const A*>(c.entropy)[row]);
  }
  A value = (p * rest + sum) * A(c.inv_temperature);
  if (c.softcap != 0) value *= (A(1) - f) * (A(1) + f);
  static_cast<T*>(c.logits)[row * c.row_stride + c.index[i] * c.class_stride] = T(value);
}

}  // namespace tlk
