// Pixel refill: a block copies some lines of one row of patches, in accesses as wide as whole lines allow. Where a patch
// is not a multiple of an access wide (14 pixels), one that straddles patches is read from each of their images, and what
// belongs to each is put together: in the middle of a line most accesses are of one patch, or of two from one image.
#pragma once

#include <cstring>
#include <type_traits>

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

// Replaces what lies `bytes` or more into a vector by what another holds there.
template <class V>
__device__ __forceinline__ void replace_tail(V& vector, const V& other, int bytes) {
  using Word = std::conditional_t<sizeof(V) < 4, V, uint32_t>;
  constexpr int kWords = int(sizeof(V) / sizeof(Word)), kSize = int(sizeof(Word));
  Word words[kWords], others[kWords];
  memcpy(words, &vector, sizeof vector);
  memcpy(others, &other, sizeof other);
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int kept = bytes - i * kSize;
    const Word mask = kept <= 0 ? Word(0) : kept >= kSize ? Word(~Word(0)) : Word((Word(1) << (8 * kept)) - 1);
    words[i] = Word((words[i] & mask) | (others[i] & Word(~mask)));
  }
  memcpy(&vector, words, sizeof vector);
}

constexpr int kRefillThreads = 256;

// Grid: x counts rows of patches of all images, y groups of lines. Dynamic shared memory: one int64 per column.
// kStraddles: an access may be of several patches.
template <class V, bool kStraddles, class Mask>
__global__ void __launch_bounds__(kRefillThreads, kStraddles ? 3 : 4) refill_kernel(RefillArgs args, Mask mask) {
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
  constexpr unsigned kBytes = sizeof(V);
  const unsigned per_line = unsigned(grid.line_bytes() / kBytes), run = unsigned(grid.run);
  const unsigned per_patch = run / kBytes;  // where none straddles
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
      const auto at = [&](int64_t image) { return grid.line_offset(image, plane, row, y) + int64_t(x) * kBytes; };
      const auto load = [&](int64_t image) { return *reinterpret_cast<const V*>(args.in + at(image)); };
      to[i] = at(n);
      unsigned col = kStraddles ? x * kBytes / run : x / per_patch;
      int64_t image = source[col];
      value[i] = load(image);
      if constexpr (kStraddles) {
        const unsigned begin = x * kBytes;
        for (++col; col * run < begin + kBytes; ++col) {
          if (source[col] == image) continue;
          image = source[col];
          replace_tail(value[i], load(image), int(col * run - begin));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (start + unsigned(i) * blockDim.x >= items) break;
      *reinterpret_cast<V*>(args.out + to[i]) = value[i];
    }
  }
}

}  // namespace maskcf
