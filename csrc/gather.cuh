// Token-space refill and its gradient: a warp per token.
#pragma once

#include "core/address.h"
#include "core/pixel.h"
#include "device.h"

namespace maskcf {

constexpr int kGatherThreads = 256;

struct GatherArgs {
  int64_t images, tokens, prefix;  // N, T = prefix + L
  const bool* mask;                // [N, L]
  const int64_t* donors;           // [N] or [N, L]
  bool donor_per_patch;

  // The image that token `t` of image `n` comes from.
  __device__ int64_t source(int64_t n, int64_t t) const {
    if (t < prefix) return n;
    const int64_t patches = tokens - prefix, p = t - prefix;
    const int64_t image = source_of(n, p, patches, mask[n * patches + p], donors, donor_per_patch);
    if (uint64_t(image) >= uint64_t(images)) fail();
    return image;
  }
};

__device__ inline int64_t warp_index() { return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32; }

template <class V>
__global__ void __launch_bounds__(kGatherThreads)
    gather_kernel(const V* __restrict__ in, V* __restrict__ out, int width, GatherArgs args) {  // [N, T, width]
  const int64_t token = warp_index();
  if (token >= args.images * args.tokens) return;
  const int64_t t = token % args.tokens;
  const V* from = in + (args.source(token / args.tokens, t) * args.tokens + t) * width;
  V* to = out + token * width;
  constexpr int kInFlight = 4;
  for (int start = int(threadIdx.x % 32); start < width; start += 32 * kInFlight) {
    V value[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (start + 32 * i < width) value[i] = from[start + 32 * i];
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (start + 32 * i < width) to[start + 32 * i] = value[i];
    }
  }
}

// Who took a token from whom, as lists that run in ascending order: `head` is the first image that took token t of
// image n, `next` the one after, -1 the end. Without atomics, so that sums over a list are the same in every run. A
// block per position; `source` is scratch.
static __global__ void receivers_kernel(int* __restrict__ source, int* __restrict__ head,
                                        int* __restrict__ next,  // [L, N] each
                                        GatherArgs args) {
  const int n = int(args.images);
  const int64_t offset = int64_t(blockIdx.x) * n;
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) {
    source[offset + i] = int(args.source(i, args.prefix + int64_t(blockIdx.x)));
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) {
    int first = 0;
    while (first < n && source[offset + first] != i) ++first;
    head[offset + i] = first < n ? first : -1;
    int after = i + 1;
    while (after < n && source[offset + after] != source[offset + i]) ++after;
    next[offset + i] = after < n ? after : -1;
  }
}

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) TokenPack {
  T value[kCount];
};

// kCount consecutive values per access; `width` counts accesses.
template <class T, int kCount>
__global__ void __launch_bounds__(kGatherThreads)
    gather_backward_kernel(const T* __restrict__ grad, T* __restrict__ out, int width, GatherArgs args,
                           const int* __restrict__ head, const int* __restrict__ next) {
  using W = typename Wide<T>::type;
  using P = TokenPack<T, kCount>;
  const int64_t token = warp_index();
  if (token >= args.images * args.tokens) return;
  const int64_t n = token / args.tokens, t = token % args.tokens;
  const bool stays = t < args.prefix;
  const int64_t offset = (t - args.prefix) * args.images;
  const P* rows = reinterpret_cast<const P*>(grad);
  P* to = reinterpret_cast<P*>(out) + token * width;
  const int64_t first = stays ? n : head[offset + n];
  for (int x = int(threadIdx.x % 32); x < width; x += 32) {
    W sum[kCount] = {};
    for (int64_t image = first; image >= 0; image = stays ? -1 : next[offset + image]) {
      const P row = rows[(image * args.tokens + t) * width + x];
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] = image == first ? W(row.value[i]) : sum[i] + W(row.value[i]);
    }
    P result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) result.value[i] = T(sum[i]);
    to[x] = result;
  }
}

}  // namespace maskcf
