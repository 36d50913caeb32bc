// Attention relevance on CUDA. No attention map is in memory: a first kernel leaves the maximum and the weight of every
// query's softmax, a second recomputes tiles of the map and of its gradient and adds up their columns.
//
// A tile is 64 queries by 64 keys, for four warps of 16 queries each. Both products of a tile have the same layout in
// registers, that of the tensor cores' accumulators, whether tensor cores made them (half types) or not (float32).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/pixel.h"
#include "device.h"

namespace maskcf {

constexpr int kTile = 64;
constexpr int kRelevanceThreads = 128;
constexpr int kMaxWidth = 128;
constexpr float kLowest = -3.0e38f;  // below any logit that counts, yet finite: its differences are no NaN

struct RowStrides {
  int64_t n, h, t;  // in elements; the last dimension is contiguous
};

template <class T>
struct RelevanceArgs {
  const T *q, *k, *v, *g;  // [N, H, Tq or T, d]
  RowStrides qs, ks, vs, gs;
  int heads, tq, t, d;
  int stride;  // elements between the rows of a tile in shared memory
  float scale;
  const float* relevance;  // [N, T]
  float *maximum, *weight;  // [N, H, Tq]: of a query's logits, and relevance / sum of exponentials
  float* partial;           // [N, H, T]
};

// Columns of a tile in shared memory: d filled up to whole steps of 16, and a gap that spreads rows over the banks.
template <class T>
__host__ __device__ constexpr int tile_stride(int d) {
  return (d + 15) / 16 * 16 + 16 / int(sizeof(T));
}

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) RowPack {
  T value[kCount];
};

// Copies up to 64 rows into shared memory, zeros beyond the rows and columns there are. kCount elements per access.
template <class T, int kCount>
__device__ void load_tile(const T* rows, int64_t row_stride, int count, int d, int stride, T* tile) {
  using P = RowPack<T, kCount>;
  const int per_row = (d + 15) / 16 * 16 / kCount;
  for (int i = int(threadIdx.x); i < kTile * per_row; i += int(blockDim.x)) {
    const int row = i / per_row, x = i % per_row * kCount;
    P pack{};
    if (row < count && x < d) pack = *reinterpret_cast<const P*>(rows + row * row_stride + x);
    *reinterpret_cast<P*>(tile + row * stride + x) = pack;
  }
}

// What a thread holds of a tile: value [j][2 * i + c] is at row `row(i)`, column `col(j, c)`.
struct Place {
  int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  __device__ int row(int i) const { return warp * 16 + lane / 4 + 8 * i; }
  __device__ int col(int j, int c) const { return j * 8 + lane % 4 * 2 + c; }
};
using Accumulator = float[8][4];

template <class T>
__device__ __forceinline__ unsigned pair_at(const T* tile, int offset) {
  unsigned pair;
  memcpy(&pair, __builtin_assume_aligned(tile + offset, 4), sizeof pair);
  return pair;
}

// c = a b^T over the tiles' columns, on tensor cores.
template <class T>
__device__ __forceinline__ void product(const T* a, const T* b, int d, int stride, Accumulator& c) {
  const Place at;
  const int two = at.lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < 8; ++j) c[j][0] = c[j][1] = c[j][2] = c[j][3] = 0.0f;
  for (int x = 0; x < d; x += 16) {
    const unsigned left[4] = {pair_at(a, at.row(0) * stride + x + two), pair_at(a, at.row(1) * stride + x + two),
                              pair_at(a, at.row(0) * stride + x + two + 8),
                              pair_at(a, at.row(1) * stride + x + two + 8)};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int row = (j * 8 + at.lane / 4) * stride + x + two;
      const unsigned right[2] = {pair_at(b, row), pair_at(b, row + 8)};
      if constexpr (std::is_same_v<T, BFloat16>) {
        mma_bfloat16(c[j], left, right);
      } else {
        mma_float16(c[j], left, right);
      }
    }
  }
}

// The same for float32, in float32 throughout.
template <>
__device__ __forceinline__ void product<float>(const float* a, const float* b, int d, int stride, Accumulator& c) {
  using P = RowPack<float, 4>;
  const Place at;
#pragma unroll
  for (int j = 0; j < 8; ++j) c[j][0] = c[j][1] = c[j][2] = c[j][3] = 0.0f;
  for (int x = 0; x < d; x += 4) {
    const P upper = *reinterpret_cast<const P*>(a + at.row(0) * stride + x);
    const P lower = *reinterpret_cast<const P*>(a + at.row(1) * stride + x);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const P right = *reinterpret_cast<const P*>(b + at.col(j, e) * stride + x);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          c[j][e] += upper.value[i] * right.value[i];
          c[j][2 + e] += lower.value[i] * right.value[i];
        }
      }
    }
  }
}

