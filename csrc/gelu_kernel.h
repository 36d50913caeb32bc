// The body of bias_gelu for the CPU (kernels_all.h): each row is read once and written once.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace maskcf {
namespace {

// The normal distribution's, from its bell exp(-z² / 2): a polynomial for erfc(x) exp(x²), in 1 / (1 + x / 2), to 4e-8
// of the value in either tail.
inline Vector<float> normal_cdf(Vector<float> z, Vector<float> bell) {
  using V = Vector<float>;
  const V t = 1.0f / (1.0f + 0.353553391f * (z < 0.0f ? -z : z));
  V y = V{} - 0.05889177f;
  y = y * t + 0.28370669f;
  y = y * t - 0.48539314f;
  y = y * t + 0.27598849f;
  y = y * t - 0.02518447f;
  y = y * t + 0.20207255f;
  y = y * t + 0.24326037f;
  y = y * t + 0.28235358f;
  y = y * t + 0.28208768f;
  const V tail = 0.5f * bell * t * y;
  return z < 0.0f ? tail : 1.0f - tail;
}
inline Vector<double> normal_cdf(Vector<double> z, Vector<double>) {
  for (int i = 0; i < lanes_of<double>; ++i) z[i] = 0.5 * __builtin_erfc(z[i] * -0.70710678118654752);
  return z;
}

template <Gelu kind, class W>
inline Vector<W> gelu_of(Vector<W> z, Vector<W>& slope) {
  using V = Vector<W>;
  if constexpr (kind == Gelu::kErf) {
    const V bell = exp_of(z * z * W(-0.5));
    const V cdf = normal_cdf(z, bell);
    slope = cdf + z * bell * W(0.39894228040143268);  // 1 / sqrt(2 pi)
    return z * cdf;
  } else {  // z sigmoid(y)
    constexpr W kRoot = W(1.5957691216057308);  // 2 sqrt(2 / pi)
    const V y = kind == Gelu::kQuick ? z * W(1.702) : kRoot * z * (W(1) + W(0.044715) * z * z);
    const V dy = kind == Gelu::kQuick ? V{} + W(1.702) : kRoot * (W(1) + W(3 * 0.044715) * z * z);
    const V small = exp_of(y < W(0) ? y : -y), most = W(1) / (W(1) + small), least = small * most;
    const V sigmoid = y < W(0) ? least : most;
    slope = sigmoid + z * most * least * dy;
    return z * sigmoid;
  }
}

template <Gelu kind, class T>
void gelu_rows(const GeluRows& rows) {
  using W = typename Wider<T>::type;
  const W* bias = static_cast<const W*>(rows.bias);
  const T* x = static_cast<const T*>(rows.x);
  T* out = static_cast<T*>(rows.out);
  for (int64_t row = 0; row < rows.rows; ++row, x += rows.width, out += rows.width) {
    for_vectors<W>(rows.width, [&](int64_t i, int count) {
      Vector<W> slope;
      store(gelu_of<kind, W>(load(x + i, count) + load(bias + i, count), slope), out + i, count);
    });
  }
}

template <Gelu kind, class T>
void gelu_rows_backward(const GeluRows& rows) {
  using W = typename Wider<T>::type;
  const W* bias = static_cast<const W*>(rows.bias);
  W* sums = static_cast<W*>(rows.bias_grad);
  const T* x = static_cast<const T*>(rows.x);
  const T* grad = static_cast<const T*>(rows.grad);
  T* out = static_cast<T*>(rows.out);
  for (int64_t row = 0; row < rows.rows; ++row, x += rows.width, grad += rows.width, out += rows.width) {
    for_vectors<W>(rows.width, [&](int64_t i, int count) {
      Vector<W> slope;
      gelu_of<kind, W>(load(x + i, count) + load(bias + i, count), slope);
      const Vector<W> found = load(grad + i, count) * slope;
      store(found, out + i, count);
      store(load(sums + i, count) + found, sums + i, count);
    });
  }
}

template <Gelu kind>
void gelu_of_element(Element element, const GeluRows& rows, bool backward) {
  for_element(element, [&](auto zero) {
    using T = decltype(zero);
    (backward ? gelu_rows_backward<kind, T> : gelu_rows<kind, T>)(rows);
  });
}

void gelu_of_kind(Element element, Gelu kind, const GeluRows& rows, bool backward) {
  switch (kind) {
    case Gelu::kErf: return gelu_of_element<Gelu::kErf>(element, rows, backward);
    case Gelu::kTanh: return gelu_of_element<Gelu::kTanh>(element, rows, backward);
    case Gelu::kQuick: return gelu_of_element<Gelu::kQuick>(element, rows, backward);
  }
}

void bias_gelu(Element element, Gelu kind, const GeluRows& rows) { gelu_of_kind(element, kind, rows, false); }
void bias_gelu_backward(Element element, Gelu kind, const GeluRows& rows) { gelu_of_kind(element, kind, rows, true); }

}  // namespace
}  // namespace maskcf
