// The kernels for AVX2.
#define MASKCF_VECTOR_BYTES 32
#define MASKCF_TILE_ROWS 6
#include "kernels_all.h"

maskcf::Kernels maskcf::kernels_avx2() { return all_kernels(); }
