// Patch selection on the CPU: an image per task.
#include "select.h"

#include "ops.h"

namespace maskcf {
namespace {

Tensor select(const Tensor& cam, std::optional<double> threshold, int64_t k, bool context) {
  check_cam(cam);
  STD_TORCH_CHECK(threshold.has_value() || (k >= 0 && k <= cam.size(1)), "k must lie between 0 and L");
  const int64_t n = cam.size(0), patches = cam.size(1);
  Tensor mask = torch::stable::new_empty(cam, {n, patches}, ScalarType::Bool);
  for_wide_type(cam.scalar_type(), "cam", [&](auto zero) {
    using T = decltype(zero);
    const T* in = static_cast<const T*>(cam.const_data_ptr());
    bool* out = static_cast<bool*>(mask.mutable_data_ptr());
    const Selection<T> s = selection<T>(threshold, k, context);
    const int64_t grain = 1 + (threshold.has_value() ? 32768 : 2048) / (patches + 1);
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) select_row(in + i * patches, patches, s, out + i * patches);
    });
  });
  return mask;
}

Tensor select_by_threshold(const Tensor& cam, double threshold, bool context) {
  return select(cam, threshold, 0, context);
}

Tensor select_top_k(const Tensor& cam, int64_t k, bool context) { return select(cam, std::nullopt, k, context); }

}  // namespace
}  // namespace maskcf

STABLE_TORCH_LIBRARY_IMPL(maskcf, CPU, m) {
  m.impl("select_by_threshold", TORCH_BOX(&maskcf::select_by_threshold));
  m.impl("select_top_k", TORCH_BOX(&maskcf::select_top_k));
}
