// Pixels to normalised patch rows on CUDA.
#include <numeric>

#include "launch.h"
#include "patchify.cuh"

namespace maskcf {
namespace {

template <class Out, class In, int kCount>
void run_kernel(const Launcher& launch, const Tensor& images, Tensor& out,
                const PatchifyArgs<typename Wide<In>::type>& args) {
  const dim3 count(blocks(args.images), blocks((args.patches + args.group - 1) / args.group));
  STD_TORCH_CHECK(count.y < 65536, "images have too many patches");
  const size_t shared = sizeof(In) == 1 ? size_t(args.channels) * 256 * sizeof(Out) : 0;
  launch(patchify_kernel<Out, In, kCount>, count, kPatchifyThreads, shared,
         static_cast<const In*>(images.const_data_ptr()), static_cast<Out*>(out.mutable_data_ptr()), args);
}

Tensor patchify(Tensor images, int64_t patch_size, std::vector<double> mean, std::vector<double> std, ScalarType dtype,
                std::optional<Tensor> mask, std::optional<Tensor> donors) {
  const PatchifyShape s = patchify_shape(images, patch_size, mean.size(), std.size());
  STD_TORCH_CHECK(s.c <= kMaxChannels, "images may have up to 16 channels");
  STD_TORCH_CHECK(mask.has_value() == donors.has_value(), "mask and donors must be given together");
  const int64_t patches = s.rows * s.cols, row = s.c * s.p * s.p;
  STD_TORCH_CHECK(row < (int64_t(1) << 24), "a patch is too large");
  if (mask) {
    check_mask(*mask, s.n, patches);
    check_donors(*donors, s.n, patches);
    check_same_device(images, *mask);
    check_same_device(images, *donors);
  }
  const Launcher launch(images);
  Tensor out = torch::stable::new_empty(images, {s.n, patches, row}, dtype);
  const auto run = [&](auto in, auto to) {
    using In = decltype(in);
    using Out = decltype(to);
    PatchifyArgs<typename Wide<In>::type> args{s.n, patches, s.cols, s.p, int(s.c), s.strides};
    if (mask) {
      args.mask = mask_data(*mask);
      args.donors = donor_data(*donors);
      args.donor_per_patch = donors->dim() == 2;
    }
    constexpr int64_t kWide = 16 / int64_t(sizeof(Out));
    const bool wide = patches * row % kWide == 0 && address_of(out) % 16 == 0;
    const int64_t whole = wide ? kWide / std::gcd(row, kWide) : 1;  // patches that are whole accesses together
    args.group = int(std::min((8192 / row / whole + 1) * whole, patches));
    for (size_t c = 0; c < mean.size(); ++c) {
      args.mean[c] = typename Wide<In>::type(mean[c]);
      args.std[c] = typename Wide<In>::type(std[c]);
    }
    if (wide) return run_kernel<Out, In, int(kWide)>(launch, images, out, args);
    run_kernel<Out, In, 1>(launch, images, out, args);
  };
  for_float_type(dtype, "the result", [&](auto to) {
    if (s.bytes) return run(uint8_t{}, to);
    for_float_type(images.scalar_type(), "images", [&](auto in) { run(in, to); });
  });
  return out;
}

}  // namespace
}  // namespace maskcf

MASKCF_KERNELS(m) { m.impl("patchify", TORCH_BOX(&maskcf::patchify)); }
