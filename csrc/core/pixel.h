// Normalising one pixel value.
#pragma once

#include <cstdint>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "macros.h"

namespace maskcf {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

// The type that arithmetic on a pixel happens in.
template <class In>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

template <class In>
MASKCF_HD typename Wide<In>::type widen(In value) {
  return static_cast<typename Wide<In>::type>(value);
}
template <>
MASKCF_HD float widen<uint8_t>(uint8_t value) {
  return float(value) / 255.0f;
}

// A double reaches a half type by way of float, as PyTorch's own conversion does.
template <class Out, class W>
MASKCF_HD Out narrow_to(W value) {
  return static_cast<Out>(value);
}
template <>
MASKCF_HD Half narrow_to<Half, double>(double value) {
  return Half(float(value));
}
template <>
MASKCF_HD BFloat16 narrow_to<BFloat16, double>(double value) {
  return BFloat16(float(value));
}

template <class Out, class In, class W>
MASKCF_HD Out normalised(In value, W mean, W std) {
  return narrow_to<Out, W>((widen<In>(value) - mean) / std);
}

}  // namespace maskcf
