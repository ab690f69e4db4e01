// InfoNCE on CPU tensors: checks that the kernels rely on, memory, the two sweeps. The schemas and what they mean are
// in tlkernels/losses/info_nce/ops.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>

#include "similarity.h"
#include "tensor.h"

namespace tlk {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

const Tensor& or_none(const OptionalTensor& tensor) {
  static const Tensor none;
  return tensor ? *tensor : none;
}

// Embeddings as the tiles take them, and the way back for their gradient.
struct Embeddings {
  Tensor given, x, norm, grad;

  Embeddings() = default;
  Embeddings(const Tensor& tensor, at::ScalarType compute, bool normalize) : given(tensor) {
    if (!normalize) {
      x = given.to(compute).contiguous();
      return;
    }
    const Tensor from = (compute == at::kDouble ? given.to(compute) : given).contiguous();
    x = at::empty(from.sizes(), from.options().dtype(compute));
    norm = at::empty(from.sizes().slice(0, size_t(from.dim() - 1)), x.options().dtype(at::kDouble));
    const auto kernel = kernels().info_nce(scalar_of(from.scalar_type()), Set::none).normalize;
    in_parallel(norm.numel(), from.size(-1), [&](int64_t begin, int64_t end) {
      kernel(from.const_data_ptr(), x.mutable_data_ptr(), norm.mutable_data_ptr<double>(), from.size(-1), begin, end);
    });
  }

  void want_gradient() { grad = empty_gradient(x).zero_(); }

  // The gradient by what was given; without elements where it was not wanted.
  Tensor gradient(const Tensor& like) const {
    if (!grad.defined()) return at::empty({0}, like.options());
    if (norm.defined()) {
      const auto kernel = kernels().info_nce(scalar_of(x.scalar_type()), Set::none).normalize_backward;
      in_parallel(norm.numel(), x.size(-1), [&](int64_t begin, int64_t end) {
        kernel(grad.mutable_data_ptr(), x.const_data_ptr(), norm.const_data_ptr<double>(), x.size(-1), begin, end);
      });
    }
    return grad.to(given.scalar_type());
  }
};

// A call and the tensors that it points into.
struct Call : InfoNce {
  const bool symmetric, paired;
  const double smoothing;
  at::ScalarType compute;
  const Tensor &query_given, &logit_scale;
  Embeddings query, key, negatives;
  Tensor target_, mask_, ids_;
  std::optional<Similarity> similarity;
  InfoNceKernels kernel;
  int64_t rows_count, columns_count;  // columns: of the keys
  Tensor state;                       // (directions, kStatistics, rows), float64
  bool tile_is_kept = false;

  Call(const Tensor& query_in, const OptionalTensor& key_in, const OptionalTensor& negatives_in,
       const Tensor& logit_scale_in, const OptionalTensor& target_in, const OptionalTensor& mask_in,
       const OptionalTensor& query_ids, const OptionalTensor& key_ids, int64_t own_in, bool by_label, bool symmetric_in,
       bool normalize, double label_smoothing)
      : symmetric(symmetric_in),
        paired(!key_in),
        smoothing(label_smoothing),
        query_given(query_in),
        logit_scale(logit_scale_in) {
    const Tensor &keys = or_none(key_in), &others = or_none(negatives_in);
    compute = compute_type(query_in.scalar_type());
    for (const Tensor* x : {&keys, &others})
      if (x->defined() && x->scalar_type() == at::kDouble) compute = at::kDouble;
    check_shapes(keys, others);
    scale = rounded(logit_scale.item<double>());
    set = by_label ? Set::label : smoothing > 0 ? Set::all : Set::none;
    own = own_in;

    query = Embeddings(query_in, compute, normalize);
    rows_count = columns_count = query.x.size(0);
    std::vector<Panel> panels;
    if (paired) {
      panels.push_back({query.x, {}, 0, true});
    } else {
      key = Embeddings(keys, compute, normalize);
      columns_count = key.x.size(0);
      panels.push_back({key.x, {}, 0, true});
    }
    if (others.defined()) {
      negatives = Embeddings(others, compute, normalize);
      panels.push_back({negatives.x, {}, columns_count, false});
    }
    TORCH_CHECK_VALUE(!symmetric || (!paired && rows_count == columns_count && !target_in && !by_label),
                      "symmetric: expected as many keys as queries and the default target");
    TORCH_CHECK_VALUE(!others.defined() || (!paired && !by_label), "negatives: expected none here");
    similarity.emplace(query.x, std::move(panels), paired, symmetric);
    kernel = kernels().info_nce(scalar_of(compute), set);
    if (!by_label) use_target(or_none(target_in));
    if (mask_in) use_mask(*mask_in);
    if (query_ids) use_ids(*query_ids, or_none(key_ids));
    TORCH_CHECK_VALUE(!by_label || query_ids, "query_ids: expected labels");
  }

