// InfoNCE on CUDA tensors: two sweeps over the matrix of similarities in panels of rows, so that it never exists whole.
// Four products of N*K*D for the symmetric loss: the sweep of statistics, the sweep of the similarities' gradients, and
// the two products with each panel of those, which are the library's. The host never waits for the device.
#include "cuda.cuh"
#include "cuda_rows.cuh"

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "cuda_call.h"
#include "ops.h"

namespace tlk {
namespace {

using namespace contrastive;
using at::Tensor;

// Some columns of the matrix: the keys, or further negatives.
struct Part {
  const Operands* columns;  // null: each row has its own
  int64_t size, first;
  bool keys;  // or negatives
  Way way;
  Tensor panel;  // of rows: similarities from the library, or in the second sweep their gradient

  int64_t tile() const { return tile_of(way); }
  int64_t tiles(int64_t items) const { return (items + tile() - 1) / tile(); }
};

// A call, with the tensors that the kernels' pointers point into.
struct CudaInfoNceCall {
  const InfoNceArguments& given;
  const OnDevice device;
  const cudaStream_t stream;
  const at::ScalarType compute;
  const int64_t rows, keys;
  const bool paired, symmetric;
  const Set set;
  at::ScalarType dtype;  // of the operands
  int64_t panel_rows;
  Tensor scale, target, mask, row_ids, column_ids, state;
  Operands query, key, negatives;
  PerQueryOperands per_query;
  std::vector<Part> parts;

  explicit CudaInfoNceCall(const InfoNceArguments& arguments)
      : given(arguments),
        device(given.query),
        stream(device.stream()),
        compute(given.compute()),
        rows(given.rows()),
        keys(given.keys()),
        paired(given.paired()),
        symmetric(given.symmetric),
        set(given.set()) {
    given.check();
    dtype = given.query.scalar_type();
    for (const auto* x : {&given.key, &given.negatives})
      if (*x) dtype = at::promote_types(dtype, (*x)->scalar_type());
    const Tensor& q = given.query;
    scale = given.logit_scale.to(q.options().dtype(at::kDouble));
    const auto integers = q.options().dtype(at::kLong);
    if (given.target) target = given.target->to(integers).contiguous();
    check_target();
    mask = given.mask.value_or(Tensor());
    if (given.query_ids) row_ids = given.query_ids->to(integers).contiguous();
    if (given.query_ids) column_ids = given.ids_of_keys().to(integers).contiguous();

    query = Operands(q, dtype, given.normalize, stream);
    if (!paired) key = Operands(*given.key, dtype, given.normalize, stream);
    Device on;
    check_launch(current_device(on), "info_nce");
    const int64_t most = std::max<int64_t>(keys, given.classes() - keys);
    const int64_t tiles = (rows + kLargeTile - 1) / kLargeTile * ((most + kLargeTile - 1) / kLargeTile);
    const bool large = tiles >= 2 * on.multiprocessors;  // two blocks fit on each
    const Way known = compute == at::kDouble ? Way::known_f64 : Way::known_f32;
    const Way way = dtype == at::kBFloat16 ? (large ? Way::large_bf16 : Way::small_bf16)
                    : dtype == at::kHalf   ? (large ? Way::large_f16 : Way::small_f16)
                                           : known;
    parts.push_back({paired ? &query : &key, keys, 0, true, way, {}});
    if (given.negatives && given.negatives->dim() == 2) {
      negatives = Operands(*given.negatives, dtype, given.normalize, stream);
      parts.push_back({&negatives, negatives.rows(), keys, false, way, {}});
    } else if (given.negatives) {
      per_query = PerQueryOperands(*given.negatives, query, stream);
      parts.push_back({nullptr, per_query.x.size(1), keys, false, known, {}});
    }
    // A panel's tiles are many for each multiprocessor, and its product by the columns is large beside the sum over
    // panels in memory; it grows with the features as the operands do.
    const int64_t few = 16 * on.multiprocessors, many = 32 * on.multiprocessors;
    const int64_t goal = std::min(std::max(4 * q.size(1), few), many);
    panel_rows = (goal + kLargeTile - 1) / kLargeTile * kLargeTile;
  }

