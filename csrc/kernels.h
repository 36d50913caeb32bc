// What is compiled once per instruction set of the CPU, and the interface to it: rows and heads of plain memory.
#pragma once

#include <cstdint>

namespace maskcf {

enum class Element { kFloat32, kFloat64, kFloat16, kBFloat16 };

// Attention relevance of one head of one image. Rows are `*_row` elements apart and contiguous in themselves.
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

enum class Gelu { kErf, kTanh, kQuick };  // as maskcf_fast/ops/bias_gelu/reference.py counts them

// Rows of bias_gelu, one after another.
struct GeluRows {
  const void* x;     // [rows, width], before the bias
  const void* bias;  // [width], float (double for float64)
  const void* grad;  // [rows, width] of the result; the backward pass alone
  void* out;         // [rows, width]: the result, or x's gradient
  void* bias_grad;   // [width], float (double for float64): the backward pass adds these rows to it
  int64_t rows, width;
};

// Rows of residual_norm, one after another.
struct NormRows {
  const void* weight;  // [width], float (double for float64), and so all else that is not said to be rows
  const void* bias;    // [width]; the forward pass alone
  double eps;
  int64_t rows, width;
};
struct NormForward {
  const void *x, *branch;  // rows; a branch may be missing, and then the sum is
  void *total, *normed;    // rows
};
struct NormBackward {
  const void *grad_total, *grad_normed, *total;  // rows; the first may be missing
  void* grad;                                    // rows
  void *weight_grad, *bias_grad;                 // [width]: these rows are added to them
};

struct Kernels {
  int64_t (*relevance_scratch_bytes)(Element, int64_t t, int64_t d);
  void (*relevance)(Element, const Head&, void* scratch);  // scratch is aligned to 64 bytes
  void (*bias_gelu)(Element, Gelu, const GeluRows&);
  void (*bias_gelu_backward)(Element, Gelu, const GeluRows&);
  void (*residual_norm)(Element, const NormRows&, const NormForward&);
  void (*residual_norm_backward)(Element, const NormRows&, const NormBackward&);
};

Kernels kernels_default();
#ifdef MASKCF_X86
Kernels kernels_avx2();
Kernels kernels_avx512();
#endif

const Kernels& kernels();  // those for this machine

}  // namespace maskcf
