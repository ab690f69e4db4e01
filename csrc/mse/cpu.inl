// Squared errors: values, sums and gradients in one sweep.
#include "kernel.h"
#include "../core/cpu/sweep.h"

namespace tlk {
namespace TLK_ISA {

template <class T>
void squared_blocks(const Squared& c, int64_t first_block, int64_t last_block) {
  using A = typename Compute<T>::type;
  using V = Vec<A>;
  const T *x = static_cast<const T*>(c.x), *t = static_cast<const T*>(c.t), *weight = static_cast<const T*>(c.weight);
  T *grad_x = static_cast<T*>(c.grad_x), *grad_t = static_cast<T*>(c.grad_t);
  A* values = static_cast<A*>(c.values);
  const A* grad = static_cast<const A*>(c.grad.data);
  const bool each = c.grad.stride != 0;
  const A twice = grad && !each ? 2 * grad[0] : A(0);
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t begin = block * kSquaredBlock, stop = begin + kSquaredBlock;
    Chains<A> sum;
    sweep<A>(begin, stop < c.size ? stop : c.size, [&](int64_t k, int slot, int n) __attribute__((always_inline)) {
      const V d = load_some(x + k, n, A(0)) - load_some(t + k, n, A(0));
      const V wd = weight ? d * load_some(weight + k, n, A(0)) : d;
      const V value = wd * d;
      sum.part[slot] += only<A>(value, n);
      if (values) store_some(values + k, n, value);
      if (!grad) return;
      const V g = each ? load_some(grad + k, n, A(0)) * A(2) * wd : twice * wd;
      if (grad_x) store_some(grad_x + k, n, g);
      if (grad_t) store_some(grad_t + k, n, -g);
    });
    if (c.sums) c.sums[block] = double(sum.sum());
  }
}

SquaredBlocks squared(Scalar type) {
  switch (type) {
    case Scalar::f64:
      return squared_blocks<double>;
    case Scalar::f32:
      return squared_blocks<float>;
    case Scalar::bf16:
      return squared_blocks<bf16>;
    default:
      return squared_blocks<f16>;
  }
}

}  // namespace TLK_ISA
}  // namespace tlk