  // Raises with TLKERNELS_CHECK=1 if a target is no column. Without the check, its loss is NaN.
  void check_target() const {
    if (given.by_label || !checks_values()) return;
    const Tensor columns = target.defined() ? target : at::arange(rows, given.query.options().dtype(at::kLong));
    const Tensor bad = columns.lt(0).logical_or_(columns.ge(given.classes()));
    if (!bad.any().item<bool>()) return;
    const int64_t i = bad.nonzero()[0].item<int64_t>();
    TORCH_CHECK_INDEX(false, "target: expected indices of keys in [0, ", given.classes(), "), got ",
                      columns[i].item<int64_t>(), " at position ", i);
  }

  template <class Launch>
  void in_compute(Launch launch) const {
    with_type(compute, [&](auto type) {
      using T = typename decltype(type)::T;
      if constexpr (std::is_same_v<T, Compute<T>>) check_launch(launch(type), "info_nce");
    });
  }

  Tensor empty(at::IntArrayRef sizes, at::ScalarType type) const {
    return at::empty(sizes, given.query.options().dtype(type));
  }

  // Calls visit(begin, end) for every panel of rows.
  template <class Visit>
  void each_panel(Visit visit) const {
    for (int64_t begin = 0; begin < rows; begin += panel_rows) visit(begin, std::min(begin + panel_rows, rows));
  }

  // Allocates a part's panel where one is needed. Its rows are whole tiles, so that each begins aligned.
  void make_panel(Part& part, bool gradient) const {
    if (!gradient && (is_narrow(dtype) || !part.columns)) return;
    const at::ScalarType type = part.columns ? dtype : compute;
    part.panel = empty({std::min(panel_rows, rows), part.tiles(part.size) * part.tile()}, type);
  }
  Tensor panel_of(const Part& part, int64_t begin, int64_t end) const {
    return part.panel.narrow(0, 0, end - begin).narrow(1, 0, part.size);
  }

  InfoNceTiles tiles_of(const Part& part, int64_t begin, int64_t end) const {
    InfoNceTiles p;
    SimilarityTiles& s = p.similarity;
    if (part.columns) {
      s.rows = query.x.const_data_ptr(), s.row_stride = query.x.stride(0);
      s.columns = part.columns->x.const_data_ptr(), s.column_stride = part.columns->x.stride(0);
      s.features = int(query.x.size(1));
      s.row_norms = query.inverse_norms(), s.column_norms = part.columns->inverse_norms();
      if (!is_narrow(dtype)) {
        Tensor out = panel_of(part, begin, end);
        at::mm_out(out, query.x.narrow(0, begin, end - begin), part.columns->x.t());
        s.known = out.const_data_ptr(), s.known_stride = out.stride(0);
      }
    } else {
      s.known = per_query.similarities.select(0, begin).const_data_ptr(), s.known_stride = part.size;
    }
    s.first_row = int(begin), s.end_row = int(end), s.column_count = int(part.size);
    Entries& e = p.entries;
    e.set = set;
    e.target = target.defined() ? target.const_data_ptr<int64_t>() : nullptr;
    e.first_column = int(part.first);
    if (mask.defined() && (part.keys || mask.size(1) > keys)) {
      e.mask_row = mask.stride(0), e.mask_column = mask.stride(1);
      e.mask = mask.const_data_ptr<bool>() + part.first * e.mask_column;
    }
    if (part.keys) {
      e.self_column = int(given.self_column);
      e.row_ids = row_ids.defined() ? row_ids.const_data_ptr<int64_t>() : nullptr;
      e.column_ids = column_ids.defined() ? column_ids.const_data_ptr<int64_t>() : nullptr;
    }
    p.scale = scale.const_data_ptr<double>();
    return p;
  }

