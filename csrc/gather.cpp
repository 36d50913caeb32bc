// Token-space refill on the CPU, and its gradient.
#include <cstring>

#include "ops.h"
#include "pages.h"

namespace maskcf {
namespace {

Tensor gather_tokens(Tensor tokens, Tensor mask, Tensor donors, int64_t prefix) {
  check_tokens(tokens, mask, donors, prefix);
  check_donor_values(donors, tokens.size(0));
  const int64_t n = tokens.size(0), t = tokens.size(1), patches = t - prefix;
  const int64_t bytes = tokens.size(2) * int64_t(tokens.element_size());
  Tensor out = torch::stable::empty_like(tokens);
  prefer_large_pages(out.mutable_data_ptr(), n * t * bytes);
  const char* in = static_cast<const char*>(tokens.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const bool* masked = mask_data(mask);
  const int64_t* donor = donor_data(donors);
  const bool per_patch = donors.dim() == 2;
  torch::stable::parallel_for(0, n * t, 1 + (1 << 18) / (bytes + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / t, p = row % t - prefix;  // below 0 stays
      const int64_t source =
          p < 0 ? image : source_of(image, p, patches, masked[image * patches + p], donor, per_patch);
      std::memcpy(to + row * bytes, in + (source * t + row % t) * bytes, size_t(bytes));
    }
  });
  return out;
}

// The images that took their token at one position from each image, in ascending order: a list per image, made by
// counting. Works for any donors; a permutation is the case of lists of one or two.
struct Receivers {
  std::vector<int64_t> start, list, source;

  explicit Receivers(int64_t n) : start(size_t(n) + 1), list(size_t(n)), source(size_t(n)) {}

  template <class SourceOf>
  void find(int64_t n, const SourceOf& source_of_image) {
    std::fill(start.begin(), start.end(), 0);
    for (int64_t i = 0; i < n; ++i) {
      source[size_t(i)] = source_of_image(i);
      ++start[size_t(source[size_t(i)]) + 1];
    }
    for (size_t i = 0; i < size_t(n); ++i) start[i + 1] += start[i];
    for (int64_t i = n - 1; i >= 0; --i) list[size_t(--start[size_t(source[size_t(i)]) + 1])] = i;
    // Filling from the back moved every end to its list's beginning.
    for (size_t i = 0; i < size_t(n); ++i) start[i] = start[i + 1];
    start[size_t(n)] = n;
  }
};

// Sums the rows in ascending order of their image, in `W`: the result depends on nothing else.
template <class T>
void sum_rows(const T* grad, int64_t stride, const int64_t* images, int64_t count, int64_t width, T* out) {
  using W = typename Wide<T>::type;
  if (count == 1) {
    std::memcpy(out, grad + images[0] * stride, size_t(width) * sizeof(T));
    return;
  }
  constexpr int64_t kBlock = 256;
  W sum[kBlock];
  for (int64_t first = 0; first < width; first += kBlock) {
    const int64_t size = width - first < kBlock ? width - first : kBlock;
    for (int64_t d = 0; d < size; ++d) sum[d] = count > 0 ? W(grad[images[0] * stride + first + d]) : W(0);
    for (int64_t i = 1; i < count; ++i) {
      const T* row = grad + images[i] * stride + first;
      for (int64_t d = 0; d < size; ++d) sum[d] += W(row[d]);
    }
    for (int64_t d = 0; d < size; ++d) out[first + d] = T(sum[d]);
  }
}

Tensor gather_tokens_backward(Tensor grad_out, Tensor mask, Tensor donors, int64_t prefix) {
  check_tokens(grad_out, mask, donors, prefix);
  check_donor_values(donors, grad_out.size(0));
  const int64_t n = grad_out.size(0), t = grad_out.size(1), width = grad_out.size(2), patches = t - prefix;
  Tensor out = torch::stable::empty_like(grad_out);
  prefer_large_pages(out.mutable_data_ptr(), n * t * width * int64_t(grad_out.element_size()));
  const bool* masked = mask_data(mask);
  const int64_t* donor = donor_data(donors);
  const bool per_patch = donors.dim() == 2;
  for_float_type(grad_out.scalar_type(), "grad_out", [&](auto zero) {
    using T = decltype(zero);
    const T* in = static_cast<const T*>(grad_out.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const int64_t stride = t * width;
    torch::stable::parallel_for(0, t, 1 + (1 << 16) / (n * width + 1), [&](int64_t begin, int64_t end) {
      Receivers receivers(n);
      for (int64_t token = begin; token < end; ++token) {
        receivers.find(n, [&](int64_t image) {
          const int64_t p = token - prefix;
          if (p < 0) return image;
          return source_of(image, p, patches, masked[image * patches + p], donor, per_patch);
        });
        for (int64_t image = 0; image < n; ++image) {
          const int64_t first = receivers.start[size_t(image)];
          sum_rows(in + token * width, stride, receivers.list.data() + first,
                   receivers.start[size_t(image) + 1] - first, width, to + image * stride + token * width);
        }
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace maskcf

STABLE_TORCH_LIBRARY_IMPL(maskcf, CPU, m) {
  m.impl("gather_tokens", TORCH_BOX(&maskcf::gather_tokens));
  m.impl("gather_tokens_backward", TORCH_BOX(&maskcf::gather_tokens_backward));
}
