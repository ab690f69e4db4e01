#include "linear_sweep.h"

#include <ATen/Dispatch.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "tensor.h"

namespace tlk {

using at::Tensor;

int64_t CpuLinearSweep::rows_of_a_chunk(const LinearLayer& layer, bool /*needs_weight*/, int64_t more_bytes) {
  // Each chunk reads and writes the weight's gradient once, so chunks are as few as memory allows. Measured for the
  // three products alone in float32, against one chunk: 2048 x 384 x 30522 in chunks of 128, 256, 512, 1024 rows 1.28,
  // 1.14, 1.04, 1.0; 512 x 1024 x 128256 in 64, 128, 256 rows 1.6, 1.17, 1.06. With this size they get 683 and 205
  // rows, and the latter 160 MB with the products' packed operands (measured: 38 MB).
  constexpr int64_t kChunk = 112 << 20;
  const char* const forced = std::getenv("TLKERNELS_CHUNK_BYTES");  // else tests would need gigabytes
  const int64_t bytes = forced ? std::atoll(forced) : kChunk;
  const int64_t rows = layer.rows(), most = std::max<int64_t>(1, bytes / (row_bytes(layer) + more_bytes));
  const int64_t count = std::max<int64_t>(1, (rows + most - 1) / most);
  return std::max<int64_t>(1, (rows + count - 1) / count);
}

// A tile of a 16-bit weight in float32 is used at once, from the cache behind the second level, and is still large
// enough for a product to run at full rate.
static int64_t classes_of_a_tile(const LinearLayer& layer) {
  constexpr int64_t kTile = 4 << 20;
  return std::clamp<int64_t>(kTile / 4 / std::max<int64_t>(1, layer.input.size(1)), 64,
                             std::max<int64_t>(64, layer.classes()));
}

int64_t CpuLinearSweep::row_bytes(const LinearLayer& layer) {
  return layer.classes() * int64_t(c10::elementSize(logits_type(layer.input.scalar_type())));
}

at::ScalarType CpuLinearSweep::logits_type(at::ScalarType dtype) {
  if (dtype == at::kHalf) return at::kFloat;  // measured without AVX512-FP16: 10 to 200 times slower than float32
  if (dtype != at::kBFloat16) return dtype;
  if (const char* forced = std::getenv("TLKERNELS_BF16_GEMM")) return forced[0] == '1' ? at::kBFloat16 : at::kFloat;
#if defined(__x86_64__)
  // Measured: with AVX512-BF16 2 to 2.5 times float32's rate, without it a quarter.
  return __builtin_cpu_supports("avx512bf16") ? at::kBFloat16 : at::kFloat;
#else
  return at::kFloat;
#endif
}

// Whether a row has neither NaN nor infinity.
static bool is_finite(const Tensor& rows, int64_t row) {
  const int64_t features = rows.size(1), stride = rows.stride(1);
  int all = 1;
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, rows.scalar_type(), "linear: is_finite", [&] {
    const scalar_t* const x = rows.const_data_ptr<scalar_t>() + row * rows.stride(0);
    for (int64_t k = 0; k < features; ++k) all &= x[k * stride] - x[k * stride] == scalar_t(0);
  });
  return all;
}

static void clear(const Tensor& rows, int64_t row) {
  const size_t bytes = size_t(rows.size(1)) * rows.element_size();
  std::memset(static_cast<char*>(rows.mutable_data_ptr()) + size_t(row) * bytes, 0, bytes);
}

CpuLinearSweep::CpuLinearSweep(const LinearLayer& layer, LinearNeeds needs, Absent absent, int64_t chunk_rows)
    : LinearSweep(layer, needs, chunk_rows),
      type_(logits_type(layer.input.scalar_type())),
      bias_(layer.bias.defined() ? layer.bias.to(type_) : layer.bias),
      classes_(layer.classes()),
      tile_(classes_of_a_tile(layer)),
      absent_(std::move(absent)) {
  const Tensor &input = layer.input, &weight = layer.weight;
  const int64_t rows = layer.rows();
  logits_ = empty_gradient({std::min(rows, chunk_rows), classes_}, input.options().dtype(type_));
  const at::ScalarType wide = compute_type(weight.scalar_type());
  if (needs[0]) grad_input_ = empty_gradient(input);
  if (needs[1]) {  // chunks are summed in the compute type; one chunk needs no sum
    const bool kept = rows <= chunk_rows || wide == weight.scalar_type();
    grad_weight_ = kept ? empty_gradient(weight) : empty_gradient(weight.sizes(), weight.options().dtype(wide));
    if (rows == 0) grad_weight_.zero_();
  }
  if (needs[2]) grad_bias_ = at::zeros({classes_}, weight.options().dtype(wide));
}