  // The first sweep: the state (directions, kStatistics, rows).
  void statistics() {
    state = empty({symmetric ? 2 : 1, kStatistics, rows}, at::kDouble);
    double* const to = state.mutable_data_ptr<double>();
    check_launch(info_nce_start(to, symmetric ? 2 : 1, rows, stream), "info_nce");
    const int64_t kinds = kinds_of(set), most = std::min(panel_rows, rows);
    int64_t tiles = 0;
    for (Part& part : parts) tiles += part.tiles(part.size), make_panel(part, /*gradient=*/false);
    const Part& first = parts.front();
    const Tensor by_row = empty({tiles, kinds, most}, compute);
    Tensor by_column;
    if (symmetric || paired) by_column = empty({first.tiles(most), kinds, keys}, compute);
    each_panel([&](int64_t begin, int64_t end) {
      const int skipped = paired ? int(begin / first.tile()) : 0;
      int64_t offset = 0;
      for (const Part& part : parts) {
        InfoNceTiles p = tiles_of(part, begin, end);
        p.skipped_tiles = skipped, p.paired = paired;
        p.positive = to + 3 * rows;
        p.parts.by_row = by_row.mutable_data_ptr(), p.parts.row_items = most;
        if (part.keys && by_column.defined()) p.parts.by_column = by_column.mutable_data_ptr();
        p.parts.column_items = keys, p.parts.first_tile = int(offset);
        check_launch(info_nce_statistics(p, part.way, stream), "info_nce");
        offset += part.tiles(part.size);
      }
      Fold fold;
      fold.state = to, fold.rows = rows, fold.tile = int(first.tile()), fold.with_set = set != Set::none;
      if (by_column.defined()) {
        fold.parts = by_column.const_data_ptr(), fold.items_stride = keys, fold.direction = symmetric ? 1 : 0;
        fold.first = 0, fold.items = int(keys), fold.tiles = int(first.tiles(end - begin)), fold.first_tile = skipped;
        fold.side = paired ? -1 : 0;
        in_compute([&](auto type) { return info_nce_fold<typename decltype(type)::T>(fold, stream); });
      }
      fold.parts = by_row.const_data_ptr(), fold.items_stride = most, fold.direction = 0;
      fold.first = int(begin), fold.items = int(end - begin), fold.tiles = int(tiles), fold.first_tile = 0;
      fold.side = paired ? 1 : 0;
      in_compute([&](auto type) { return info_nce_fold<typename decltype(type)::T>(fold, stream); });
    });
  }

  InfoNceRows numbers() const {
    InfoNceRows p;
    p.rows = rows, p.classes = given.classes(), p.set = set, p.symmetric = symmetric;
    p.smoothing = given.label_smoothing, p.scale = scale.const_data_ptr<double>();
    p.target = target.defined() ? target.const_data_ptr<int64_t>() : nullptr;
    p.state = state.mutable_data_ptr<double>();
    return p;
  }

  Tensor losses() const {
    const Tensor loss = empty({rows}, compute);
    InfoNceRows p = numbers();
    p.loss = loss.mutable_data_ptr();
    in_compute([&](auto type) { return info_nce_losses<typename decltype(type)::T>(p, stream); });
    return loss;
  }

  void use_state(const Tensor& of_forward) { state = of_forward; }

  // The sum or mean of the losses, and its gradient by each of them.
  std::tuple<Tensor, Tensor> reduced(bool mean) const {
    Tensor factor = at::full({}, mean ? 1.0 / double(rows) : 1.0, state.options());
    if (mean && given.by_label)  // the mean of the rows that have a positive
      factor = state.select(0, 0).select(0, kStatistics - 1).gt(0).sum().to(at::kDouble).reciprocal();
    return {losses().sum(at::kDouble).mul(factor).to(compute), factor.to(compute).expand({rows})};
  }

  // For float16: a power of two that brings gradients of this upstream, or a sum of two, into its range. Else
  // undefined.
  Tensor range_of(const Tensor& upstream) const {
    if (dtype != at::kHalf) return {};
    const Tensor exponent = std::get<1>(at::frexp(upstream.abs().amax().to(at::kFloat)));
    return at::exp2(at::clamp(13 - exponent, -100, 100).to(at::kDouble));
  }

  // A gradient where there are no rows, or where it is not needed.
  Tensor no_gradient(const Tensor& of, bool needed) const {
    return needed ? at::zeros(of.sizes(), of.options()) : at::empty({0}, given.query.options());
  }

