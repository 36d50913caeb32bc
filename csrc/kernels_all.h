// All kernels for one instruction set. Each kernels_<instruction set>.cpp includes this once, compiled for that set,
// after defining MASKCF_VECTOR_BYTES and MASKCF_TILE_ROWS. Everything in the files below is internal to that one, and
// nothing from the standard library is instantiated: an inline function that the linker merged with another file's
// could be compiled for instructions that the machine lacks.
#pragma once

#include "gelu_kernel.h"
#include "kernels.h"
#include "norm_kernel.h"
#include "relevance_kernel.h"

namespace maskcf {
namespace {

Kernels all_kernels() {
  return {relevance_scratch_bytes, relevance,     bias_gelu,
          bias_gelu_backward,      residual_norm, residual_norm_backward};
}

}  // namespace
}  // namespace maskcf
