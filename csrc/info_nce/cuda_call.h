// Embeddings on CUDA tensors: as the kernels and the library's matrix products read them, and their gradients.
#pragma once
#include "cuda_embeddings.cuh"

#include <ATen/ATen.h>

#include <optional>

#include "../core/cuda/dtype.h"
#include "../core/cuda/tensor.h"

namespace tlk {

inline bool is_narrow(at::ScalarType dtype) { return dtype == at::kBFloat16 || dtype == at::kHalf; }

// a @ b, in float32 for 16-bit operands, added to `total` where that is defined.
inline at::Tensor product(at::Tensor a, at::Tensor b, const at::Tensor& total = {}) {
  if (is_narrow(a.scalar_type()) && a.is_cuda())
    return total.defined() ? at::addmm_out(const_cast<at::Tensor&>(total), total, a, b, at::kFloat)
                           : at::mm(a, b, at::kFloat);
  if (is_narrow(a.scalar_type())) a = a.to(at::kFloat), b = b.to(at::kFloat);  // only GPUs have that product
  return total.defined() ? at::addmm_out(const_cast<at::Tensor&>(total), total, a, b) : at::mm(a, b);
}

// Rows of features in the type of the operands. They are copied if their type differs, to normalize them, or if 16-bit
// features are not in aligned chunks of 16 bytes.
struct Operands {
  at::Tensor given, x, norms;  // x: padded with zeros; norms: (3, rows), see scale_rows, or undefined

  Operands() = default;
  Operands(const at::Tensor& tensor, at::ScalarType dtype, bool normalize, cudaStream_t stream) : given(tensor) {
    const int64_t chunk = is_narrow(dtype) ? 8 : 1, features = given.size(1);
    const int64_t padded = (features + chunk - 1) / chunk * chunk;
    const at::Tensor from = given.to(dtype);
    if (normalize) {
      const at::Tensor dense = from.contiguous();
      x = at::empty({from.size(0), padded}, from.options());
      norms = at::empty({3, from.size(0)}, from.options().dtype(compute_type(dtype)));
      contrastive::ScaledRows p;
      p.x = dense.const_data_ptr(), p.out = x.mutable_data_ptr(), p.norms = norms.mutable_data_ptr();
      p.rows = from.size(0), p.features = p.stride = features, p.out_stride = padded;
      with_type(dtype, [&](auto type) {
        check_launch(contrastive::scale_rows<typename decltype(type)::T>(p, stream), "info_nce");
      });
      return;
    }
    const bool aligned = reinterpret_cast<uintptr_t>(from.const_data_ptr()) % 16 == 0 && from.stride(0) % chunk == 0;
    if (from.stride(1) == 1 && from.stride(0) >= features && features == padded && (chunk == 1 || aligned)) {
      x = from;
    } else {
      x = at::zeros({from.size(0), padded}, from.options());
      x.narrow(1, 0, features).copy_(from);
    }
  }

  int64_t rows() const { return x.size(0); }
  int64_t features() const { return given.size(1); }
  at::Tensor values() const { return x.narrow(1, 0, features()); }
  const void* inverse_norms() const { return norms.defined() ? norms.const_data_ptr() : nullptr; }

  // Writes rows from `first` on of `grad`, of the operands' type: `total` is the gradient by them as they are in x,
  // over scale / extra.
  void finish(const at::Tensor& total, const at::Tensor& grad, int64_t first, const double* scale, const double* extra,
              cudaStream_t stream) const {
    contrastive::FinishedRows p;
    p.total = total.const_data_ptr(), p.x = x.const_data_ptr(), p.norms = inverse_norms();
    p.grad = grad.mutable_data_ptr(), p.scale = scale, p.extra = extra;
    p.first = first, p.rows = total.size(0), p.features = features(), p.all_rows = rows();
    p.total_stride = total.stride(0), p.x_stride = x.stride(0);
    with_type(x.scalar_type(), [&](auto type) {
      check_launch(contrastive::finish_rows<typename decltype(type)::T>(p, stream), "info_nce");
    });
  }
};

// Negatives that belong to one row each, (rows, M, features), and their similarities.
struct PerQueryOperands {
  at::Tensor given, x, similarities, inverse_norms;

  PerQueryOperands() = default;
  PerQueryOperands(const at::Tensor& tensor, const Operands& rows, cudaStream_t stream) : given(tensor) {
    x = given.to(rows.x.scalar_type()).contiguous();
    const auto options = x.options().dtype(compute_type(x.scalar_type()));
    similarities = at::empty({x.size(0), x.size(1)}, options);
    if (rows.norms.defined()) inverse_norms = at::empty_like(similarities);
    contrastive::PerQueryNegatives p = call(rows);
    p.similarities = similarities.mutable_data_ptr();
    p.inverse_norms = inverse_norms.defined() ? inverse_norms.mutable_data_ptr() : nullptr;
    with_type(x.scalar_type(), [&](auto type) {
      check_launch(contrastive::per_query_similarities<typename decltype(type)::T>(p, stream), "info_nce");
    });
  }

  // From a panel of the similarities' gradient: adds to `total` and writes `grad`, where they are defined.
  void gradients(const Operands& rows, const at::Tensor& panel, int64_t first, const at::Tensor& total,
                 const at::Tensor& grad, const double* scale, const double* extra, cudaStream_t stream) const {
    contrastive::PerQueryNegatives p = call(rows);
    p.similarities = similarities.mutable_data_ptr();
    p.inverse_norms = inverse_norms.defined() ? inverse_norms.mutable_data_ptr() : nullptr;
    p.panel = panel.const_data_ptr(), p.panel_stride = panel.stride(0);
    p.first = first, p.panel_rows = panel.size(0);
    p.total = total.defined() ? total.mutable_data_ptr() : nullptr;
    p.grad = grad.defined() ? grad.mutable_data_ptr() : nullptr;
    p.scale = scale, p.extra = extra;
    with_type(x.scalar_type(), [&](auto type) {
      check_launch(contrastive::per_query_gradients<typename decltype(type)::T>(p, stream), "info_nce");
    });
  }

 private:
  contrastive::PerQueryNegatives call(const Operands& rows) const {
    contrastive::PerQueryNegatives p;
    p.rows = rows.x.const_data_ptr(), p.row_norms = rows.inverse_norms(), p.negatives = x.const_data_ptr();
    p.row_stride = rows.x.stride(0), p.row_count = x.size(0), p.count = x.size(1), p.features = x.size(2);
    return p;
  }
};

}  // namespace tlk