// Grid: x counts tiles of queries, y heads, z images. Shared memory: two tiles.
template <class T, int kCount>
__global__ void __launch_bounds__(kRelevanceThreads) softmax_kernel(RelevanceArgs<T> args) {
  MASKCF_DYNAMIC_SHARED(memory);
  T* const q = reinterpret_cast<T*>(memory);
  T* const k = q + kTile * args.stride;
  const int64_t n = blockIdx.z, h = blockIdx.y;
  const int first = int(blockIdx.x) * kTile;
  load_tile<T, kCount>(args.q + n * args.qs.n + h * args.qs.h + first * args.qs.t, args.qs.t, args.tq - first, args.d,
                       args.stride, q);
  const Place at;
  float most[2] = {kLowest, kLowest}, sum[2] = {0.0f, 0.0f};
  for (int key = 0; key < args.t; key += kTile) {
    __syncthreads();
    load_tile<T, kCount>(args.k + n * args.ks.n + h * args.ks.h + key * args.ks.t, args.ks.t, args.t - key, args.d,
                         args.stride, k);
    __syncthreads();
    Accumulator c;
    product<T>(q, k, args.d, args.stride, c);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float higher = most[i];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& logit = c[j][2 * i + e];
          logit *= args.scale;
          if (key + at.col(j, e) < args.t && logit > higher) higher = logit;
        }
      }
      sum[i] *= expf(most[i] - higher);
      most[i] = higher;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (key + at.col(j, e) < args.t) sum[i] += expf(c[j][2 * i + e] - higher);
        }
      }
    }
  }
  // Four neighbouring lanes share a query.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int lane = 1; lane <= 2; lane *= 2) {
      const float other_most = __shfl_xor_sync(kAllLanes, most[i], lane);
      const float other_sum = __shfl_xor_sync(kAllLanes, sum[i], lane);
      const float higher = other_most > most[i] ? other_most : most[i];
      sum[i] = sum[i] * expf(most[i] - higher) + other_sum * expf(other_most - higher);
      most[i] = higher;
    }
    const int query = first + at.row(i);
    if (at.lane % 4 == 0 && query < args.tq) {
      const int64_t to = (n * args.heads + h) * args.tq + query;
      args.maximum[to] = most[i];
      args.weight[to] = args.relevance[n * args.t + query] / sum[i];
    }
  }
}

// Grid: x counts tiles of keys, y heads, z images. Shared memory: four tiles. Sums run in a fixed order.
template <class T, int kCount>
__global__ void __launch_bounds__(kRelevanceThreads) columns_kernel(RelevanceArgs<T> args) {
  MASKCF_DYNAMIC_SHARED(memory);
  MASKCF_SHARED(sums, float[kRelevanceThreads / 32][kTile]);
  const int size = kTile * args.stride;
  T* const k = reinterpret_cast<T*>(memory);
  T* const v = k + size;
  T* const q = v + size;
  T* const g = q + size;
  const int64_t n = blockIdx.z, h = blockIdx.y;
  const int key = int(blockIdx.x) * kTile;
  load_tile<T, kCount>(args.k + n * args.ks.n + h * args.ks.h + key * args.ks.t, args.ks.t, args.t - key, args.d,
                       args.stride, k);
  load_tile<T, kCount>(args.v + n * args.vs.n + h * args.vs.h + key * args.vs.t, args.vs.t, args.t - key, args.d,
                       args.stride, v);
  const Place at;
  float columns[8][2] = {};
  for (int first = 0; first < args.tq; first += kTile) {
    __syncthreads();
    load_tile<T, kCount>(args.q + n * args.qs.n + h * args.qs.h + first * args.qs.t, args.qs.t, args.tq - first,
                         args.d, args.stride, q);
    load_tile<T, kCount>(args.g + n * args.gs.n + h * args.gs.h + first * args.gs.t, args.gs.t, args.tq - first,
                         args.d, args.stride, g);
    __syncthreads();
    Accumulator logits, gradient;
    product<T>(q, k, args.d, args.stride, logits);
    product<T>(g, v, args.d, args.stride, gradient);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = first + at.row(i);
      if (query >= args.tq) continue;
      const int64_t from = (n * args.heads + h) * args.tq + query;
      const float maximum = args.maximum[from], weight = args.weight[from];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float a = expf(logits[j][2 * i + e] * args.scale - maximum) * gradient[j][2 * i + e];
          columns[j][e] += (a < 0.0f ? 0.0f : a) * weight;  // a NaN stays one
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      // Lanes with the same remainder by 4 share a column.
      for (int lane = 4; lane < 32; lane *= 2) columns[j][e] += __shfl_xor_sync(kAllLanes, columns[j][e], lane);
      if (at.lane < 4) sums[at.warp][at.col(j, e)] = columns[j][e];
    }
  }
  __syncthreads();
  const int column = int(threadIdx.x);
  if (column < kTile && key + column < args.t) {
    args.partial[(n * args.heads + h) * args.t + key + column] =
        (sums[0][column] + sums[1][column]) + (sums[2][column] + sums[3][column]);
  }
}

