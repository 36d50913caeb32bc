// The relevance kernel for any machine.
#define MASKCF_VECTOR_BYTES 16
#define MASKCF_TILE_ROWS 6
#include "relevance_kernel.h"

maskcf::RelevanceKernel maskcf::relevance_default() { return {scratch_bytes, run}; }
