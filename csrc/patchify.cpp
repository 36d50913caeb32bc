// Pixels to normalised patch rows on the CPU: a row of patches per task.
#include "ops.h"
#include "pages.h"

namespace maskcf {
namespace {

// One line of one channel of a patch. A constant stride lets the compiler vectorise the common case.
template <class Out, class In, class W>
void normalise_line(const In* in, int64_t stride, int64_t count, W mean, W std, Out* out) {
  if (stride == 1) {
    for (int64_t x = 0; x < count; ++x) out[x] = normalised<Out>(in[x], mean, std);
  } else {
    for (int64_t x = 0; x < count; ++x) out[x] = normalised<Out>(in[x * stride], mean, std);
  }
}

template <class Out, class In>
void patchify_rows(const PatchifyShape& s, const In* in, Out* out,  // out [N, L, C, P, P]
                   const std::vector<double>& mean, const std::vector<double>& std, const bool* mask,
                   const int64_t* donors, bool donor_per_patch) {
  using W = typename Wide<In>::type;
  const int64_t patches = s.rows * s.cols;
  // A byte has 256 values: their outcomes are computed once, by the same arithmetic, and looked up.
  std::vector<Out> table;
  if constexpr (sizeof(In) == 1) {
    for (int64_t c = 0; c < s.c; ++c) {
      for (int byte = 0; byte < 256; ++byte) {
        table.push_back(normalised<Out>(In(byte), W(mean[size_t(c)]), W(std[size_t(c)])));
      }
    }
  }
  const int64_t grain = 1 + (1 << 16) / (s.cols * s.c * s.p * s.p + 1);
  torch::stable::parallel_for(0, s.n * s.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / s.rows, row = task % s.rows;
      for (int64_t col = 0; col < s.cols; ++col) {
        const int64_t p = row * s.cols + col;
        const int64_t source = mask ? source_of(n, p, patches, mask[n * patches + p], donors, donor_per_patch) : n;
        for (int64_t c = 0; c < s.c; ++c) {
          for (int64_t y = 0; y < s.p; ++y) {
            const In* from = in + s.strides.offset(source, c, row * s.p + y, col * s.p);
            Out* to = out + (((n * patches + p) * s.c + c) * s.p + y) * s.p;
            if constexpr (sizeof(In) == 1) {
              const Out* values = table.data() + c * 256;
              for (int64_t x = 0; x < s.p; ++x) to[x] = values[from[x * s.strides.x]];
            } else {
              normalise_line(from, s.strides.x, s.p, W(mean[size_t(c)]), W(std[size_t(c)]), to);
            }
          }
        }
      }
    }
  });
}

Tensor patchify(Tensor images, int64_t patch_size, std::vector<double> mean, std::vector<double> std, ScalarType dtype,
                std::optional<Tensor> mask, std::optional<Tensor> donors) {
  const PatchifyShape s = patchify_shape(images, patch_size, mean.size(), std.size());
  STD_TORCH_CHECK(mask.has_value() == donors.has_value(), "mask and donors must be given together");
  const int64_t patches = s.rows * s.cols;
  if (mask) {
    check_mask(*mask, s.n, patches);
    check_donors(*donors, s.n, patches);
    check_donor_values(*donors, s.n);
  }
  Tensor out = torch::stable::new_empty(images, {s.n, patches, s.c * s.p * s.p}, dtype);
  prefer_large_pages(out.mutable_data_ptr(), out.numel() * int64_t(out.element_size()));
  const auto run = [&](auto in, auto to) {
    using In = decltype(in);
    using Out = decltype(to);
    patchify_rows(s, static_cast<const In*>(images.const_data_ptr()), static_cast<Out*>(out.mutable_data_ptr()), mean,
                  std, mask ? mask_data(*mask) : nullptr, mask ? donor_data(*donors) : nullptr,
                  mask && donors->dim() == 2);
  };
  for_float_type(dtype, "the result", [&](auto to) {
    if (s.bytes) return run(uint8_t{}, to);
    for_float_type(images.scalar_type(), "images", [&](auto in) { run(in, to); });
  });
  return out;
}

}  // namespace
}  // namespace maskcf

STABLE_TORCH_LIBRARY_IMPL(maskcf, CPU, m) { m.impl("patchify", TORCH_BOX(&maskcf::patchify)); }
