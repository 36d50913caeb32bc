// Launching kernels from the stable interface: the stream, the device, errors.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "ops.h"

// Absent from a PyTorch without CUDA, which must still load this library: there, nothing calls them.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

namespace maskcf {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch() { STD_CUDA_CHECK(cudaGetLastError()); }

inline void check_same_device(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(b.is_cuda() && a.get_device_index() == b.get_device_index(), "tensors must be on one GPU");
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

// Calls f(V{}) with the vector type of that many bytes.
template <class F>
void for_access(int bytes, const F& f) {
  switch (bytes) {
    case 16: return f(uint4{});
    case 8: return f(uint2{});
    case 4: return f(uint32_t{});
    case 2: return f(uint16_t{});
    default: return f(uint8_t{});
  }
}

inline int64_t address_of(const Tensor& tensor) { return reinterpret_cast<int64_t>(tensor.const_data_ptr()); }

}  // namespace maskcf
