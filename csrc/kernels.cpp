// The CPU kernels for this machine.
#include "kernels.h"

namespace maskcf {
namespace {

Kernels best() {
#ifdef MASKCF_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return kernels_avx512();
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernels_avx2();
#endif
  return kernels_default();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = best();
  return chosen;
}

}  // namespace maskcf
