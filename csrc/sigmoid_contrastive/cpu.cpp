// The ops of SigLIP's loss on CPU tensors: one sweep over the tiles of the similarities. Their schemas, with what they
// return, are in tlkernels/losses/sigmoid_contrastive/ops.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "../core/cpu/similarity.h"
#include "../core/cpu/tensor.h"
#include "kernel.h"

namespace tlk {

TLK_KERNELS(SigmoidContrastiveTable, sigmoid_contrastive)

namespace {

using at::Tensor;

// Checks the arguments and keeps the tensors that the kernel's pointers point into.
struct CpuSigmoidContrastiveCall : SigmoidContrastive {
  const Tensor &query, &key, &logit_scale, &logit_bias;
  at::ScalarType compute;
  Similarity similarity;
  Tensor rows;  // loss and gradients of scale and bias, one per row

  CpuSigmoidContrastiveCall(const Tensor& query_in, const Tensor& key_in, const Tensor& logit_scale_in,
                            const Tensor& logit_bias_in, int64_t positive_offset_in)
      : query(query_in),
        key(key_in),
        logit_scale(logit_scale_in),
        logit_bias(logit_bias_in),
        compute(compute_type(at::promote_types(checked(query).scalar_type(), checked(key).scalar_type()))),
        similarity(dense(query), {{dense(key), {}, 0, true}}, /*paired=*/false, /*both=*/false) {
    TORCH_CHECK_VALUE(query.size(1) == key.size(1), "key: expected ", query.size(1), " features, got ", key.size(1));
    TORCH_CHECK_VALUE(logit_scale.dim() == 0 && logit_bias.dim() == 0, "logit_scale, logit_bias: expected 0-d tensors");
    scale = logit_scale.item<double>();
    bias = logit_bias.item<double>();
    positive_offset = positive_offset_in;
    rows = at::zeros({3, query.size(0)}, query.options().dtype(at::kDouble));
    loss = rows.mutable_data_ptr<double>();
    scale_grad = loss + query.size(0);
    bias_grad = scale_grad + query.size(0);
  }

  static const Tensor& checked(const Tensor& x) {
    TORCH_CHECK_VALUE(x.dim() == 2, "query, key: expected shape (N, D), got ", x.sizes());
    return x;
  }
  Tensor dense(const Tensor& x) const { return x.to(compute).contiguous(); }

  Tensor mean_loss() const { return at::full({}, total(0) / double(query.size(0)), similarity.rows.options()); }
  double total(int64_t which) const { return sum_in_order(rows.select(0, which)); }
};

Tensor forward(const Tensor& query, const Tensor& key, const Tensor& logit_scale, const Tensor& logit_bias,
               int64_t positive_offset) {
  const Guards guards;
  CpuSigmoidContrastiveCall call(query, key, logit_scale, logit_bias, positive_offset);
  const auto kernel = sigmoid_contrastive_kernels()(call.compute == at::kDouble).loss;
  call.similarity.each_tile([&](const Part& part, const Tile& tile) {
    call.similarity.product(part, tile);
    in_parallel(tile.rows, tile.columns, [&](int64_t begin, int64_t end) { kernel(call, tile, begin, end); });
  });
  return call.mean_loss();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> step(const Tensor& upstream, const Tensor& query, const Tensor& key,
                                                        const Tensor& logit_scale, const Tensor& logit_bias,
                                                        int64_t positive_offset, std::array<bool, 4> needs) {
  const Guards guards;
  TORCH_CHECK_VALUE(upstream.dim() == 0, "sigmoid_contrastive_step: expected a 0-d upstream gradient");
  CpuSigmoidContrastiveCall call(query, key, logit_scale, logit_bias, positive_offset);
  call.factor = upstream.item<double>() / double(query.size(0));
  const auto kernel = sigmoid_contrastive_kernels()(call.compute == at::kDouble).step;
  Similarity& similarity = call.similarity;
  if (needs[0]) similarity.rows_grad = empty_gradient(similarity.rows).zero_();
  Part& keys = similarity.parts.front();
  if (needs[1]) keys.grad = empty_gradient(keys.x).zero_();
  similarity.each_tile([&](const Part& part, const Tile& tile) {
    similarity.product(part, tile);
    in_parallel(tile.rows, tile.columns, [&](int64_t begin, int64_t end) { kernel(call, tile, begin, end); });
    similarity.accumulate(part, tile, call.scale);
  });
  auto result = [](const Tensor& grad, const Tensor& of) {
    return grad.defined() ? grad.to(of.scalar_type()) : at::empty({0}, of.options());
  };
  return {call.mean_loss(), result(similarity.rows_grad, query), result(keys.grad, key),
          at::full({}, call.total(1), logit_scale.options()), at::full({}, call.total(2), logit_bias.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(tlkernels, CPU, m) {
  m.impl("sigmoid_contrastive_fwd", forward);
  m.impl("sigmoid_contrastive_step", step);
}

}  // namespace tlk
