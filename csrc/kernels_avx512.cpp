// The kernels for AVX512.
#define MASKCF_VECTOR_BYTES 64
#define MASKCF_TILE_ROWS 12
#include "kernels_all.h"

maskcf::Kernels maskcf::kernels_avx512() { return all_kernels(); }
