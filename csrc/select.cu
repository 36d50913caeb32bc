// Patch selection on CUDA: an image per block.
#include "launch.h"
#include "select.cuh"

namespace maskcf {
namespace {

Tensor select(const Tensor& cam, std::optional<double> threshold, int64_t k, bool context) {
  check_cam(cam);
  STD_TORCH_CHECK(threshold.has_value() || (k >= 0 && k <= cam.size(1)), "k must lie between 0 and L");
  const Launcher launch(cam);
  Tensor mask = torch::stable::new_empty(cam, {cam.size(0), cam.size(1)}, ScalarType::Bool);
  for_wide_type(cam.scalar_type(), "cam", [&](auto zero) {
    using T = decltype(zero);
    launch(select_kernel<T>, blocks(cam.size(0)), 256, 0, static_cast<const T*>(cam.const_data_ptr()),
           int(cam.size(1)), selection<T>(threshold, k, context), static_cast<bool*>(mask.mutable_data_ptr()));
  });
  return mask;
}

Tensor select_by_threshold(const Tensor& cam, double threshold, bool context) {
  return select(cam, threshold, 0, context);
}

Tensor select_top_k(const Tensor& cam, int64_t k, bool context) { return select(cam, std::nullopt, k, context); }

}  // namespace
}  // namespace maskcf

MASKCF_KERNELS(m) {
  m.impl("select_by_threshold", TORCH_BOX(&maskcf::select_by_threshold));
  m.impl("select_top_k", TORCH_BOX(&maskcf::select_top_k));
}
