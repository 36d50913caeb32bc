// The words of CUDA that kernels use beyond plain C++. A test can supply its own and run the kernels on a CPU.
#pragma once

#ifdef MASKCF_DEVICE_HEADER
#include MASKCF_DEVICE_HEADER
#else

#include <cuda_runtime.h>

#define MASKCF_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

namespace maskcf {

constexpr unsigned kAllLanes = 0xffffffffu;

// c += a b for a 16 x 16 and an 16 x 8 tile, spread over a warp: lane l holds of a the pairs (row, column)
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

}  // namespace maskcf

#endif
