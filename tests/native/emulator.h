// The words of CUDA on a CPU: takes the place of what csrc/device.h says for nvcc, so that kernels and their launches
// run as they are written. Blocks run one after another, the threads of a block as fibers that change over only where
// CUDA's threads wait for each other. What a kernel may not do is an error here: see emulator.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// The tensors are the CPU's.
#define MASKCF_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(maskcf, CPU, m)

#define MASKCF_SHARED(name, ...)                                    \
  static maskcf::emulator::Shared<__VA_ARGS__> shared_##name##_;    \
  auto& name = shared_##name##_.value
#define MASKCF_DYNAMIC_SHARED(name) char* const name = maskcf::emulator::dynamic_shared()

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs.
extern dim3 threadIdx, blockIdx, blockDim;

namespace maskcf {
namespace emulator {

// Runs `thread` for every thread of every block. Throws what a GPU would refuse, or could do but should not.
void run(const void* kernel, dim3 grid, int threads, size_t shared, const std::function<void()>& thread);

// Ends the kernel that runs, from inside one of its threads.
[[noreturn]] void stop(const char* why);

// Every thread of the block comes here before any goes on; whether one of them said true.
bool meet_block(bool says);

// Every lane of the warp hands in up to 32 bytes; what all of them did, good until this lane's next exchange.
struct alignas(16) Word32 {
  char bytes[32];
};
const Word32* exchange(const void* mine, size_t bytes);

char* dynamic_shared();

// Shared memory holds garbage when a block begins.
void poison_before_blocks(void* memory, size_t bytes);
template <class T>
struct Shared {
  T value;
  Shared() { poison_before_blocks(&value, sizeof value); }
};

template <class T>
T lane_value(const Word32* all, int lane) {
  T value;
  std::memcpy(&value, all[lane].bytes, sizeof value);
  return value;
}

using ToFloat = float (*)(uint16_t);
void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], ToFloat to_float);

}  // namespace emulator

constexpr unsigned kAllLanes = 0xffffffffu;

inline void mma_bfloat16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emulator::mma(c, a, b, [](uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  });
}
inline void mma_float16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emulator::mma(c, a, b, [](uint16_t bits) { return torch::headeronly::detail::fp16_ieee_to_fp32_value(bits); });
}

[[noreturn]] inline void fail() { emulator::stop("a kernel met an index that must not be"); }

class Launcher {
 public:
  explicit Launcher(const torch::stable::Tensor&) {}

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
                  const Arguments&... arguments) const {
    emulator::run(reinterpret_cast<const void*>(kernel), grid, threads, shared, [&] { kernel(arguments...); });
  }
};

}  // namespace maskcf

inline void __syncthreads() { maskcf::emulator::meet_block(false); }
inline int __syncthreads_or(int says) { return maskcf::emulator::meet_block(says != 0); }

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int mask) {
  if (lanes != maskcf::kAllLanes) maskcf::emulator::stop("a shuffle of some lanes is not emulated");
  const auto* all = maskcf::emulator::exchange(&value, sizeof value);
  return maskcf::emulator::lane_value<T>(all, int(threadIdx.x % 32) ^ mask);
}

inline int atomicAdd(int* sum, int value) {
  const int before = *sum;
  *sum += value;
  return before;
}