  // The second sweep. `grad_loss`: one for each row.
  InfoNceGradients gradients(const Tensor& grad_loss, std::array<bool, 4> needs) {
    const Tensor upstream = grad_loss.to(compute);
    const std::array<const Tensor*, 3> inputs{&given.query, given.key ? &*given.key : nullptr,
                                              given.negatives ? &*given.negatives : nullptr};
    std::array<Tensor, 3> grads;
    for (size_t i = 0; i < 3; ++i) {
      needs[i] = needs[i] && inputs[i];
      if (rows == 0 || !needs[i])
        grads[i] = no_gradient(needs[i] ? *inputs[i] : given.query, needs[i]);
      else
        grads[i] = at::empty(inputs[i]->sizes(), inputs[i]->options().dtype(dtype));
    }
    if (rows == 0) return {grads[0], grads[1], grads[2], at::zeros({}, given.logit_scale.options())};
    const Tensor extra = range_of(upstream);
    const double* const times = extra.defined() ? extra.const_data_ptr<double>() : nullptr;
    const Tensor slopes = empty({symmetric ? 2 : 1, kSlopes, rows}, compute);
    const Tensor by_scale = empty({symmetric ? 2 : 1, rows}, at::kDouble);
    InfoNceRows p = numbers();
    p.upstream = upstream.const_data_ptr(), p.upstream_stride = upstream.stride(0), p.extra = times;
    p.by_row = slopes[0].mutable_data_ptr(), p.by_column = symmetric ? slopes[1].mutable_data_ptr() : nullptr;
    p.by_scale = by_scale.mutable_data_ptr<double>();
    in_compute([&](auto type) { return info_nce_slopes<typename decltype(type)::T>(p, stream); });
    if (needs[0] || needs[1] || needs[2]) from_panels(slopes, times, needs, grads);
    for (size_t i = 0; i < 3; ++i)
      if (needs[i]) grads[i] = grads[i].to(inputs[i]->scalar_type());
    return {grads[0], grads[1], grads[2], by_scale.sum().to(given.logit_scale.options())};
  }

  void from_panels(const Tensor& slopes, const double* extra, const std::array<bool, 4>& needs,
                   std::array<Tensor, 3>& grads) {
    const double* const times = scale.const_data_ptr<double>();
    std::array<Tensor, 2> totals;
    const auto needed = [&](size_t k) { return parts[k].size > 0 && (needs[0] || needs[k + 1]); };
    for (size_t k = 0; k < parts.size(); ++k)
      if (needed(k)) make_panel(parts[k], /*gradient=*/true);
    each_panel([&](int64_t begin, int64_t end) {
      Tensor total;  // of the rows
      for (size_t k = 0; k < parts.size(); ++k) {
        if (!needed(k)) continue;
        const Part& part = parts[k];
        InfoNceTiles p = tiles_of(part, begin, end);
        p.slopes.items = rows, p.slopes.by_row = slopes[0].const_data_ptr();
        if (part.keys && symmetric) p.slopes.by_column = slopes[1].const_data_ptr();
        if (part.keys && paired) p.slopes.by_column = p.slopes.by_row;
        p.panel = part.panel.mutable_data_ptr(), p.panel_stride = part.panel.stride(0);
        check_launch(info_nce_gradient(p, part.way, stream), "info_nce");
        const Tensor panel = panel_of(part, begin, end);
        if (!part.columns) {
          if (needs[0] && !total.defined()) total = at::zeros({end - begin, query.features()}, panel.options());
          per_query.gradients(query, panel, begin, total, needs[2] ? grads[2] : Tensor(), times, extra, stream);
          continue;
        }
        if (needs[0]) total = product(panel, part.columns->values(), total);
        if (needs[k + 1]) totals[k] = product(panel.t(), query.values().narrow(0, begin, end - begin), totals[k]);
      }
      if (!needs[0]) return;
      if (!total.defined()) total = at::zeros({end - begin, query.features()}, slopes.options());
      query.finish(total, grads[0], begin, times, extra, stream);
    });
    for (size_t k = 0; k < parts.size(); ++k)
      if (totals[k].defined()) parts[k].columns->finish(totals[k], grads[k + 1], 0, times, extra, stream);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(tlkernels, CUDA, m) { InfoNceOps<CudaInfoNceCall>::implement(m); }

}  // namespace tlk
