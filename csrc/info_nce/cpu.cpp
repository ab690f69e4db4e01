// InfoNCE on CPU tensors: a sweep of statistics over the tiles of the similarities, and one of gradients.
#include <ATen/ATen.h>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>

#include "call.h"
#include "../core/cpu/similarity.h"
#include "../core/cpu/tensor.h"
#include "ops.h"

namespace tlk {

TLK_KERNELS(InfoNceTable, info_nce)

namespace {

using at::Tensor;

// Embeddings in the compute type, normalized where asked, and their gradient.
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
    const auto kernel = info_nce_kernels()(scalar_of(from.scalar_type()), Set::none).normalize;
    in_parallel(norm.numel(), from.size(-1), [&](int64_t begin, int64_t end) {
      kernel(from.const_data_ptr(), x.mutable_data_ptr(), norm.mutable_data_ptr<double>(), from.size(-1), begin, end);
    });
  }

  void make_gradient() { grad = empty_gradient(x).zero_(); }

  // The gradient of `given`; without elements where not needed.
  Tensor gradient(const Tensor& like) const {
    if (!grad.defined()) return at::empty({0}, like.options());
    if (norm.defined()) {
      const auto kernel = info_nce_kernels()(scalar_of(x.scalar_type()), Set::none).normalize_backward;
      in_parallel(norm.numel(), x.size(-1), [&](int64_t begin, int64_t end) {
        kernel(grad.mutable_data_ptr(), x.const_data_ptr(), norm.const_data_ptr<double>(), x.size(-1), begin, end);
      });
    }
    return grad.to(given.scalar_type());
  }
};

// A call: keeps the tensors that the kernel's pointers point into.
struct CpuInfoNceCall : InfoNce {
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

  explicit CpuInfoNceCall(const InfoNceArguments& given)
      : symmetric(given.symmetric),
        paired(given.paired()),
        smoothing(given.label_smoothing),
        query_given(given.query),
        logit_scale(given.logit_scale) {
    given.check();
    compute = given.compute();
    scale = rounded(logit_scale.item<double>());
    set = given.set();
    self_column = given.self_column;

    query = Embeddings(given.query, compute, given.normalize);
    rows_count = given.rows();
    columns_count = given.keys();
    std::vector<Part> parts;
    if (!paired) key = Embeddings(*given.key, compute, given.normalize);
    parts.push_back({paired ? query.x : key.x, {}, 0, true});
    if (given.negatives) {
      negatives = Embeddings(*given.negatives, compute, given.normalize);
      parts.push_back({negatives.x, {}, columns_count, false});
    }
    similarity.emplace(query.x, std::move(parts), paired, symmetric);
    kernel = info_nce_kernels()(scalar_of(compute), set);
    if (!given.by_label) use_target(given);
    if (given.mask) use_mask(*given.mask);
    if (given.query_ids) use_ids(*given.query_ids, given.ids_of_keys());
  }

