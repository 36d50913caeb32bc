// Pixel refill on CUDA: selection and copy in one launch.
#include "launch.h"
#include "refill.cuh"

namespace maskcf {
namespace {

template <class Mask>
void refill(const Launcher& launch, const PatchGrid& grid, const Tensor& images, const Tensor& donors, Tensor& out,
            const Mask& mask) {
  RefillArgs args{grid,
                  static_cast<const char*>(images.const_data_ptr()),
                  static_cast<char*>(out.mutable_data_ptr()),
                  donor_data(donors),
                  donors.dim() == 2,
                  0};
  STD_TORCH_CHECK(grid.cols <= 4096, "a grid may have up to 4096 columns");
  STD_TORCH_CHECK(grid.planes * grid.height * grid.line_bytes() < (int64_t(1) << 31), "an image is too large");
  // Enough bytes for a block that the selection before them costs little, few enough to spread over the processors.
  constexpr int64_t kBlockBytes = 32 << 10;
  const int64_t lines = grid.planes * grid.height;
  args.lines = int(std::min(lines, kBlockBytes / grid.line_bytes() + 1));
  const dim3 count(blocks(grid.images * grid.rows), blocks((lines + args.lines - 1) / args.lines));
  STD_TORCH_CHECK(count.y < 65536, "an image is too large");
  const size_t shared = size_t(grid.cols) * sizeof(int64_t);
  const int64_t addresses = address_of(images) | address_of(out);
  for_access(access_bytes({grid.line_bytes(), addresses}), [&](auto vector) {
    using V = decltype(vector);
    if constexpr (sizeof(V) > 1) {
      if (grid.run % int64_t(sizeof(V)) != 0) {
        return launch(refill_kernel<V, true, Mask>, count, kRefillThreads, shared, args, mask);
      }
    }
    launch(refill_kernel<V, false, Mask>, count, kRefillThreads, shared, args, mask);
  });
}

Tensor refill_patches(Tensor images, Tensor mask, Tensor donors, int64_t rows, int64_t cols) {
  const PatchGrid grid = patch_grid(images, rows, cols);
  check_mask(mask, grid.images, grid.patches());
  check_donors(donors, grid.images, grid.patches());
  check_same_device(images, mask);
  check_same_device(images, donors);
  const Launcher launch(images);
  Tensor out = torch::stable::empty_like(images);
  refill(launch, grid, images, donors, out, GivenMask{mask_data(mask)});
  return out;
}

std::tuple<Tensor, Tensor> counterfactual_refill(Tensor images, Tensor cam, Tensor donors,
                                                 std::optional<double> threshold, std::optional<int64_t> top_k,
                                                 bool context, int64_t rows, int64_t cols) {
  const PatchGrid grid = patch_grid(images, rows, cols);
  check_cam(cam, threshold, top_k);
  STD_TORCH_CHECK(has_shape(cam, {grid.images, grid.patches()}), "cam must have shape [N, rows * cols]");
  check_donors(donors, grid.images, grid.patches());
  check_same_device(images, cam);
  check_same_device(images, donors);
  const Launcher launch(images);
  Tensor out = torch::stable::empty_like(images);
  Tensor mask = torch::stable::new_empty(cam, {grid.images, grid.patches()}, ScalarType::Bool);
  for_wide_type(cam.scalar_type(), "cam", [&](auto zero) {
    using T = decltype(zero);
    refill(launch, grid, images, donors, out,
           SelectedMask<T>{static_cast<const T*>(cam.const_data_ptr()), selection<T>(threshold, top_k, context),
                           static_cast<bool*>(mask.mutable_data_ptr())});
  });
  return {out, mask};
}

}  // namespace
}  // namespace maskcf

MASKCF_KERNELS(m) {
  m.impl("refill_patches", TORCH_BOX(&maskcf::refill_patches));
  m.impl("counterfactual_refill", TORCH_BOX(&maskcf::counterfactual_refill));
}