template <class T, int kCount>
__device__ float dot(const T* row, const float* vector, int d) {  // row in memory, vector in shared memory
  float sum = 0.0f;
  for (int x = 0; x < d; x += kCount) {
    const RowPack<T, kCount> pack = *reinterpret_cast<const RowPack<T, kCount>*>(row + x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += float(pack.value[i]) * vector[x + i];
  }
  return sum;
}

// One query per head: a block per head of an image, a thread per key, each key and value read once.
template <class T, int kCount>
__global__ void __launch_bounds__(kRelevanceThreads) one_query_kernel(RelevanceArgs<T> args, float* logits) {
  MASKCF_SHARED(q, float[kMaxWidth]);
  MASKCF_SHARED(g, float[kMaxWidth]);
  MASKCF_SHARED(shared, float[2][kRelevanceThreads / 32]);
  const int64_t n = blockIdx.z, h = blockIdx.y;
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  float* const row = logits + (n * args.heads + h) * args.t;         // [T], scratch
  float* const out = args.partial + (n * args.heads + h) * args.t;  // [T]
  for (int i = thread; i < args.d; i += int(blockDim.x)) {
    q[i] = float(args.q[n * args.qs.n + h * args.qs.h + i]);
    g[i] = float(args.g[n * args.gs.n + h * args.gs.h + i]);
  }
  __syncthreads();
  float most = kLowest;
  for (int j = thread; j < args.t; j += int(blockDim.x)) {
    const float logit = dot<T, kCount>(args.k + n * args.ks.n + h * args.ks.h + j * args.ks.t, q, args.d) * args.scale;
    row[j] = logit;
    out[j] = dot<T, kCount>(args.v + n * args.vs.n + h * args.vs.h + j * args.vs.t, g, args.d);
    most = logit > most ? logit : most;
  }
  for (int i = 16; i > 0; i /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, most, i);
    most = other > most ? other : most;
  }
  if (lane == 0) shared[0][warp] = most;
  __syncthreads();
  for (int i = 0; i < kRelevanceThreads / 32; ++i) most = shared[0][i] > most ? shared[0][i] : most;
  float sum = 0.0f;
  for (int j = thread; j < args.t; j += int(blockDim.x)) sum += expf(row[j] - most);
  for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(kAllLanes, sum, i);
  if (lane == 0) shared[1][warp] = sum;
  __syncthreads();
  sum = (shared[1][0] + shared[1][1]) + (shared[1][2] + shared[1][3]);
  const float weight = args.relevance[n * args.t] / sum;
  for (int j = thread; j < args.t; j += int(blockDim.x)) {
    const float a = expf(row[j] - most) * out[j];
    out[j] = (a < 0.0f ? 0.0f : a) * weight;
  }
}

static __global__ void heads_kernel(const float* __restrict__ partial,    // [N, H, T]
                                    const float* __restrict__ relevance,  // [N, T]
                                    int64_t count, int heads, int t,
                                    float* __restrict__ out) {  // [N, T]
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float* column = partial + i / t * heads * t + i % t;
  float sum = 0.0f;
  for (int h = 0; h < heads; ++h) sum += column[int64_t(h) * t];
  out[i] = relevance[i] + sum / float(heads);
}

}  // namespace maskcf
