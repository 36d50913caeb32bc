// The kernels for any machine.
#define MASKCF_VECTOR_BYTES 16
#define MASKCF_TILE_ROWS 6
#include "kernels_all.h"

maskcf::Kernels maskcf::kernels_default() { return all_kernels(); }
