// What the implementations of an op for the CPU and for CUDA share: checked arguments, outputs, dispatch on dtypes.
// An op's arguments are those of its contract, maskcf_fast/ops/<op>/reference.py. N images, L patches, T tokens.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "core/address.h"
#include "core/pixel.h"
#include "core/select.h"
#include "kernels.h"

namespace maskcf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  if (t.dim() != int64_t(shape.size())) return false;
  int64_t i = 0;
  for (int64_t size : shape) {
    if (t.size(i++) != size) return false;
  }
  return true;
}

// Calls f(T{}) with the C++ type of a float dtype.
template <class F>
void for_float_type(ScalarType dtype, const char* name, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: STD_TORCH_CHECK(false, name, " must be a float tensor");
  }
}

// Same with f(float{}) or f(double{}).
template <class F>
void for_wide_type(ScalarType dtype, const char* name, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    default: STD_TORCH_CHECK(false, name, " must be float32 or float64");
  }
}

inline Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Element::kFloat32;
    case ScalarType::Double: return Element::kFloat64;
    case ScalarType::Half: return Element::kFloat16;
    case ScalarType::BFloat16: return Element::kBFloat16;
    default: STD_TORCH_CHECK(false, "only float tensors are taken");
  }
}

// The kernels take rows in memory one after another: the checks of arguments see to it, where it costs a copy.
inline void make_dense(Tensor& t) {
  if (!t.is_contiguous()) t = torch::stable::contiguous(t);
}

inline void check_cam(Tensor& cam, std::optional<double> threshold, std::optional<int64_t> top_k) {  // [N, L]
  STD_TORCH_CHECK(cam.dim() == 2, "cam must have shape [N, L]");
  STD_TORCH_CHECK(cam.size(1) < (int64_t(1) << 31), "cam has too many patches");
  STD_TORCH_CHECK(threshold.has_value() != top_k.has_value(), "exactly one of threshold and top_k must be given");
  STD_TORCH_CHECK(!top_k || (*top_k >= 0 && *top_k <= cam.size(1)), "top_k must lie between 0 and L");
  make_dense(cam);
}

inline void check_donors(Tensor& donors, int64_t n, int64_t patches) {  // [N] or [N, L]
  STD_TORCH_CHECK(donors.scalar_type() == ScalarType::Long, "donors must be int64");
  STD_TORCH_CHECK(has_shape(donors, {n}) || has_shape(donors, {n, patches}), "donors must have shape [N] or [N, L]");
  make_dense(donors);
}

inline void check_mask(Tensor& mask, int64_t n, int64_t patches) {  // [N, L]
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "mask must be bool");
  STD_TORCH_CHECK(has_shape(mask, {n, patches}), "mask must have shape [N, L]");
  make_dense(mask);
}

// As PyTorch sees it: the stride of a dimension of one says nothing.
inline bool is_channels_last(const Tensor& t) {
  int64_t dense = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != dense) return false;
    dense *= t.size(dim);
  }
  return true;
}

// The patch grid of images [N, C, H, W], which become contiguous unless they are channels-last.
inline PatchGrid patch_grid(Tensor& images, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(images.dim() == 4, "images must have shape [N, C, H, W]");
  if (!is_channels_last(images)) make_dense(images);
  const bool contiguous = images.is_contiguous();
  const int64_t c = images.size(1), h = images.size(2), w = images.size(3);
  STD_TORCH_CHECK(rows > 0 && cols > 0 && h % rows == 0 && w % cols == 0, "images must divide into the patch grid");
  const int64_t pixel = int64_t(images.element_size()) * (contiguous ? 1 : c);
  return {images.size(0), contiguous ? c : 1, rows, cols, h / rows, w / cols * pixel};
}

// Memory safety does not rest on the caller: on the CPU, where reading them is cheap, the values are checked here too.
inline void check_donor_values(const Tensor& donors, int64_t n) {
  const int64_t* donor = static_cast<const int64_t*>(donors.const_data_ptr());
  for (int64_t i = 0; i < donors.numel(); ++i)
    STD_TORCH_CHECK(donor[i] >= 0 && donor[i] < n, "donors must index the batch, 0 to ", n - 1, ", got ", donor[i]);
}