  void check_shapes(const Tensor& keys, const Tensor& others) const {
    TORCH_CHECK_VALUE(query_given.dim() == 2, "query: expected shape (N, D), got ", query_given.sizes());
    TORCH_CHECK_VALUE(!keys.defined() || (keys.dim() == 2 && keys.size(1) == query_given.size(1)),
                      "key: expected shape (K, ", query_given.size(1), "), got ", keys.sizes());
    TORCH_CHECK_VALUE(
        !others.defined() || ((others.dim() == 2 || (others.dim() == 3 && others.size(0) == query_given.size(0))) &&
                              others.size(-1) == query_given.size(1)),
        "negatives: expected shape (M, D) or (N, M, D), got ", others.sizes());
    TORCH_CHECK_VALUE(logit_scale.dim() == 0, "logit_scale: expected a 0-d tensor, got shape ", logit_scale.sizes());
  }

  void use_target(const Tensor& given) {
    const Panel& last = similarity->panels.back();
    const int64_t classes = last.first + last.columns();
    target_ = given.defined() ? given.to(at::kLong).contiguous()
                              : at::arange(rows_count, query_given.options().dtype(at::kLong));
    TORCH_CHECK_VALUE(target_.dim() == 1 && target_.size(0) == rows_count, "target: expected ", rows_count,
                      " columns, one per query, got shape ", target_.sizes());
    target = target_.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < rows_count; ++i)
      TORCH_CHECK_INDEX(target[i] >= 0 && target[i] < classes, "target: expected indices of keys in [0, ", classes,
                        "), got ", target[i], " at position ", i);
    for (int64_t i = 0; paired && i < rows_count; ++i)
      TORCH_CHECK_VALUE(target[target[i]] == i, "target: expected pairs of rows without key, got ", target[i], " for ",
                        i, " and ", target[target[i]], " for ", target[i]);
  }

  void use_mask(const Tensor& given) {
    TORCH_CHECK_VALUE(given.scalar_type() == at::kBool && given.dim() == 2 && given.size(0) == rows_count &&
                          given.size(1) == columns_count,
                      "mask: expected bool of shape (", rows_count, ", ", columns_count, "), got ", given.scalar_type(),
                      " of shape ", given.sizes());
    mask_ = given.stride(1) == 1 || given.size(1) < 2 ? given : given.contiguous();
    mask = mask_.const_data_ptr<bool>();
    mask_stride = mask_.stride(0);
  }

  // Only equality counts, so that the ids can be numbered anew and fit into a vector's lanes.
  void use_ids(const Tensor& query_ids, const Tensor& key_ids) {
    const Tensor& of_keys = key_ids.defined() ? key_ids : query_ids;
    TORCH_CHECK_VALUE(query_ids.dim() == 1 && query_ids.size(0) == rows_count && of_keys.dim() == 1 &&
                          of_keys.size(0) == columns_count,
                      "ids: expected one for each of ", rows_count, " queries and ", columns_count,
                      " keys, got shapes ", query_ids.sizes(), " and ", of_keys.sizes());
    const Tensor all = at::cat({query_ids.to(at::kLong), of_keys.to(at::kLong)});
    ids_ = std::get<1>(at::_unique2(all, /*sorted=*/true, /*return_inverse=*/true));
    if (compute == at::kFloat) ids_ = ids_.to(at::kInt);
    row_ids = ids_.const_data_ptr();
    column_ids = static_cast<const char*>(row_ids) + size_t(rows_count) * ids_.element_size();
  }

