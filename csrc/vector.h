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

// Between the bits of a 16-bit format, in the lower half of a U, and the F of float32; of one value, or of a vector.
template <class F, class U>
inline F wide_of(U bits, Bfloat16) {
  return bits_as<F>(U(bits << 16));
}
// The exponent and mantissa moved into place are the value over 2^112, subnormals too; infinity and NaN come out at
// 65536 or above, where no float16 is.
template <class F, class U>
inline F wide_of(U bits, Float16) {
  const F magnitude = bits_as<F>(U((bits & 0x7fff) << 13)) * 0x1p112f;
  const U special = magnitude >= 65536.0f ? U{} + 0x7f800000u : U{};
  return bits_as<F>(U(bits_as<U>(magnitude) | special | (bits & 0x8000) << 16));
}
// To the nearest, ties to even; a NaN stays one.
template <class U, class F>
inline U bits_of(F x, Bfloat16) {
  const U bits = bits_as<U>(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? U{} + 0x7fc0u : rounded;
}
// Added to a power of two whose last bit is that of the result, the value is rounded by the addition. The least such
// power is the one of subnormal results; the first two factors, 4 in all, bring what is too large to infinity.
template <class U, class F>
inline U bits_of(F x, Float16) {
  const U bits = bits_as<U>(x), sign = bits >> 16 & 0x8000, twice = bits + bits;
  const F magnitude = bits_as<F>(U(bits & 0x7fffffff)) * 0x1p112f * 0x1p-110f;
  const U exponent = (twice & 0xff000000) < 0x71000000 ? U{} + 0x71000000u : twice & 0xff000000;
  const U sum = bits_as<U>(F(bits_as<F>(U((exponent >> 1) + 0x07800000)) + magnitude));
  const U rounded = (sum >> 13 & 0x7c00) + (sum & 0x0fff);
  return sign | (twice > 0xff000000 ? U{} + 0x7e00u : rounded);
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
template <class T>
inline float widen(T x) {
  return wide_of<float>(uint32_t(x.bits), T{});
}

// A vector from `lanes_of` values in memory, and back.
typedef uint16_t Halves __attribute__((vector_size(MASKCF_VECTOR_BYTES / 2)));

template <class T>
inline Vector<typename Wider<T>::type> load(const T* from) {
  using W = typename Wider<T>::type;
  if constexpr (sizeof(T) == sizeof(W)) {
    Vector<W> x;
    memcpy(&x, from, sizeof x);
    return x;
  } else {
    Halves bits;
    memcpy(&bits, from, sizeof bits);
    return wide_of<Vector<W>>(__builtin_convertvector(bits, Vector<uint32_t>), T{});
  }
}
template <class T>
inline void store(Vector<typename Wider<T>::type> x, T* to) {
  using W = typename Wider<T>::type;
  if constexpr (sizeof(T) == sizeof(W)) {
    memcpy(to, &x, sizeof x);
  } else {
    const Halves bits = __builtin_convertvector(bits_of<Vector<uint32_t>>(x, T{}), Halves);
    memcpy(to, &bits, sizeof bits);
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
