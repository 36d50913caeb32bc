// Pixels to normalised patch rows: a block takes some patches of one image.
#pragma once

#include "core/address.h"
#include "core/pixel.h"
#include "device.h"

namespace maskcf {

constexpr int kMaxChannels = 16;
constexpr int kPatchifyThreads = 256;

struct PatchPlace {
  int64_t image, top, left;
};

template <class W>
struct PatchifyArgs {
  int64_t images, patches, cols, p;
  int channels;
  ImageStrides strides;
  const bool* mask;       // [N, L] or null
  const int64_t* donors;  // [N] or [N, L]
  bool donor_per_patch;
  int group;  // patches per block, a multiple of what makes whole accesses
  W mean[kMaxChannels], std[kMaxChannels];

  // Where patch `p` of image `n` is taken from.
  __device__ PatchPlace place(int64_t n, int64_t p) const {
    int64_t image = n;
    if (mask) {
      image = source_of(n, p, patches, mask[n * patches + p], donors, donor_per_patch);
      if (uint64_t(image) >= uint64_t(images)) fail();
    }
    return {image, p / cols * this->p, p % cols * this->p};
  }
};

template <class Out, int kCount>
struct alignas(sizeof(Out) * kCount) Pack {
  Out value[kCount];
};

// Grid: x counts images, y groups of patches. kCount consecutive values are written at once, of one patch or of two.
// Dynamic shared memory for bytes: a table [C, 256] of Out, the outcome of every byte by the same arithmetic. One block
// per processor is asked for, as the assembler otherwise spills float64 images' values on sm_80.
template <class Out, class In, int kCount>
__global__ void __launch_bounds__(kPatchifyThreads, 1)
    patchify_kernel(const In* __restrict__ in, Out* __restrict__ out, PatchifyArgs<typename Wide<In>::type> args) {
  MASKCF_DYNAMIC_SHARED(memory);
  Out* table = reinterpret_cast<Out*>(memory);
  if constexpr (sizeof(In) == 1) {
    for (int i = int(threadIdx.x); i < args.channels * 256; i += int(blockDim.x)) {
      table[i] = normalised<Out>(In(i % 256), args.mean[i / 256], args.std[i / 256]);
    }
    __syncthreads();
  }
  const int64_t n = blockIdx.x;
  const unsigned side = unsigned(args.p), area = side * side, row = unsigned(args.channels) * area;
  const int64_t first = int64_t(blockIdx.y) * args.group;
  const int64_t left = args.patches - first;
  const unsigned items = unsigned(left < args.group ? left : args.group) * row / kCount;
  for (unsigned item = threadIdx.x; item < items; item += blockDim.x) {
    const unsigned begin = item * kCount, at = begin % row;
    int64_t p = first + begin / row;
    PatchPlace from = args.place(n, p);
    unsigned c = at / area, y = at % area / side, x = at % side;
    Pack<Out, kCount> pack;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const In value = in[args.strides.offset(from.image, c, from.top + y, from.left + x)];
      if constexpr (sizeof(In) == 1) {
        pack.value[i] = table[c * 256 + value];
      } else {
        pack.value[i] = normalised<Out>(value, args.mean[c], args.std[c]);
      }
      if (++x < side) continue;
      x = 0;
      if (++y < side) continue;
      y = 0;
      if (++c < unsigned(args.channels) || i + 1 == kCount) continue;
      c = 0;
      from = args.place(n, ++p);
    }
    *reinterpret_cast<Pack<Out, kCount>*>(out + (n * args.patches + first) * row + begin) = pack;
  }
}

}  // namespace maskcf