  void use_state(const Tensor& given) {
    state = given;
    auto direction = [&](int64_t which) {
      double* at = state.mutable_data_ptr<double>() + which * kStatistics * rows_count;
      auto next = [&] { return std::exchange(at, at + rows_count); };
      return Direction{next(), next(), next(), next(), next(), next()};  // in this order
    };
    rows = direction(0);
    if (symmetric || paired) columns = direction(symmetric ? 1 : 0);
  }

  // The first sweep.
  void statistics() {
    state = at::zeros({symmetric ? 2 : 1, kStatistics, rows_count}, query_given.options().dtype(at::kDouble));
    state.select(1, 0).fill_(-std::numeric_limits<double>::infinity());
    use_state(state);
    similarity->each_tile([&](const Panel& panel, const Tile& tile) {
      similarity->product(panel, tile);
      in_parallel(tile.rows, tile.columns,
                  [&](int64_t begin, int64_t end) { kernel.row_statistics(*this, tile, begin, end); });
      if (!tile.both) return;
      constexpr int64_t kStrip = 64;  // columns: whole vectors of every instruction set
      in_parallel((tile.columns + kStrip - 1) / kStrip, tile.rows * kStrip, [&](int64_t begin, int64_t end) {
        kernel.column_statistics(*this, tile, begin * kStrip, std::min(end * kStrip, tile.columns));
      });
    });
    tile_is_kept = similarity->one_tile();
  }

  // As the kernels see it.
  double rounded(double x) const { return compute == at::kDouble ? x : double(float(x)); }

  // What the statistics of one row say, the exponentials relative to `top`; `share_count` has the positive too.
  struct Softmax {
    double top, others, moment, own, logit, share_count;  // own, logit: the positive's
    double total() const { return others + own; }
  };
  Softmax softmax(const Direction& d, int64_t i) const {
    if (!target) return {d.peak[i], d.sum[i], d.moment[i], 0, 0, d.set_count[i]};
    const double logit = scale * d.positive[i], top = rounded(std::max(d.peak[i], logit));
    const double factor = std::exp(d.peak[i] - top);
    return {top, d.sum[i] * factor, d.moment[i] * factor, std::exp(logit - top), logit, d.set_count[i] + 1};
  }

  double loss(const Direction& d, int64_t i) const {
    const Softmax s = softmax(d, i);
    if (set == Set::label)
      return s.share_count == 0 ? 0 : std::log(s.others) + (s.top - scale * d.set_sum[i] / s.share_count);
    const double own = s.others <= s.own ? std::log1p(s.others / s.own) : std::log(s.total()) + (s.top - s.logit);
    if (smoothing == 0) return own;
    const double mean = (scale * d.set_sum[i] + s.logit) / s.share_count;
    return own + smoothing * (s.logit - mean);
  }

  Tensor losses() const {
    Tensor result = at::empty({rows_count}, state.options());
    double* out = result.mutable_data_ptr<double>();
    for (int64_t i = 0; i < rows_count; ++i) {
      out[i] = loss(rows, i);
      if (symmetric) out[i] = (out[i] + loss(columns, i)) / 2;
    }
    return result;
  }

  // Rows that the mean is over.
  int64_t counted() const {
    if (set != Set::label) return rows_count;
    return std::count_if(rows.set_count, rows.set_count + rows_count, [](double n) { return n > 0; });
  }

  // The slopes, and the part of the gradient of the scale.
  template <class A, class Upstream>
  Slope slope(const Direction& d, Tensor& memory, Upstream upstream) {
    memory = at::empty({kSlopes, rows_count}, query.x.options());
    A* const out = memory.mutable_data_ptr<A>();
    A *top = out, *factor = top + rows_count, *share = factor + rows_count, *positive = share + rows_count;
    for (int64_t i = 0; i < rows_count; ++i) {
      const Softmax s = softmax(d, i);
      if (set == Set::label && s.share_count == 0) {  // a top above everything: no exponential overflows
        top[i] = A(1e30), factor[i] = share[i] = positive[i] = 0;
        continue;
      }
      const double g = upstream(i) / (symmetric ? 2 : 1);
      const double of_set = set == Set::label ? 1 : set == Set::all ? smoothing : 0;
      const double each = of_set == 0 ? 0 : of_set / s.share_count;
      const double own = target ? smoothing - each - s.others / s.total() : 0;
      top[i] = A(s.top);
      factor[i] = A(g / s.total());
      share[i] = A(g * each);
      positive[i] = A(g * own);
      by_scale_ += g * (s.moment / s.total() - each * d.set_sum[i] + own * d.positive[i]);
    }
    return {top, factor, share, positive};
  }

