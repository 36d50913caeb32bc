// Marks what both compilers see: the algorithms are written once and run on the CPU and the GPU.
#pragma once

#ifdef __CUDACC__
#define MASKCF_HD __host__ __device__ __forceinline__
#else
#define MASKCF_HD inline
#endif
