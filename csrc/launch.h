// What the launches of all kernels share: checks, and the width of accesses.
#pragma once

#include <algorithm>

#include "device.h"
#include "ops.h"

namespace maskcf {

inline void check_same_device(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index(),
                  "tensors must be on one GPU");
}

// Blocks of a grid dimension, checked against what a launch can hold.
inline unsigned blocks(int64_t count) {
  STD_TORCH_CHECK(count < (int64_t(1) << 31), "too many rows for one launch");
  return unsigned(count);
}

// The widest access, up to 16 bytes, that divides all of these.
inline int access_bytes(std::initializer_list<int64_t> sizes) {
  int64_t bits = 16;
  for (int64_t size : sizes) bits |= size;
  return int(bits & -bits);
}

// Calls f(V{}) with the vector type of that many bytes, or of kLeast.
template <int kLeast = 1, class F>
void for_access(int bytes, const F& f) {
  switch (bytes) {
    case 16: return f(uint4{});
    case 8: return f(uint2{});
    case 4: return f(uint32_t{});
    case 2: return f(uint16_t{});
  }
  if constexpr (kLeast == 1) f(uint8_t{});
}

inline int64_t address_of(const Tensor& tensor) { return reinterpret_cast<int64_t>(tensor.const_data_ptr()); }

}  // namespace maskcf