  void use_target(const InfoNceArguments& given) {
    const int64_t classes = given.classes();
    target_ = given.target ? given.target->to(at::kLong).contiguous()
                           : at::arange(rows_count, query_given.options().dtype(at::kLong));
    target = target_.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < rows_count; ++i)
      TORCH_CHECK_INDEX(target[i] >= 0 && target[i] < classes, "target: expected indices of keys in [0, ", classes,
                        "), got ", target[i], " at position ", i);
    for (int64_t i = 0; paired && i < rows_count; ++i)
      TORCH_CHECK_VALUE(target[target[i]] == i, "target: expected pairs of rows without key, got ", target[i], " for ",
                        i, " and ", target[target[i]], " for ", target[i]);
  }

  void use_mask(const Tensor& given) {
    mask_ = given.stride(1) == 1 || given.size(1) < 2 ? given : given.contiguous();
    mask = mask_.const_data_ptr<bool>();
    mask_stride = mask_.stride(0);
    mask_has_negatives = given.size(1) > columns_count;
  }

  // Ids are only compared, so they are replaced by small integers, which fit into a vector's lanes.
  void use_ids(const Tensor& query_ids, const Tensor& of_keys) {
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
    similarity->each_tile([&](const Part& part, const Tile& tile) {
      similarity->product(part, tile);
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

  // In the compute type, as the kernels see it.
  double rounded(double x) const { return compute == at::kDouble ? x : double(float(x)); }

  // The softmax of one row, its exponentials relative to `top`. `share_count` includes the positive.
  struct Softmax {
    double top, others, moment, positive, positive_logit, share_count;
    double total() const { return others + positive; }
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
    const double loss =
        s.others <= s.positive ? std::log1p(s.others / s.positive) : std::log(s.total()) + (s.top - s.positive_logit);
    if (smoothing == 0) return loss;
    const double mean = (scale * d.set_sum[i] + s.positive_logit) / s.share_count;
    return loss + smoothing * (s.positive_logit - mean);
  }

  // The loss of each row, in float64.
  Tensor wide_losses() const {
    Tensor result = at::empty({rows_count}, state.options());
    double* out = result.mutable_data_ptr<double>();
    for (int64_t i = 0; i < rows_count; ++i) {
      out[i] = loss(rows, i);
      if (symmetric) out[i] = (out[i] + loss(columns, i)) / 2;
    }
    return result;
  }

  Tensor losses() const { return wide_losses().to(compute); }

  // The sum or mean of the losses, and its gradient by each of them.
  std::tuple<Tensor, Tensor> reduced(bool mean) const {
    const double denominator = mean ? double(counted()) : 1;
    return {at::scalar_tensor(sum_in_order(wide_losses()) / denominator, query.x.options()),
            at::scalar_tensor(1 / denominator, state.options())};
  }

  // The number of rows in the mean.
  int64_t counted() const {
    if (set != Set::label) return rows_count;
    return std::count_if(rows.set_count, rows.set_count + rows_count, [](double n) { return n > 0; });
  }

  // The slopes of one direction. Adds to the gradient of the scale.
  template <class A>
  Slope slope(const Direction& d, Tensor& memory, const PerPosition& upstream) {
    memory = at::empty({kSlopes, rows_count}, query.x.options());
    A* const out = memory.mutable_data_ptr<A>();
    A *top = out, *factor = top + rows_count, *share = factor + rows_count, *positive = share + rows_count;
    for (int64_t i = 0; i < rows_count; ++i) {
      const Softmax s = softmax(d, i);
      if (set == Set::label && s.share_count == 0) {  // a top so large that no exponential overflows
        top[i] = A(1e30), factor[i] = share[i] = positive[i] = 0;
        continue;
      }
      const double g = static_cast<const double*>(upstream.data)[i * upstream.stride] / (symmetric ? 2 : 1);
      const double of_set = set == Set::label ? 1 : set == Set::all ? smoothing : 0;
      const double each = of_set == 0 ? 0 : of_set / s.share_count;
      const double of_positive = target ? smoothing - each - s.others / s.total() : 0;
      top[i] = A(s.top);
      factor[i] = A(g / s.total());
      share[i] = A(g * each);
      positive[i] = A(g * of_positive);
      by_scale_ += g * (s.moment / s.total() - each * d.set_sum[i] + of_positive * d.positive[i]);
    }
    return {top, factor, share, positive};
  }

  // The second sweep. `grad_loss`: one for each row, or one for all.
  InfoNceGradients gradients(const Tensor& grad_loss, std::array<bool, 4> needs) {
    Tensor wide = grad_loss.to(at::kDouble);
    const PerPosition upstream = per_position(wide);
    compute == at::kDouble ? set_slopes<double>(upstream) : set_slopes<float>(upstream);
    if (needs[0]) query.make_gradient();
    if (needs[1] && !paired) key.make_gradient();
    if (needs[2] && negatives.x.defined()) negatives.make_gradient();
    similarity->rows_grad = query.grad;
    similarity->parts.front().grad = paired ? query.grad : key.grad;
    similarity->parts.back().grad = negatives.x.defined() ? negatives.grad : similarity->parts.front().grad;
    reads_positive = false;
    similarity->each_tile([&](const Part& part, const Tile& tile) {
      if (!similarity->rows_grad.defined() && !part.grad.defined()) return;
      if (!tile_is_kept) similarity->product(part, tile);
      in_parallel(tile.rows, tile.columns,
                  [&](int64_t begin, int64_t end) { kernel.gradient(*this, tile, begin, end); });
      similarity->accumulate(part, tile, scale);
    });
    return {query.gradient(query_given), key.gradient(query_given), negatives.gradient(query_given),
            at::scalar_tensor(by_scale_, logit_scale.options())};
  }

 private:
  template <class A>
  void set_slopes(const PerPosition& upstream) {
    row_slope = slope<A>(rows, row_slopes_, upstream);
    if (symmetric || paired) column_slope = symmetric ? slope<A>(columns, column_slopes_, upstream) : row_slope;
  }

  Tensor row_slopes_, column_slopes_;
  double by_scale_ = 0;
};

}  // namespace

TORCH_LIBRARY_IMPL(tlkernels, CPU, m) { InfoNceOps<CpuInfoNceCall>::implement(m); }

}  // namespace tlk
