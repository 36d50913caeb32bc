// Patch selection on the CPU: an image per task.
#include "select.h"

#include "ops.h"

namespace maskcf {
namespace {

Tensor select_patches(Tensor cam, std::optional<double> threshold, std::optional<int64_t> top_k, bool context) {
  check_cam(cam, threshold, top_k);
  const int64_t n = cam.size(0), patches = cam.size(1);
  Tensor mask = torch::stable::new_empty(cam, {n, patches}, ScalarType::Bool);
  for_wide_type(cam.scalar_type(), "cam", [&](auto zero) {
    using T = decltype(zero);
    const T* in = static_cast<const T*>(cam.const_data_ptr());
    bool* out = static_cast<bool*>(mask.mutable_data_ptr());
    const Selection<T> s = selection<T>(threshold, top_k, context);
    const int64_t grain = 1 + (threshold.has_value() ? 32768 : 2048) / (patches + 1);
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) select_row(in + i * patches, patches, s, out + i * patches);
    });
  });
  return mask;
}

}  // namespace
}  // namespace maskcf

STABLE_TORCH_LIBRARY_IMPL(maskcf, CPU, m) { m.impl("select_patches", TORCH_BOX(&maskcf::select_patches)); }