  // The second sweep: gradients by query, key, negatives and scale, where wanted.
  template <class Upstream>
  std::tuple<Tensor, Tensor, Tensor, Tensor> gradients(Upstream upstream, std::array<bool, 4> wanted) {
    compute == at::kDouble ? set_slopes<double>(upstream) : set_slopes<float>(upstream);
    if (wanted[0]) query.want_gradient();
    if (wanted[1] && !paired) key.want_gradient();
    if (wanted[2] && negatives.x.defined()) negatives.want_gradient();
    similarity->rows_grad = query.grad;
    similarity->panels.front().grad = paired ? query.grad : key.grad;
    similarity->panels.back().grad = negatives.x.defined() ? negatives.grad : similarity->panels.front().grad;
    reads_positive = false;
    similarity->each_tile([&](const Panel& panel, const Tile& tile) {
      if (!similarity->rows_grad.defined() && !panel.grad.defined()) return;
      if (!tile_is_kept) similarity->product(panel, tile);
      in_parallel(tile.rows, tile.columns,
                  [&](int64_t begin, int64_t end) { kernel.gradient(*this, tile, begin, end); });
      similarity->accumulate(panel, tile, scale);
    });
    return {query.gradient(query_given), key.gradient(query_given), negatives.gradient(query_given),
            at::full({}, by_scale_, logit_scale.options())};
  }

 private:
  template <class A, class Upstream>
  void set_slopes(Upstream upstream) {
    row_slope = slope<A>(rows, row_slopes_, upstream);
    if (symmetric || paired) column_slope = symmetric ? slope<A>(columns, column_slopes_, upstream) : row_slope;
  }

  Tensor row_slopes_, column_slopes_;
  double by_scale_ = 0;
};

#define TLK_PARAMETERS                                                                                        \
  const Tensor &query, const OptionalTensor &key, const OptionalTensor &negatives, const Tensor &logit_scale, \
      const OptionalTensor &target, const OptionalTensor &mask, const OptionalTensor &query_ids,              \
      const OptionalTensor &key_ids, int64_t own, bool by_label, bool symmetric, bool normalize,              \
      double label_smoothing
#define TLK_ARGUMENTS                                                                                        \
  query, key, negatives, logit_scale, target, mask, query_ids, key_ids, own, by_label, symmetric, normalize, \
      label_smoothing

std::tuple<Tensor, Tensor> forward(TLK_PARAMETERS) {
  const Guards guards;
  Call call(TLK_ARGUMENTS);
  call.statistics();
  return {call.losses().to(call.compute), call.state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_loss, const Tensor& state, TLK_PARAMETERS,
                                                    std::array<bool, 4> wanted) {
  const Guards guards;
  Call call(TLK_ARGUMENTS);
  TORCH_CHECK_VALUE(state.scalar_type() == at::kDouble &&
                        state.numel() == (symmetric ? 2 : 1) * kStatistics * call.rows_count &&
                        grad_loss.numel() == call.rows_count,
                    "info_nce_bwd: expected the state of the forward call and a gradient per row");
  call.use_state(state.contiguous());
  const Tensor upstream = grad_loss.to(at::kDouble).contiguous();
  const double* g = upstream.const_data_ptr<double>();
  return call.gradients([g](int64_t i) { return g[i]; }, wanted);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> step(TLK_PARAMETERS, bool mean, std::array<bool, 4> wanted) {
  const Guards guards;
  Call call(TLK_ARGUMENTS);
  call.statistics();
  const double denominator = mean ? double(call.counted()) : 1;
  const Tensor loss = at::full({}, sum_in_order(call.losses()) / denominator, call.query.x.options());
  auto [by_query, by_key, by_negatives, by_scale] =
      call.gradients([denominator](int64_t) { return 1 / denominator; }, wanted);
  return {loss, by_query, by_key, by_negatives, by_scale};
}

}  // namespace

TORCH_LIBRARY_IMPL(tlkernels, CPU, m) {
  m.impl("info_nce_fwd", forward);
  m.impl("info_nce_bwd", backward);
  m.impl("info_nce_step", step);
}

}  // namespace tlk
