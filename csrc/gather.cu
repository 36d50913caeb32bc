// Token-space refill on CUDA, and its gradient.
#include "gather.cuh"
#include "launch.h"

namespace maskcf {
namespace {

GatherArgs gather_args(Tensor& tokens, Tensor& mask, Tensor& donors, int64_t prefix) {
  check_tokens(tokens, mask, donors, prefix);
  check_same_device(tokens, mask);
  check_same_device(tokens, donors);
  return {tokens.size(0), tokens.size(1), prefix, mask_data(mask), donor_data(donors), donors.dim() == 2};
}

unsigned warps(const GatherArgs& args) {
  constexpr int64_t kWarps = kGatherThreads / 32;
  return blocks((args.images * args.tokens + kWarps - 1) / kWarps);
}

Tensor gather_tokens(Tensor tokens, Tensor mask, Tensor donors, int64_t prefix) {
  const GatherArgs args = gather_args(tokens, mask, donors, prefix);
  const Launcher launch(tokens);
  Tensor out = torch::stable::empty_like(tokens);
  const int64_t row = tokens.size(2) * int64_t(tokens.element_size());
  for_access<2>(access_bytes({row, address_of(tokens), address_of(out)}), [&](auto vector) {
    using V = decltype(vector);
    launch(gather_kernel<V>, warps(args), kGatherThreads, 0, static_cast<const V*>(tokens.const_data_ptr()),
           static_cast<V*>(out.mutable_data_ptr()), int(row / int64_t(sizeof(V))), args);
  });
  return out;
}

Tensor gather_tokens_backward(Tensor grad_out, Tensor mask, Tensor donors, int64_t prefix) {
  const GatherArgs args = gather_args(grad_out, mask, donors, prefix);
  const Launcher launch(grad_out);
  const int64_t patches = args.tokens - prefix, width = grad_out.size(2);
  STD_TORCH_CHECK(args.images < (int64_t(1) << 31), "the batch is too large");
  Tensor out = torch::stable::empty_like(grad_out);
  Tensor lists = torch::stable::new_empty(grad_out, {3, patches, args.images}, ScalarType::Int);
  int* const source = static_cast<int*>(lists.mutable_data_ptr());
  int* const head = source + patches * args.images;
  int* const next = head + patches * args.images;
  launch(receivers_kernel, blocks(patches), 256, 0, source, head, next, args);
  for_float_type(grad_out.scalar_type(), "grad_out", [&](auto zero) {
    using T = decltype(zero);
    constexpr int kWide = 16 / int(sizeof(T));
    const T* in = static_cast<const T*>(grad_out.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    if (width % kWide == 0 && address_of(grad_out) % 16 == 0 && address_of(out) % 16 == 0) {
      launch(gather_backward_kernel<T, kWide>, warps(args), kGatherThreads, 0, in, to, int(width / kWide), args, head, next);
    } else {
      launch(gather_backward_kernel<T, 1>, warps(args), kGatherThreads, 0, in, to, int(width), args, head, next);
    }
  });
  return out;
}

}  // namespace
}  // namespace maskcf

MASKCF_KERNELS(m) {
  m.impl("gather_tokens", TORCH_BOX(&maskcf::gather_tokens));
  m.impl("gather_tokens_backward", TORCH_BOX(&maskcf::gather_tokens_backward));
}
