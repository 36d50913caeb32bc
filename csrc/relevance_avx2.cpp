// The relevance kernel compiled for AVX2.
#define MASKCF_VECTOR_BYTES 32
#define MASKCF_TILE_ROWS 6
#include "relevance_kernel.h"

maskcf::RelevanceKernel maskcf::relevance_avx2() { return {scratch_bytes, run}; }
