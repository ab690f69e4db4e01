#include "linear_sweep.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdlib>

#include "tensor.h"

namespace tlk {

using at::Tensor;

// total += a @ b, or total = a @ b for the first part, in the total's type, which may not be the operands'.
static void add_product(Tensor& total, const Tensor& a, const Tensor& b, bool first) {
  const at::ScalarType type = total.scalar_type();
  if (a.scalar_type() == type) {
    first ? at::mm_out(total, a, b) : at::addmm_out(total, total, a, b);
  } else if (a.is_cuda()) {
    first ? at::mm_out(total, a, b, type) : at::addmm_out(total, total, a, b, type);
  } else {  // the library has these products only on GPUs
    add_product(total, a.to(type), b.to(type), first);
  }
}

// Each chunk passes over the weight, and over its gradient in float32: 4096 x 4096 x 128256 bfloat16 in chunks of 256
// MB, four of 1046 rows, is 0.5 TFLOP of each product and 3 GB of the gradient, 0.6 ms of 4.5 on an H200 by the
// datasheet. If the weight's gradient is needed, which takes twice the weight's memory, a chunk may take as much as the
// weight. By reasoning on 2026-11-21, without a GPU; the Triton kernels do the same.
int64_t CudaLinearSweep::rows_of_a_chunk(const LinearLayer& layer, const CountedRows& counted, bool needs_weight,
                                         int64_t /*more_bytes*/) {
  constexpr int64_t kChunk = 256 << 20, kAligned = 128;
  const int64_t rows = counted.of(layer.input), row = row_bytes(layer);
  const char* const forced = std::getenv("TLKERNELS_CHUNK_BYTES");  // else tests would need gigabytes
  const int64_t usual = needs_weight ? std::max<int64_t>(kChunk, layer.weight.nbytes()) : kChunk;
  const int64_t bytes = forced ? std::atoll(forced) : usual;
  const int64_t most = std::max<int64_t>(1, bytes / row), chunks = (rows + most - 1) / most;
  if (chunks <= 1) return std::max<int64_t>(1, rows);
  const int64_t each = (rows + chunks - 1) / chunks;
  return (each + kAligned - 1) / kAligned * kAligned;
}

CountedRows CudaLinearSweep::count(int64_t rows, const Tensor& valid, const Tensor& used,
                                   std::optional<int64_t> num_valid) {
  CountedRows counted;
  const int64_t most = num_valid.value_or(0);
  TORCH_CHECK_VALUE(most >= 0 && most <= rows && (valid.defined() || !num_valid || most == rows),
                    "num_valid: expected the number of rows that are not ignored, of ", rows, ", got ", most);
  Tensor present = valid;  // True in rows that count, of those that are multiplied
  if (valid.defined() && num_valid && rows > 0) {
    const Tensor until = valid.cumsum(0), total = until[rows - 1];  // valid rows, this one included
    counted.miscounted = total.ne(most);
    TORCH_CHECK_VALUE(!checks_values() || !counted.miscounted.item<bool>(), "num_valid: expected ",
                      total.item<int64_t>(), ", the number of rows that are not ignored, got ", most);
    // Valid rows first. At least one is kept, so that a wrong `num_valid` of 0 can make it NaN.
    const Tensor row = at::arange(rows, until.options());
    counted.numbers = at::empty_like(row)
                          .scatter_(0, at::where(valid, until.sub(1), total.add(row).sub_(until)), row)
                          .narrow(0, 0, std::max<int64_t>(1, most));
    present = most > 0 ? Tensor() : counted.kept(valid);
  }
  if (used.defined()) {
    const Tensor kept = counted.kept(used);
    present = present.defined() ? present.logical_and(kept) : kept;
  }
  if (present.defined()) counted.absent = present.logical_not().unsqueeze(1);
  return counted;
}

CudaLinearSweep::CudaLinearSweep(const LinearLayer& layer, const CountedRows& counted, LinearNeeds needs,
                                 int64_t chunk_rows)
    : LinearSweep(layer, counted, needs, chunk_rows) {
  const Tensor &input = layer.input, &weight = layer.weight;
  const int64_t rows = counted.of(input), classes = layer.classes();
  logits_ = at::empty({std::min(rows, chunk_rows), classes}, input.options());
  const at::ScalarType wide = compute_type(weight.scalar_type());
  if (needs[0])
    grad_input_ = counted.numbers.defined() ? at::zeros_like(input, at::MemoryFormat::Contiguous)
                                            : at::empty(input.sizes(), input.options());
  if (needs[1]) {  // chunks are summed in the compute type; one chunk needs no sum
    const at::TensorOptions options = weight.options().dtype(rows <= chunk_rows ? weight.scalar_type() : wide);
    grad_weight_ = at::empty(weight.sizes(), options);
  }
  if (needs[2]) grad_bias_ = at::empty({classes}, weight.options().dtype(wide));
  for (Tensor* sum : {&grad_weight_, &grad_bias_})
    if (rows == 0 && sum->defined()) sum->zero_();  // otherwise the first chunk writes it
}

Tensor CudaLinearSweep::logits(int64_t begin, int64_t end) {
  x_ = counted_.part(layer_.input, begin, end);
  Tensor chunk = logits_.narrow(0, 0, end - begin);
  if (layer_.bias.defined())
    at::addmm_out(chunk, layer_.bias, x_, layer_.weight.t());
  else
    at::mm_out(chunk, x_, layer_.weight.t());
  return chunk;
}

void CudaLinearSweep::take(int64_t begin, int64_t end, const Tensor& gradient) {
  const Tensor absent = counted_.absent.defined() ? counted_.absent.narrow(0, begin, end - begin) : Tensor();
  if (needs_[0]) {
    Tensor result = input_gradient(begin, end, gradient.scalar_type());
    at::mm_out(result, gradient, layer_.weight);
    if (absent.defined()) result.masked_fill_(absent, 0);  // the products make NaN of 0 * NaN
    put_input_gradient(begin, end, result);
  }
  if (needs_[1] && absent.defined()) x_ = x_.masked_fill(absent, 0);
  const bool first = begin == 0;
  if (needs_[1]) add_product(grad_weight_, gradient.t(), x_, first);
  if (!needs_[2]) return;
  if (first)
    at::sum_out(grad_bias_, gradient, {0}, /*keepdim=*/false, grad_bias_.scalar_type());
  else
    grad_bias_.add_(at::sum(gradient, {0}, /*keepdim=*/false, grad_bias_.scalar_type()));
}

}  // namespace tlk
