#include "linear_sweep.h"

#include <algorithm>
#include <cstdlib>

#include "tensor.h"

namespace tlk {

using at::Tensor;

CountedRows CpuLinearSweep::count(int64_t rows, const Tensor& valid, const Tensor& used,
                                  std::optional<int64_t> num_valid) {
  if (num_valid) {
    const int64_t counted = valid.defined() ? valid.sum().item<int64_t>() : rows;
    TORCH_CHECK_VALUE(*num_valid == counted, "num_valid: expected ", counted,
                      ", the number of rows that are not ignored, got ", *num_valid);
  }
  const Tensor both = !valid.defined() ? used : used.defined() ? valid.logical_and(used) : valid;
  if (!both.defined()) return {};
  const Tensor numbers = both.nonzero().squeeze(1);
  return numbers.size(0) == rows ? CountedRows() : CountedRows{numbers, {}, {}};
}

int64_t CpuLinearSweep::rows_of_a_chunk(const LinearLayer& layer, const CountedRows& counted, bool /*needs_weight*/,
                                        int64_t more_bytes) {
  // Each chunk reads and writes the weight's gradient once, so chunks are as few as memory allows. Measured for the
  // three products alone in float32, against one chunk: 2048 x 384 x 30522 in chunks of 128, 256, 512, 1024 rows 1.28,
  // 1.14, 1.04, 1.0; 512 x 1024 x 128256 in 64, 128, 256 rows 1.6, 1.17, 1.06. With this size they get 683 and 205
  // rows, and the latter 160 MB with the products' packed operands (measured: 38 MB).
  constexpr int64_t kChunk = 112 << 20;
  const char* const forced = std::getenv("TLKERNELS_CHUNK_BYTES");  // else tests would need gigabytes
  const int64_t bytes = forced ? std::atoll(forced) : kChunk;
  const int64_t rows = counted.of(layer.input), most = std::max<int64_t>(1, bytes / (row_bytes(layer) + more_bytes));
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

CpuLinearSweep::CpuLinearSweep(const LinearLayer& layer, const CountedRows& counted, LinearNeeds needs,
                               int64_t chunk_rows)
    : LinearSweep(layer, counted, needs, chunk_rows),
      type_(logits_type(layer.input.scalar_type())),
      bias_(layer.bias.defined() ? layer.bias.to(type_) : layer.bias),
      classes_(layer.classes()),
      tile_(classes_of_a_tile(layer)) {
  const Tensor &input = layer.input, &weight = layer.weight;
  const int64_t rows = counted.of(input);
  logits_ = empty_gradient({std::min(rows, chunk_rows), classes_}, input.options().dtype(type_));
  const at::ScalarType wide = compute_type(weight.scalar_type());
  if (needs[0]) grad_input_ = empty_gradient(input);
  if (needs[0] && counted.numbers.defined()) grad_input_.zero_();
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

Tensor CpuLinearSweep::logits(int64_t begin, int64_t end) {
  x_ = counted_.part(layer_.input, begin, end).to(type_);
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
  if (needs_[0]) {
    Tensor sum = input_gradient(begin, end, type_);
    for_tiles([&](int64_t k, int64_t n, const Tensor& weight) {
      const Tensor part = gradient.narrow(1, k, n);
      if (k == 0)
        at::mm_out(sum, part, weight);
      else
        at::addmm_out(sum, sum, part, weight);
    });
    put_input_gradient(begin, end, sum);
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
