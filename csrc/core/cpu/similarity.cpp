#include "similarity.h"

namespace tlk {

using at::Tensor;

Similarity::Similarity(Tensor rows_, std::vector<Panel> panels_, bool paired, bool both)
    : rows(std::move(rows_)), panels(std::move(panels_)), paired_(paired), both_(both) {
  int64_t columns = 0;
  for (const Panel& panel : panels) columns = std::max(columns, panel.columns());
  memory_ = at::empty({std::min(kTile, rows.size(0)), std::min(kTile, columns) + kPadding}, rows.options());
}

bool Similarity::one_tile() const {
  return panels.size() == 1 && rows.size(0) <= kTile && panels.front().columns() <= kTile;
}

Tensor Similarity::view(const Tile& tile) const {
  return memory_.as_strided({tile.rows, tile.columns}, {tile.stride, 1});
}

void Similarity::product(const Panel& panel, const Tile& tile) {
  const Tensor queries = rows.narrow(0, tile.row, tile.rows);
  const int64_t j = tile.column - panel.first;
  Tensor out = view(tile);
  if (panel.x.dim() == 2) {
    at::mm_out(out, queries, panel.x.narrow(0, j, tile.columns).t());
  } else {
    Tensor each = out.unsqueeze(2);
    at::bmm_out(each, panel.x.narrow(0, tile.row, tile.rows).narrow(1, j, tile.columns), queries.unsqueeze(2));
  }
}

// sum += factor * a @ b. A product of few columns that starts from the sum, as addmm has it, rounds all its additions
// at the sum's size: measured in float32 on AVX-512, 1.3 to 1.6 times the error of a product by itself below 64 columns
// and none from there on.
static void add_product(const Tensor& sum, const Tensor& a, const Tensor& b, double factor) {
  constexpr int64_t kFew = 64;
  if (sum.size(1) < kFew)
    sum.add_(at::mm(a, b), factor);
  else
    sum.addmm_(a, b, 1, factor);
}

void Similarity::accumulate(const Panel& panel, const Tile& tile, double scale) {
  const Tensor d = view(tile);
  const int64_t j = tile.column - panel.first;
  const bool shared = panel.x.dim() == 2;
  if (rows_grad.defined()) {
    Tensor grad = rows_grad.narrow(0, tile.row, tile.rows);
    if (shared)
      add_product(grad, d, panel.x.narrow(0, j, tile.columns), scale);
    else
      grad.unsqueeze(1).baddbmm_(d.unsqueeze(1), panel.x.narrow(0, tile.row, tile.rows).narrow(1, j, tile.columns), 1,
                                 scale);
  }
  if (panel.grad.defined()) {
    const Tensor queries = rows.narrow(0, tile.row, tile.rows);
    if (shared) {
      add_product(panel.grad.narrow(0, j, tile.columns), d.t(), queries, scale);
    } else {
      Tensor grad = panel.grad.narrow(0, tile.row, tile.rows).narrow(1, j, tile.columns);
      at::mul_out(grad, d.unsqueeze(2), queries.mul(scale).unsqueeze(1));
    }
  }
}

}  // namespace tlk
