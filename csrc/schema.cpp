// The ops' schemas. Shapes are in brackets; N images, L patches, T = 1 + L tokens.
#include "ops.h"

STABLE_TORCH_LIBRARY(maskcf, m) {
  // cam [N, L] float32 or float64 -> mask [N, L] bool
  m.def("select_by_threshold(Tensor cam, float threshold, bool context) -> Tensor");
  m.def("select_top_k(Tensor cam, int k, bool context) -> Tensor");
  // images [N, C, H, W], mask [N, L] bool, donors [N] or [N, L] int64, L = rows * cols -> like images
  m.def("refill_patches(Tensor images, Tensor mask, Tensor donors, int rows, int cols) -> Tensor");
  // cam [N, L] float32 or float64; top-k when there is no threshold -> like images, mask [N, L] bool
  m.def(
      "counterfactual_refill(Tensor images, Tensor cam, Tensor donors, float? threshold, int top_k, bool context, "
      "int rows, int cols) -> (Tensor, Tensor)");
  // images [N, H, W, C] uint8 or [N, C, H, W] float, any strides; mask and donors together or not at all
  // -> [N, L, C * P * P] dtype
  m.def(
      "patchify(Tensor images, int patch_size, float[] mean, float[] std, ScalarType dtype, Tensor? mask, "
      "Tensor? donors) -> Tensor");
  // tokens [N, T, D], mask [N, L] bool, donors [N] or [N, L] int64 -> [N, T, D]
  m.def("gather_tokens(Tensor tokens, Tensor mask, Tensor donors) -> Tensor");
  m.def("gather_tokens_backward(Tensor grad_out, Tensor mask, Tensor donors) -> Tensor");
  // q, grad_out [N, H, Tq, d], k, v [N, H, T, d] of one float dtype, Tq = T or 1; relevance [N, T] float32 (float64
  // with float64) -> [N, T] like relevance
  m.def(
      "attention_relevance(Tensor q, Tensor k, Tensor v, Tensor grad_out, Tensor relevance, float scale) -> Tensor");
}
