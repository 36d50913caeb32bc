// Attention relevance on CUDA: launches. What the two kernels hand over is a few floats per query and per key.
#include "launch.h"
#include "relevance.cuh"

namespace maskcf {
namespace {

RowStrides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// Whether every row begins on a 16-byte boundary and is whole 16-byte words.
bool is_wide(const Tensor& x) {
  const int64_t size = int64_t(x.element_size());
  return access_bytes({address_of(x), x.stride(0) * size, x.stride(1) * size, x.stride(2) * size,
                       x.size(3) * size}) == 16;
}

template <class T, int kCount>
void run_kernels(const Launcher& launch, const RelevanceArgs<T>& args, float* logits, int64_t n) {
  const unsigned heads = unsigned(args.heads), images = blocks(n);
  if (args.tq == 1) {
    return launch(one_query_kernel<T, kCount>, dim3(1, heads, images), kRelevanceThreads, 0, args, logits);
  }
  const unsigned tiles = unsigned((args.t + kTile - 1) / kTile);
  const size_t tile = size_t(kTile) * size_t(args.stride) * sizeof(T);
  const dim3 count(tiles, heads, images);
  launch(softmax_kernel<T, kCount>, count, kRelevanceThreads, 2 * tile, args);
  launch(columns_kernel<T, kCount>, count, kRelevanceThreads, 4 * tile, args);
}

Tensor attention_relevance(Tensor q, Tensor k, Tensor v, Tensor grad_out, Tensor relevance, double scale) {
  check_relevance(q, k, v, grad_out, relevance);
  const int64_t n = q.size(0), heads = q.size(1), tq = q.size(2), t = k.size(2), d = q.size(3);
  STD_TORCH_CHECK(d <= kMaxWidth, "heads may be up to 128 wide");
  STD_TORCH_CHECK(n < 65536 && heads < 65536 && t < (1 << 24), "too many images, heads or tokens for one launch");
  for (const Tensor* x : {&k, &v, &grad_out, &relevance}) check_same_device(q, *x);
  const Launcher launch(q);
  Tensor out = torch::stable::empty_like(relevance);
  // [N, H, T] partial sums and, with one query, logits; or [N, H, Tq] maxima and weights.
  Tensor scratch = torch::stable::new_empty(relevance, {3, n, heads, t});
  float* const partial = static_cast<float*>(scratch.mutable_data_ptr());
  float* const second = partial + n * heads * t;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto data = [](const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); };
    const RelevanceArgs<T> args{data(q),       data(k),       data(v),       data(grad_out),
                                strides_of(q), strides_of(k), strides_of(v), strides_of(grad_out),
                                int(heads),    int(tq),       int(t),        int(d),
                                tile_stride<T>(int(d)),       float(scale),
                                static_cast<const float*>(relevance.const_data_ptr()),
                                second,        second + n * heads * t,       partial};
    if (is_wide(q) && is_wide(k) && is_wide(v) && is_wide(grad_out)) {
      run_kernels<T, 16 / int(sizeof(T))>(launch, args, second, n);
    } else {
      run_kernels<T, 1>(launch, args, second, n);
    }
  };
  switch (q.scalar_type()) {
    case ScalarType::Float: run(float{}); break;
    case ScalarType::Half: run(Half{}); break;
    case ScalarType::BFloat16: run(BFloat16{}); break;
    default: STD_TORCH_CHECK(false, "q must be float32, float16 or bfloat16");
  }
  launch(heads_kernel, blocks((n * t + 255) / 256), 256, 0, partial,
         static_cast<const float*>(relevance.const_data_ptr()), n * t, int(heads), int(t),
         static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace
}  // namespace maskcf

MASKCF_KERNELS(m) {
  m.impl("attention_relevance", TORCH_BOX(&maskcf::attention_relevance));
}
