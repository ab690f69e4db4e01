// Distillation's table of kernels. setup.py compiles this file once for each instruction set (see isa.cpp).
#include "cpu_rows.inl"

namespace tlk {
namespace TLK_ISA {

template <class T, Divergence kD, bool kHard, bool kCap>
void distillation_rows(const Distillation& call, int64_t begin, int64_t end, void* kept) {
  const DistillationKernel<T, kD, kHard, kCap> kernel(call, kept);
  for (int64_t i = begin; i < end; ++i) kernel.row(i);
}

template <class T, Divergence kD>
DistillationRows distillation_of(bool hard, bool softcap) {
  if (softcap) return hard ? distillation_rows<T, kD, true, true> : distillation_rows<T, kD, false, true>;
  return hard ? distillation_rows<T, kD, true, false> : distillation_rows<T, kD, false, false>;
}

template <class T>
DistillationRows distillation_of(Divergence divergence, bool hard, bool softcap) {
  switch (divergence) {
    case Divergence::kl:
      return distillation_of<T, Divergence::kl>(hard, softcap);
    case Divergence::js:
      return distillation_of<T, Divergence::js>(hard, softcap);
    default:
      return distillation_of<T, Divergence::tv>(hard, softcap);
  }
}

DistillationRows distillation(Scalar logits, Divergence divergence, bool hard, bool softcap) {
  switch (logits) {
    case Scalar::f64:
      return distillation_of<double>(divergence, hard, softcap);
    case Scalar::f32:
      return distillation_of<float>(divergence, hard, softcap);
    case Scalar::bf16:
      return distillation_of<bf16>(divergence, hard, softcap);
    default:
      return distillation_of<f16>(divergence, hard, softcap);
  }
}

}  // namespace TLK_ISA
}  // namespace tlk
