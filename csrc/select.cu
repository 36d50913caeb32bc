// Patch selection on CUDA: an image per block.
#include "launch.h"
#include "select.cuh"

namespace maskcf {
namespace {

Tensor select_patches(Tensor cam, std::optional<double> threshold, std::optional<int64_t> top_k, bool context) {
  check_cam(cam, threshold, top_k);
  const Launcher launch(cam);
  Tensor mask = torch::stable::new_empty(cam, {cam.size(0), cam.size(1)}, ScalarType::Bool);
  for_wide_type(cam.scalar_type(), "cam", [&](auto zero) {
    using T = decltype(zero);
    launch(select_kernel<T>, blocks(cam.size(0)), 256, 0, static_cast<const T*>(cam.const_data_ptr()),
           int(cam.size(1)), selection<T>(threshold, top_k, context), static_cast<bool*>(mask.mutable_data_ptr()));
  });
  return mask;
}

}  // namespace
}  // namespace maskcf

MASKCF_KERNELS(m) { m.impl("select_patches", TORCH_BOX(&maskcf::select_patches)); }
