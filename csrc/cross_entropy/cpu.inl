// Cross entropy's table of kernels. setup.py compiles this file once for each instruction set (see isa.cpp).
#include "cpu_rows.inl"
#include "cpu_tiles.inl"

namespace tlk {
namespace TLK_ISA {

template <class T, class P>
CrossEntropyKernels select(bool softcap) {
  return softcap ? CrossEntropyKernels{rows<T, P, true>, tiles<T, P, true>}
                 : CrossEntropyKernels{rows<T, P, false>, tiles<T, P, false>};
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
