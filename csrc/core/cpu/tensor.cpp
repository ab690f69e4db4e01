#include "tensor.h"

#include <torch/library.h>

#include <limits>

#include "pool.h"

namespace tlk {

static constexpr size_t kPooled = 4 << 20;  // bytes; malloc itself reuses smaller blocks

static at::Tensor pooled(at::IntArrayRef sizes, at::IntArrayRef strides, size_t bytes,
                         const at::TensorOptions& options) {
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, pooled_memory(bytes), c10::GetAllocator(at::kCPU),
                       /*resizable=*/true);
  at::Tensor result = at::empty({0}, options).set_(storage, 0, sizes, strides);
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())
    result.fill_(std::numeric_limits<double>::quiet_NaN());  // as at::empty does
  return result;
}

at::Tensor empty_gradient(const at::Tensor& like) {
  if (like.nbytes() < kPooled) return at::empty_like(like);
  const at::Tensor shaped = at::empty_like(like, like.options().device(at::kMeta));  // for the strides
  return pooled(shaped.sizes(), shaped.strides(), shaped.nbytes(), like.options());
}

at::Tensor empty_gradient(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = size_t(c10::multiply_integers(sizes)) * options.dtype().itemsize();
  if (bytes < kPooled) return at::empty(sizes, options);
  return pooled(sizes, c10::contiguous_strides(sizes), bytes, options);
}

template <class A>
static double sum_lanes(const A* p, int64_t n) {
  constexpr int kLanes = 8;  // independent chains of additions; their number is part of the result
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) lane[k] += double(p[i + k]);
  for (; i < n; ++i) lane[i % kLanes] += double(p[i]);
  double total = 0;
  for (double part : lane) total += part;
  return total;
}

double sum_in_order(const at::Tensor& values) {
  return values.scalar_type() == at::kDouble ? sum_lanes(values.const_data_ptr<double>(), values.numel())
                                             : sum_lanes(values.const_data_ptr<float>(), values.numel());
}

at::Tensor sum_over(const at::Tensor& values, double denominator) {
  const double value = sum_in_order(values) / denominator;
  at::Tensor result = at::empty({}, values.options());
  if (values.scalar_type() == at::kDouble)
    *result.mutable_data_ptr<double>() = value;
  else
    *result.mutable_data_ptr<float>() = float(value);
  return result;
}

static at::Tensor take_memory(at::Tensor& tensor, std::string why) {
  c10::StorageImpl* old = tensor.storage().unsafeGetStorageImpl();
  if (size_t(tensor.nbytes()) != old->nbytes() || !tensor.is_non_overlapping_and_dense()) return at::alias(tensor);
  c10::Storage taken(c10::Storage::use_byte_size_t(), old->nbytes(), std::move(old->_mutable_data_ptr_no_checks()),
                     old->allocator(), /*resizable=*/false);
  old->release_data_and_set_meta_custom_data_ptr_error_msg_(std::move(why));
  return at::empty({0}, tensor.options()).set_(taken, 0, tensor.sizes(), tensor.strides());
}

TORCH_LIBRARY_IMPL(tlkernels, CPU, m) { m.impl("take_memory", take_memory); }
TORCH_LIBRARY_IMPL(tlkernels, CUDA, m) { m.impl("take_memory", take_memory); }

}  // namespace tlk
