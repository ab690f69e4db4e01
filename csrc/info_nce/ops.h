// The ops of InfoNCE, the same on every device; nt_xent and sup_con call them too. Their schemas, with what they
// return, are in tlkernels/losses/info_nce/ops.py.
#pragma once
#include <torch/library.h>

#include <array>
#include <tuple>

#include "call.h"

namespace tlk {

// `Call` is CpuInfoNceCall or CudaInfoNceCall.
template <class Call, class Arguments = InfoNceArguments::ArgumentTypes>
struct InfoNceOps;

template <class Call, class... Arguments>
struct InfoNceOps<Call, Types<Arguments...>> {
  using Tensor = at::Tensor;

  static std::tuple<Tensor, Tensor> forward(Arguments... arguments) {
    const Guards guards;
    const InfoNceArguments given{arguments...};
    Call call(given);
    call.statistics();
    return {call.losses(), call.state};
  }

  static InfoNceGradients backward(const Tensor& grad_loss, const Tensor& state, Arguments... arguments,
                                   std::array<bool, 4> needs) {
    const Guards guards;
    const InfoNceArguments given{arguments...};
    Call call(given);
    given.check_backward(grad_loss, state);
    call.use_state(state.contiguous());
    return call.gradients(grad_loss, needs);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> step(Arguments... arguments, bool mean,
                                                                 std::array<bool, 4> needs) {
    const Guards guards;
    const InfoNceArguments given{arguments...};
    Call call(given);
    call.statistics();
    const auto [loss, upstream] = call.reduced(mean);
    return std::tuple_cat(std::make_tuple(loss), call.gradients(upstream, needs));
  }

  static void implement(torch::Library& m) {
    m.impl("info_nce_fwd", forward);
    m.impl("info_nce_bwd", backward);
    m.impl("info_nce_step", step);
  }
};

}  // namespace tlk
