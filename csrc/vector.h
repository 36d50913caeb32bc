// Vectors of the instruction set that the including file is compiled for (kernels_all.h), and the storage formats.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace maskcf {
namespace {

template <class W>
struct VectorOf {
  typedef W type __attribute__((vector_size(MASKCF_VECTOR_BYTES)));
};
template <class W>
using Vector = typename VectorOf<W>::type;
template <class W>
constexpr int lanes_of = MASKCF_VECTOR_BYTES / sizeof(W);

struct Float16 {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

template <class T>
struct Wider {
  using type = float;
};
template <>
struct Wider<double> {
  using type = double;
};

// Calls f(T{}) with the storage format of an element.
template <class F>
inline void for_element(Element element, const F& f) {
  switch (element) {
    case Element::kFloat32: return f(float{});
    case Element::kFloat64: return f(double{});
    case Element::kFloat16: return f(Float16{});
    case Element::kBFloat16: return f(Bfloat16{});
  }
}

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Bfloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
// The exponent and mantissa moved into place are the value over 2^112, subnormals too; infinity and NaN come out at
// 65536 or above, where no float16 is.
inline float widen(Float16 x) {
  const float magnitude = bits_as<float>(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 65536.0f ? 0x7f800000u : 0u;
  return bits_as<float>(bits_as<uint32_t>(magnitude) | special | uint32_t(x.bits & 0x8000) << 16);
}

// To the nearest, ties to even; a NaN stays one.
inline void narrow(float x, float& to) { to = x; }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(float x, Bfloat16& to) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
// Added to a power of two whose last bit is that of the result, the value is rounded by the addition. The least such
// power is the one of subnormal results; the first two factors, 4 in all, bring what is too large to infinity.
inline void narrow(float x, Float16& to) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000, twice = bits + bits;
  const float magnitude = bits_as<float>(bits & 0x7fffffff) * 0x1p112f * 0x1p-110f;
  const uint32_t exponent = (twice & 0xff000000) < 0x71000000 ? 0x71000000 : twice & 0xff000000;
  const uint32_t sum = bits_as<uint32_t>(bits_as<float>((exponent >> 1) + 0x07800000) + magnitude);
  const uint32_t rounded = (sum >> 13 & 0x7c00) + (sum & 0x0fff);
  to.bits = uint16_t(sign | (twice > 0xff000000 ? 0x7e00 : rounded));
}

// A vector from `lanes_of` values in memory, and back.
template <class T>
inline Vector<typename Wider<T>::type> load(const T* from) {
  using W = typename Wider<T>::type;
  Vector<W> x;
  if constexpr (sizeof(T) == sizeof(W)) {
    memcpy(&x, from, sizeof x);
  } else {
    W wide[lanes_of<W>];
    for (int i = 0; i < lanes_of<W>; ++i) wide[i] = widen(from[i]);
    memcpy(&x, wide, sizeof x);
  }
  return x;
}
template <class T>
inline void store(Vector<typename Wider<T>::type> x, T* to) {
  using W = typename Wider<T>::type;
  if constexpr (sizeof(T) == sizeof(W)) {
    memcpy(to, &x, sizeof x);
  } else {
    W wide[lanes_of<W>];
    memcpy(wide, &x, sizeof x);
    for (int i = 0; i < lanes_of<W>; ++i) narrow(wide[i], to[i]);
  }
}

// Calls f(column, count) for every vector of a row; the last may hold fewer than its lanes.
template <class W, class F>
inline void for_vectors(int64_t width, const F& f) {
  int64_t i = 0;
  for (; i + lanes_of<W> <= width; i += lanes_of<W>) f(i, lanes_of<W>);
  if (i < width) f(i, int(width - i));
}

template <class T>
inline Vector<typename Wider<T>::type> load(const T* from, int count) {
  constexpr int lanes = lanes_of<typename Wider<T>::type>;
  if (count == lanes) return load(from);
  T padded[lanes] = {};
  memcpy(padded, from, size_t(count) * sizeof(T));
  return load(padded);
}
template <class T>
inline void store(Vector<typename Wider<T>::type> x, T* to, int count) {
  constexpr int lanes = lanes_of<typename Wider<T>::type>;
  if (count == lanes) return store(x, to);
  T padded[lanes];
  store(x, padded);
  memcpy(to, padded, size_t(count) * sizeof(T));
}

// exp(x) for x <= 0 to about 1 ulp: a power of two, times a polynomial on [-ln 2 / 2, ln 2 / 2]. Below -86 the result
// is 0 (the true one is under 1e-37).
inline Vector<float> exp_of(Vector<float> x) {
  using V = Vector<float>;
  using I = Vector<uint32_t>;  // below the cut the sum wraps, unused
  const V shifter = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds, and leaves the integer in the low bits
  const V shifted = x * 1.44269504f + shifter;
  const V n = shifted - shifter;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  V y = V{} + 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const I scaled = bits_as<I>(y) + (bits_as<I>(shifted) << 23);
  return x < -86.0f ? V{} : bits_as<V>(scaled);
}
inline Vector<double> exp_of(Vector<double> x) {
  for (int i = 0; i < lanes_of<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

}  // namespace
}  // namespace maskcf
