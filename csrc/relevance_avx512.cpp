// The relevance kernel compiled for AVX512.
#define MASKCF_VECTOR_BYTES 64
#define MASKCF_TILE_ROWS 12
#include "relevance_kernel.h"

maskcf::RelevanceKernel maskcf::relevance_avx512() { return {scratch_bytes, run}; }
