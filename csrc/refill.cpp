// Pixel refill on the CPU: one pass in which every task selects, then copies rows of patches.
#include <cstring>

#include "ops.h"
#include "pages.h"
#include "select.h"

namespace maskcf {
namespace {

// Neighbouring patches with the same source are copied together.
struct Piece {
  int64_t start, bytes, source;
};

// Copies one row of patches of image `n`; `mask` is the image's. `pieces` is scratch for up to grid.cols entries.
void refill_row(const PatchGrid& grid, const char* in, char* out, int64_t n, int64_t row, const bool* mask,
                const int64_t* donors, bool donor_per_patch, Piece* pieces) {
  int64_t count = 0;
  for (int64_t col = 0; col < grid.cols; ++col) {
    const int64_t p = row * grid.cols + col;
    const int64_t source = source_of(n, p, grid.patches(), mask[p], donors, donor_per_patch);
    if (count > 0 && pieces[count - 1].source == source) {
      pieces[count - 1].bytes += grid.run;
    } else {
      pieces[count++] = {col * grid.run, grid.run, source};
    }
  }
  for (int64_t plane = 0; plane < grid.planes; ++plane) {
    for (int64_t line = 0; line < grid.height; ++line) {
      char* to = out + grid.line_offset(n, plane, row, line);
      for (int64_t i = 0; i < count; ++i) {
        const Piece& piece = pieces[i];
        const char* from = in + grid.line_offset(piece.source, plane, row, line);
        std::memcpy(to + piece.start, from + piece.start, size_t(piece.bytes));
      }
    }
  }
}

// `mask_of(n, first)` gives the mask of image n; `first` is true for exactly one caller per image.
template <class MaskOf>
void refill(const PatchGrid& grid, const Tensor& images, const Tensor& donors, Tensor& out, const MaskOf& mask_of) {
  const char* in = static_cast<const char*>(images.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  prefer_large_pages(to, images.numel() * int64_t(images.element_size()));
  const int64_t* donor = donor_data(donors);
  const bool per_patch = donors.dim() == 2;
  const int64_t grain = 1 + (int64_t(1) << 18) / (grid.planes * grid.height * grid.line_bytes() + 1);
  torch::stable::parallel_for(0, grid.images * grid.rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<Piece> pieces(size_t(grid.cols));
    auto masks = mask_of();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / grid.rows, row = task % grid.rows;
      refill_row(grid, in, to, n, row, masks(n, row == 0), donor, per_patch, pieces.data());
    }
  });
}

Tensor refill_patches(Tensor images, Tensor mask, Tensor donors, int64_t rows, int64_t cols) {
  const PatchGrid grid = patch_grid(images, rows, cols);
  check_mask(mask, grid.images, grid.patches());
  check_donors(donors, grid.images, grid.patches());
  check_donor_values(donors, grid.images);
  Tensor out = torch::stable::empty_like(images);
  const bool* given = mask_data(mask);
  refill(grid, images, donors, out, [&] {
    return [&](int64_t n, bool) { return given + n * grid.patches(); };
  });
  return out;
}

// The mask of the image at hand, computed when a task reaches a new image. An image whose rows are shared between
// two tasks is selected twice, which costs less than a second pass; the one with its first row writes the mask.
template <class T>
struct LazyMask {
  const T* cam;  // [N, L]
  int64_t patches;
  const Selection<T>& s;
  bool* out;  // [N, L]
  std::vector<char> row = std::vector<char>(size_t(patches));
  int64_t current = -1;

  const bool* operator()(int64_t n, bool first) {
    bool* mask = reinterpret_cast<bool*>(row.data());
    if (n != current) select_row(cam + n * patches, patches, s, mask);
    if (first) std::memcpy(out + n * patches, mask, size_t(patches));
    current = n;
    return mask;
  }
};

std::tuple<Tensor, Tensor> counterfactual_refill(Tensor images, Tensor cam, Tensor donors,
                                                 std::optional<double> threshold, std::optional<int64_t> top_k,
                                                 bool context, int64_t rows, int64_t cols) {
  const PatchGrid grid = patch_grid(images, rows, cols);
  check_cam(cam, threshold, top_k);
  STD_TORCH_CHECK(has_shape(cam, {grid.images, grid.patches()}), "cam must have shape [N, rows * cols]");
  check_donors(donors, grid.images, grid.patches());
  check_donor_values(donors, grid.images);
  Tensor out = torch::stable::empty_like(images);
  Tensor mask = torch::stable::new_empty(cam, {grid.images, grid.patches()}, ScalarType::Bool);
  for_wide_type(cam.scalar_type(), "cam", [&](auto zero) {
    using T = decltype(zero);
    const Selection<T> s = selection<T>(threshold, top_k, context);
    const T* map = static_cast<const T*>(cam.const_data_ptr());
    bool* masks = static_cast<bool*>(mask.mutable_data_ptr());
    refill(grid, images, donors, out, [&] { return LazyMask<T>{map, grid.patches(), s, masks}; });
  });
  return {out, mask};
}

}  // namespace
}  // namespace maskcf

STABLE_TORCH_LIBRARY_IMPL(maskcf, CPU, m) {
  m.impl("refill_patches", TORCH_BOX(&maskcf::refill_patches));
  m.impl("counterfactual_refill", TORCH_BOX(&maskcf::counterfactual_refill));
}
