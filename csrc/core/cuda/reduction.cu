#include "reduction.h"

#include "sum.cuh"
#include "tensor.h"

namespace tlk {

using at::Tensor;

static Tensor parts(const Tensor& like) { return at::empty({kMostParts}, like.options().dtype(at::kDouble)); }

void Reduction::count(const Tensor& target, int64_t ignore_index, int64_t classes, const void* weight,
                      at::ScalarType compute, cudaStream_t stream) {
  divisor = at::empty({}, target.options().dtype(at::kDouble));
  const Tensor scratch = parts(target);
  const auto run = [&](auto* by_class) {
    using A = std::remove_const_t<std::remove_pointer_t<decltype(by_class)>>;
    const Counted<A> counted{target.const_data_ptr<int64_t>(), ignore_index, classes, by_class};
    const double* const undivided = nullptr;
    return sum(counted, target.numel(), 1.0, undivided, divisor.mutable_data_ptr<double>(),
               scratch.mutable_data_ptr<double>(), stream);
  };
  check_launch(
      compute == at::kDouble ? run(static_cast<const double*>(weight)) : run(static_cast<const float*>(weight)),
      "count of targets");
}

Tensor Reduction::sum_of(const Tensor& losses, cudaStream_t stream) const {
  const Tensor result = at::empty({}, losses.options()), scratch = parts(losses);
  const auto run = [&](auto* out) {
    using A = std::remove_pointer_t<decltype(out)>;
    const Values<A> values{static_cast<const A*>(losses.const_data_ptr())};
    return sum(values, losses.numel(), factor, divisor_data(), out, scratch.mutable_data_ptr<double>(), stream);
  };
  check_launch(losses.scalar_type() == at::kDouble ? run(result.mutable_data_ptr<double>())
                                                   : run(result.mutable_data_ptr<float>()),
               "sum of losses");
  return result;
}

}  // namespace tlk