// Calls body(first class, their number, their weights in type_).
template <class Body>
void CpuLinearSweep::for_tiles(Body body) {
  if (type_ == layer_.weight.scalar_type()) return body(0, classes_, layer_.weight);
  for (int64_t k = 0; k < classes_; k += tile_) {
    const int64_t n = std::min(tile_, classes_ - k);
    body(k, n, layer_.weight.narrow(0, k, n).to(type_));
  }
}

// The absent rows of a chunk, counted from its first.
std::vector<int64_t> CpuLinearSweep::absent_of(int64_t begin, int64_t end) const {
  std::vector<int64_t> rows;
  for (auto row = std::lower_bound(absent_.begin(), absent_.end(), begin); row != absent_.end() && *row < end; ++row)
    rows.push_back(*row - begin);
  return rows;
}

Tensor CpuLinearSweep::logits(int64_t begin, int64_t end) {
  x_ = layer_.input.narrow(0, begin, end - begin).to(type_);
  Tensor chunk = logits_.narrow(0, 0, end - begin);
  for_tiles([&](int64_t k, int64_t n, const Tensor& weight) {
    Tensor out = chunk.narrow(1, k, n);
    if (bias_.defined())
      at::addmm_out(out, bias_.narrow(0, k, n), x_, weight.t());
    else
      at::mm_out(out, x_, weight.t());
  });
  return chunk;
}

void CpuLinearSweep::take(int64_t begin, int64_t end, const Tensor& gradient) {
  const std::vector<int64_t> absent = absent_of(begin, end);
  const auto is_bad = [&](int64_t row) { return !is_finite(x_, row); };
  if (needs_[1] && std::any_of(absent.begin(), absent.end(), is_bad)) {
    x_ = x_.clone(at::MemoryFormat::Contiguous);
    for (const int64_t row : absent) clear(x_, row);
  }
  if (needs_[0]) {
    Tensor result = grad_input_.narrow(0, begin, end - begin);
    Tensor sum = type_ == result.scalar_type() ? result : at::empty(result.sizes(), result.options().dtype(type_));
    for_tiles([&](int64_t k, int64_t n, const Tensor& weight) {
      const Tensor part = gradient.narrow(1, k, n);
      if (k == 0)
        at::mm_out(sum, part, weight);
      else
        at::addmm_out(sum, sum, part, weight);
    });
    if (!sum.is_same(result)) result.copy_(sum);
    for (const int64_t row : absent) clear(result, row);
  }
  if (needs_[1] && grad_weight_.scalar_type() == type_) {
    if (begin == 0)
      at::mm_out(grad_weight_, gradient.t(), x_);
    else
      at::addmm_out(grad_weight_, grad_weight_, gradient.t(), x_);
  } else if (needs_[1]) {  // the product's type is not the sum's
    for (int64_t k = 0; k < classes_; k += tile_) {
      const int64_t n = std::min(tile_, classes_ - k);
      const Tensor part = at::mm(gradient.narrow(1, k, n).t(), x_);
      Tensor sum = grad_weight_.narrow(0, k, n);
      begin == 0 ? sum.copy_(part) : sum.add_(part);
    }
  }
  if (needs_[2]) grad_bias_.add_(at::sum(gradient, {0}, /*keepdim=*/false, grad_bias_.scalar_type()));
}

LinearGradients CpuLinearSweep::gradients() {
  if (needs_[1] && grad_weight_.scalar_type() != layer_.weight.scalar_type())
    grad_weight_ = empty_gradient(layer_.weight).copy_(grad_weight_);
  return LinearSweep::gradients();
}

}  // namespace tlk
