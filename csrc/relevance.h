// Attention relevance of one head on the CPU: the interface between the loop over heads and the kernels, of which
// there is one per instruction set.
#pragma once

#include <cstdint>

namespace maskcf {

enum class Element { kFloat32, kFloat64, kFloat16, kBFloat16 };

// One head of one image. Rows are `*_row` elements apart and contiguous in themselves.
struct Head {
  const void* q;  // [Tq, d]
  const void* k;  // [T, d]
  const void* v;  // [T, d]
  const void* g;  // [Tq, d], the gradient at the attention output
  int64_t q_row, k_row, v_row, g_row;
  int64_t tq, t, d;
  double scale;
  const void* relevance;  // [Tq], float (double for float64)
  void* out;              // [T], likewise: sum over queries of relevance * max(0, P * dP)
};

struct RelevanceKernel {
  int64_t (*scratch_bytes)(Element element, int64_t t, int64_t d);
  void (*run)(Element element, const Head& head, void* scratch);  // scratch is aligned to 64 bytes
};

RelevanceKernel relevance_default();
#ifdef MASKCF_X86
RelevanceKernel relevance_avx2();
RelevanceKernel relevance_avx512();
#endif

}  // namespace maskcf