inline const int64_t* donor_data(const Tensor& donors) { return static_cast<const int64_t*>(donors.const_data_ptr()); }
inline const bool* mask_data(const Tensor& mask) { return static_cast<const bool*>(mask.const_data_ptr()); }

template <class T>
Selection<T> selection(std::optional<double> threshold, std::optional<int64_t> top_k, bool context) {
  return {threshold.has_value(), context, T(threshold.value_or(0.0)), top_k.value_or(0)};
}

// Checked arguments of patchify.
struct PatchifyShape {
  int64_t n, c, rows, cols, p;
  ImageStrides strides;
  bool bytes;
};

inline PatchifyShape patchify_shape(const Tensor& images, int64_t p, size_t means, size_t stds) {
  STD_TORCH_CHECK(images.dim() == 4, "images must have four dimensions");
  const bool bytes = images.scalar_type() == ScalarType::Byte;  // [N, H, W, C], else [N, C, H, W]
  const int ci = bytes ? 3 : 1, yi = bytes ? 1 : 2, xi = bytes ? 2 : 3;
  STD_TORCH_CHECK(p > 0 && images.size(yi) % p == 0 && images.size(xi) % p == 0, "images must divide into patches");
  STD_TORCH_CHECK(int64_t(means) == images.size(ci) && int64_t(stds) == images.size(ci),
                  "mean and std must have one value per channel");
  return {images.size(0),
          images.size(ci),
          images.size(yi) / p,
          images.size(xi) / p,
          p,
          {images.stride(0), images.stride(ci), images.stride(yi), images.stride(xi)},
          bytes};
}

inline void check_tokens(Tensor& tokens, Tensor& mask, Tensor& donors, int64_t prefix) {
  STD_TORCH_CHECK(tokens.dim() == 3, "tokens must have shape [N, T, D]");
  make_dense(tokens);
  STD_TORCH_CHECK(prefix >= 0 && prefix < tokens.size(1), "prefix must lie between 0 and T - 1");
  check_mask(mask, tokens.size(0), tokens.size(1) - prefix);
  check_donors(donors, tokens.size(0), tokens.size(1) - prefix);
}

inline void check_relevance(Tensor& q, Tensor& k, Tensor& v, Tensor& grad_out, Tensor& relevance) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k must have shape [N, H, T, d]");
  const int64_t n = q.size(0), h = q.size(1), tq = q.size(2), t = k.size(2), d = q.size(3);
  STD_TORCH_CHECK(has_shape(k, {n, h, t, d}) && has_shape(v, {n, h, t, d}), "k and v must have shape [N, H, T, d]");
  STD_TORCH_CHECK(has_shape(grad_out, {n, h, tq, d}), "grad_out must be like q");
  STD_TORCH_CHECK(tq == 1 || tq == t, "q must have T queries or 1");
  STD_TORCH_CHECK(has_shape(relevance, {n, t}), "relevance must have shape [N, T]");
  const ScalarType wide = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(relevance.scalar_type() == wide, "relevance must be float32, or float64 with float64 q");
  make_dense(relevance);
  for (Tensor* x : {&q, &k, &v, &grad_out}) {
    STD_TORCH_CHECK(x->scalar_type() == q.scalar_type(), "q, k, v and grad_out must have one dtype");
    // Any layout will do as long as a token's head is contiguous, which a view of a packed projection is.
    if (x->stride(3) != 1) make_dense(*x);
  }
}

// Rows [..., D], and a value for each of their columns, which the message calls `name`.
inline void check_rows(Tensor& x, Tensor& columns, const char* name) {
  STD_TORCH_CHECK(x.dim() > 0 && columns.dim() == 1 && columns.size(0) == x.size(x.dim() - 1), name,
                  " must have shape [D]");
  STD_TORCH_CHECK(columns.size(0) > 0, "rows must not be empty");
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(columns.scalar_type() == wide, name, " must be float32, or float64 with float64 x");
  make_dense(x);
  make_dense(columns);
}

// A further tensor of x's shape and dtype, such as its gradient.
inline void check_like(Tensor& other, const Tensor& x) {
  bool alike = other.dim() == x.dim() && other.scalar_type() == x.scalar_type();
  for (int64_t i = 0; alike && i < x.dim(); ++i) alike = other.size(i) == x.size(i);
  STD_TORCH_CHECK(alike, "tensors that belong together must have one shape and dtype");
  make_dense(other);
}

}  // namespace maskcf
