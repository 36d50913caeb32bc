// The body of residual_norm for the CPU (kernels_all.h). A row comes from memory once; what is read of it again lies in
// the nearest cache.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace maskcf {
namespace {

template <class W>
inline W sum_of(Vector<W> x) {
  W lanes[lanes_of<W>];
  memcpy(lanes, &x, sizeof x);
  for (int half = lanes_of<W> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <class W>
struct Statistics {
  W mean, scale;  // scale is 1 / sqrt(variance + eps)
};

template <class W, class T>
inline Statistics<W> statistics_of(const T* row, int64_t width, W eps) {
  Vector<W> sum{}, squares{};
  for_vectors<W>(width, [&](int64_t i, int count) { sum += load(row + i, count); });
  const W mean = sum_of<W>(sum) / W(width);
  for_vectors<W>(width, [&](int64_t i, int count) {
    Vector<W> off = load(row + i, count) - mean;
    for (int lane = count; lane < lanes_of<W>; ++lane) off[lane] = 0;
    squares += off * off;
  });
  return {mean, W(1) / W(__builtin_sqrt(sum_of<W>(squares) / W(width) + eps))};
}

template <class T>
void norm_rows(const NormRows& rows, const NormForward& to) {
  using W = typename Wider<T>::type;
  const W *weight = static_cast<const W*>(rows.weight), *bias = static_cast<const W*>(rows.bias);
  const T *x = static_cast<const T*>(to.x), *branch = static_cast<const T*>(to.branch);
  T *total = static_cast<T*>(to.total), *normed = static_cast<T*>(to.normed);
  const int64_t width = rows.width;
  for (int64_t row = 0; row < rows.rows; ++row, x += width, normed += width) {
    const T* sum = x;
    if (branch) {
      for_vectors<W>(width, [&](int64_t i, int count) {
        store(load(x + i, count) + load(branch + i, count), total + i, count);
      });
      sum = total;
      branch += width, total += width;
    }
    const Statistics<W> found = statistics_of<W>(sum, width, W(rows.eps));
    for_vectors<W>(width, [&](int64_t i, int count) {
      const Vector<W> z = (load(sum + i, count) - found.mean) * found.scale;
      store(z * load(weight + i, count) + load(bias + i, count), normed + i, count);
    });
  }
}

template <class T>
void norm_rows_backward(const NormRows& rows, const NormBackward& to) {
  using W = typename Wider<T>::type;
  const W* weight = static_cast<const W*>(rows.weight);
  W *weight_grad = static_cast<W*>(to.weight_grad), *bias_grad = static_cast<W*>(to.bias_grad);
  const T *grad_total = static_cast<const T*>(to.grad_total), *grad_normed = static_cast<const T*>(to.grad_normed);
  const T* total = static_cast<const T*>(to.total);
  T* grad = static_cast<T*>(to.grad);
  const int64_t width = rows.width;
  for (int64_t row = 0; row < rows.rows; ++row) {
    const Statistics<W> found = statistics_of<W>(total, width, W(rows.eps));
    Vector<W> plain{}, along{};  // of the gradient times the weight: the sum, and that of its product with the norm
    for_vectors<W>(width, [&](int64_t i, int count) {
      const Vector<W> z = (load(total + i, count) - found.mean) * found.scale, g = load(grad_normed + i, count);
      const Vector<W> weighted = g * load(weight + i, count);
      plain += weighted;
      along += weighted * z;
      store(load(weight_grad + i, count) + g * z, weight_grad + i, count);
      store(load(bias_grad + i, count) + g, bias_grad + i, count);
    });
    const W mean = sum_of<W>(plain) / W(width), slope = sum_of<W>(along) / W(width);
    for_vectors<W>(width, [&](int64_t i, int count) {
      const Vector<W> z = (load(total + i, count) - found.mean) * found.scale;
      const Vector<W> weighted = load(grad_normed + i, count) * load(weight + i, count);
      const Vector<W> inner = found.scale * (weighted - mean - z * slope);
      store(grad_total ? load(grad_total + i, count) + inner : inner, grad + i, count);
    });
    if (grad_total) grad_total += width;
    grad_normed += width, total += width, grad += width;
  }
}

void residual_norm(Element element, const NormRows& rows, const NormForward& to) {
  for_element(element, [&](auto zero) { norm_rows<decltype(zero)>(rows, to); });
}

void residual_norm_backward(Element element, const NormRows& rows, const NormBackward& to) {
  for_element(element, [&](auto zero) { norm_rows_backward<decltype(zero)>(rows, to); });
}

}  // namespace
}  // namespace maskcf
