// Bias and GELU on the CPU. Rows are divided among threads; the bias's gradient is summed by blocks of rows of one
// size, then over the blocks in their order, so that it does not depend on how many threads there are.
#include <algorithm>

#include "kernels.h"
#include "ops.h"
#include "pages.h"

namespace maskcf {
namespace {

constexpr int64_t kBlock = 64;  // rows

Tensor bias_gelu(Tensor x, Tensor bias, int64_t kind) {
  check_bias_gelu(x, bias, kind);
  const Element element = element_of(x.scalar_type());
  const int64_t width = bias.size(0), rows = x.numel() / width, bytes = width * int64_t(x.element_size());
  Tensor out = torch::stable::empty_like(x);
  prefer_large_pages(out.mutable_data_ptr(), rows * bytes);
  const char* in = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, 1 + (1 << 14) / width, [&](int64_t begin, int64_t end) {
    kernels().bias_gelu(element, Gelu(kind),
                        {in + begin * bytes, bias.const_data_ptr(), nullptr, to + begin * bytes, nullptr, end - begin,
                         width});
  });
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, int64_t kind) {
  check_bias_gelu(x, bias, kind);
  check_gradient(grad, x);
  const Element element = element_of(x.scalar_type());
  const int64_t width = bias.size(0), rows = x.numel() / width, bytes = width * int64_t(x.element_size());
  Tensor out = torch::stable::empty_like(x), bias_grad = torch::stable::empty_like(bias);
  prefer_large_pages(out.mutable_data_ptr(), rows * bytes);
  const char* in = static_cast<const char*>(x.const_data_ptr());
  const char* from = static_cast<const char*>(grad.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  for_wide_type(bias.scalar_type(), "bias", [&](auto zero) {
    using W = decltype(zero);
    std::vector<W> partial(size_t(blocks * width));
    torch::stable::parallel_for(0, blocks, 1 + (1 << 14) / (kBlock * width), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kBlock;
        kernels().bias_gelu_backward(element, Gelu(kind),
                                     {in + first * bytes, bias.const_data_ptr(), from + first * bytes,
                                      to + first * bytes, partial.data() + block * width,
                                      std::min(kBlock, rows - first), width});
      }
    });
    W* sums = static_cast<W*>(bias_grad.mutable_data_ptr());
    std::fill(sums, sums + width, W(0));
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t i = 0; i < width; ++i) sums[i] += partial[size_t(block * width + i)];
    }
  });
  return {out, bias_grad};
}

}  // namespace
}  // namespace maskcf

STABLE_TORCH_LIBRARY_IMPL(maskcf, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&maskcf::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&maskcf::bias_gelu_backward));
}
