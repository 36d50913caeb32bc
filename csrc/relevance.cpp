// Attention relevance on the CPU: a head of an image per task, then the sum over heads in their order.
#include "kernels.h"
#include "ops.h"

namespace maskcf {
namespace {

const void* head_data(const Tensor& x, int64_t n, int64_t h) {
  return static_cast<const char*>(x.const_data_ptr()) +
         (n * x.stride(0) + h * x.stride(1)) * int64_t(x.element_size());
}

Tensor attention_relevance(Tensor q, Tensor k, Tensor v, Tensor grad_out, Tensor relevance, double scale) {
  check_relevance(q, k, v, grad_out, relevance);
  const int64_t n = q.size(0), heads = q.size(1), tq = q.size(2), t = k.size(2), d = q.size(3);
  const Element element = element_of(q.scalar_type());
  Tensor out = torch::stable::empty_like(relevance);
  for_wide_type(relevance.scalar_type(), "relevance", [&](auto zero) {
    using W = decltype(zero);
    std::vector<W> partial(size_t(n * heads * t));
    const W* row = static_cast<const W*>(relevance.const_data_ptr());
    torch::stable::parallel_for(0, n * heads, 1 + (1 << 15) / (tq * t * d + 1), [&](int64_t begin, int64_t end) {
      std::vector<char> memory(size_t(kernels().relevance_scratch_bytes(element, t, d)) + 64);
      void* scratch = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i = task / heads, h = task % heads;
        const Head head{head_data(q, i, h), head_data(k, i, h), head_data(v, i, h), head_data(grad_out, i, h),
                        q.stride(2),        k.stride(2),        v.stride(2),        grad_out.stride(2),
                        tq,                 t,                  d,                  scale,
                        row + i * t,        partial.data() + task * t};
        kernels().relevance(element, head, scratch);
      }
    });
    W* to = static_cast<W*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, n, 1 + (1 << 15) / (heads * t), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = 0; j < t; ++j) {
          W sum = 0;
          for (int64_t h = 0; h < heads; ++h) sum += partial[size_t((i * heads + h) * t + j)];
          to[i * t + j] = row[i * t + j] + sum / W(heads);
        }
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace maskcf

STABLE_TORCH_LIBRARY_IMPL(maskcf, CPU, m) {
  m.impl("attention_relevance", TORCH_BOX(&maskcf::attention_relevance));
}
