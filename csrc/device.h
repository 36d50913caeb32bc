// The words of CUDA that kernels and their launches use beyond plain C++. A test can supply its own and run both on a
// CPU (tests/native/emulator.h).
#pragma once

#ifdef MASKCF_DEVICE_HEADER
#include MASKCF_DEVICE_HEADER
#else

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

// Absent from a PyTorch without CUDA, which must still load this library: there, nothing calls them.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

#define MASKCF_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(maskcf, CUDA, m)

// Shared memory of a block: `name` of a type that may be an array, or all that the launch asks for.
#define MASKCF_SHARED(name, ...) __shared__ typename maskcf::Same<__VA_ARGS__>::type name
#define MASKCF_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

namespace maskcf {

template <class T>
struct Same {
  using type = T;
};

constexpr unsigned kAllLanes = 0xffffffffu;

// c += a b for a 16 x 16 and a 16 x 8 tile, spread over a warp: lane l holds of a the pairs (row, column)
// (l / 4, 2 (l % 4)), eight rows below, eight columns on, and both; of b those at row 2 (l % 4), column l / 4, and eight
// rows below; of c the pair at (l / 4, 2 (l % 4)) and eight rows below.
__device__ __forceinline__ void mma_bfloat16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_float16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// An index that must not be: stops the kernel, as PyTorch's own indexing does.
__device__ __forceinline__ void fail() { __trap(); }

// Launches kernels on the GPU of a tensor, in PyTorch's current stream there.
class Launcher {
 public:
  explicit Launcher(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                  const Arguments&... arguments) const {
    constexpr size_t kEveryGpuHas = 48 << 10;
    if (shared > kEveryGpuHas) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    }
    kernel<<<grid, unsigned(threads), shared, stream_>>>(arguments...);
    STD_CUDA_CHECK(cudaGetLastError());
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace maskcf

#endif
