// Bias and GELU on the CPU: rows are divided among threads.
#include "kernels.h"
#include "ops.h"
#include "pages.h"
#include "rows.h"

namespace maskcf {
namespace {

void check(Tensor& x, Tensor& bias, int64_t kind) {
  check_rows(x, bias, "bias");
  STD_TORCH_CHECK(kind >= 0 && kind < 3, "kind must be 0, 1 or 2, got ", kind);
}

Tensor bias_gelu(Tensor x, Tensor bias, int64_t kind) {
  check(x, bias, kind);
  const Element element = element_of(x.scalar_type());
  const int64_t width = bias.size(0), rows = x.numel() / width, bytes = width * int64_t(x.element_size());
  Tensor out = torch::stable::empty_like(x);
  prefer_large_pages(out.mutable_data_ptr(), rows * bytes);
  const char* in = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, row_grain(width), [&](int64_t begin, int64_t end) {
    kernels().bias_gelu(element, Gelu(kind),
                        {in + begin * bytes, bias.const_data_ptr(), nullptr, to + begin * bytes, nullptr, end - begin,
                         width});
  });
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, int64_t kind) {
  check(x, bias, kind);
  check_like(grad, x);
  const Element element = element_of(x.scalar_type());
  const int64_t width = bias.size(0), rows = x.numel() / width, bytes = width * int64_t(x.element_size());
  Tensor out = torch::stable::empty_like(x), bias_grad = torch::stable::empty_like(bias);
  prefer_large_pages(out.mutable_data_ptr(), rows * bytes);
  const char* in = static_cast<const char*>(x.const_data_ptr());
  const char* from = static_cast<const char*>(grad.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  for_wide_type(bias.scalar_type(), "bias", [&](auto zero) {
    using W = decltype(zero);
    sum_over_rows<W, 1>(rows, width, {static_cast<W*>(bias_grad.mutable_data_ptr())},
                        [&](int64_t first, int64_t count, W* sums) {
                          const int64_t at = first * bytes;
                          kernels().bias_gelu_backward(
                              element, Gelu(kind),
                              {in + at, bias.const_data_ptr(), from + at, to + at, sums, count, width});
                        });
  });
  return {out, bias_grad};
}

}  // namespace
}  // namespace maskcf

STABLE_TORCH_LIBRARY_IMPL(maskcf, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&maskcf::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&maskcf::bias_gelu_backward));
}
