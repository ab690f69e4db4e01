// Cross entropy's table of kernels. setup.py compiles this file once for each instruction set (see isa.cpp).
#include "cpu_rows.inl"
#include "cpu_tiles.inl"

namespace tlk {
namespace TLK_ISA {

template <class A>
void bound(const void* x, void* f, int64_t numbers, double softcap) {
  const A *from = static_cast<const A*>(x), cap = A(softcap);
  A* const to = static_cast<A*>(f);
  sweep<A>(0, numbers, [&](int64_t k, int, int n) __attribute__((always_inline)) {
    store_some(to + k, n, tanh(load_some(from + k, n, A(0)) / cap));
  });
}

template <class T, class P>
CrossEntropyKernels select(bool softcap) {
  constexpr CrossEntropyBound to_bound = bound<typename Compute<T>::type>;
  return softcap ? CrossEntropyKernels{rows<T, P, true>, tiles<T, P, true>, to_bound}
                 : CrossEntropyKernels{rows<T, P, false>, tiles<T, P, false>, to_bound};
}

CrossEntropyKernels cross_entropy(Scalar logits, Scalar probabilities, bool softcap) {
  const bool wide = probabilities == Scalar::f32;
  switch (logits) {
    case Scalar::f64:
      return select<double, double>(softcap);
    case Scalar::f32:
      return select<float, float>(softcap);
    case Scalar::bf16:
      return wide ? select<bf16, float>(softcap) : select<bf16, bf16>(softcap);
    default:
      return wide ? select<f16, float>(softcap) : select<f16, f16>(softcap);
  }
}

}  // namespace TLK_ISA
}  // namespace tlk
