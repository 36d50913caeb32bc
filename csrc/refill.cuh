// Pixel refill: a block copies some lines of one row of patches, every byte once, in accesses as wide as the layout
// allows.
#pragma once

#include "core/address.h"
#include "select.cuh"

namespace maskcf {

struct RefillArgs {
  PatchGrid grid;
  const char* in;
  char* out;
  const int64_t* donors;  // [N] or [N, L]
  bool donor_per_patch;
  int lines;  // of a row of patches, counted over all planes, that one block copies
};

// Where the mask comes from: given, or selected by every block for itself from the image's map.
struct GivenMask {
  const bool* mask;  // [N, L]

  __device__ auto of_image(int64_t n, int64_t patches) const {
    const bool* row = mask + n * patches;
    return [row](int64_t p) { return row[p]; };
  }
  __device__ void keep(int64_t, bool) const {}
};

template <class T>
struct SelectedMask {
  const T* cam;  // [N, L]
  Selection<T> s;
  bool* mask;  // [N, L]

  __device__ auto of_image(int64_t n, int64_t patches) const {
    const T* row = cam + n * patches;
    const Rule<T> rule = block_rule(row, int(patches), s);
    return [row, rule](int64_t p) { return rule.selects(row[p], p); };
  }
  __device__ void keep(int64_t i, bool masked) const { mask[i] = masked; }
};

constexpr int kRefillThreads = 256;

// Grid: x counts rows of patches of all images, y groups of lines. Dynamic shared memory: one int64 per column.
template <class V, class Mask>
__global__ void __launch_bounds__(kRefillThreads, 4) refill_kernel(RefillArgs args, Mask mask) {
  MASKCF_DYNAMIC_SHARED(memory);
  int64_t* source = reinterpret_cast<int64_t*>(memory);  // [cols]
  const PatchGrid& grid = args.grid;
  const int64_t n = int64_t(blockIdx.x) / grid.rows, row = int64_t(blockIdx.x) % grid.rows;
  const auto masked = mask.of_image(n, grid.patches());
  for (int64_t col = threadIdx.x; col < grid.cols; col += blockDim.x) {
    const int64_t p = row * grid.cols + col;
    const bool refilled = masked(p);
    source[col] = source_of(n, p, grid.patches(), refilled, args.donors, args.donor_per_patch);
    if (uint64_t(source[col]) >= uint64_t(grid.images)) fail();
    if (blockIdx.y == 0) mask.keep(n * grid.patches() + p, refilled);
  }
  __syncthreads();

  const int first = int(blockIdx.y) * args.lines;
  const int all = int(grid.planes * grid.height);
  const unsigned lines = unsigned(all - first < args.lines ? all - first : args.lines);
  const unsigned per_line = unsigned(grid.line_bytes() / sizeof(V)), per_patch = unsigned(grid.run / sizeof(V));
  const unsigned height = unsigned(grid.height), items = lines * per_line;
  constexpr int kInFlight = 4;
  for (unsigned start = threadIdx.x; start < items; start += kInFlight * blockDim.x) {
    V value[kInFlight];
    int64_t to[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const unsigned item = start + unsigned(i) * blockDim.x;
      if (item >= items) break;
      const unsigned line = unsigned(first) + item / per_line, x = item % per_line;
      const unsigned plane = line / height, y = line % height;
      const int64_t from = grid.line_offset(source[x / per_patch], plane, row, y) + int64_t(x) * int64_t(sizeof(V));
      to[i] = grid.line_offset(n, plane, row, y) + int64_t(x) * int64_t(sizeof(V));
      value[i] = *reinterpret_cast<const V*>(args.in + from);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (start + unsigned(i) * blockDim.x >= items) break;
      *reinterpret_cast<V*>(args.out + to[i]) = value[i];
    }
  }
}

}  // namespace maskcf
