// Patch selection by one block of threads: the rule of a row, left in every thread.
#pragma once

#include "core/select.h"
#include "device.h"

namespace maskcf {

// Every thread of the block takes part. At most 1024 threads.
template <class T>
__device__ Rule<T> block_rule(const T* cam,  // [patches]
                              int patches, const Selection<T>& s) {
  using Key = typename KeyOf<T>::type;
  MASKCF_SHARED(maxima, T[32]);
  MASKCF_SHARED(histogram, int[kBins]);
  MASKCF_SHARED(cut, Rank<Key>);
  MASKCF_SHARED(k, int);
  MASKCF_SHARED(done, bool);
  const int thread = int(threadIdx.x), threads = int(blockDim.x);

  Rule<T> rule{s, true, cam[0], {0, 0}};
  bool bad = false;
  for (int p = thread; p < patches; p += threads) {
    bad |= !is_finite(cam[p]);
    rule.maximum = cam[p] > rule.maximum ? cam[p] : rule.maximum;
  }
  rule.usable = !__syncthreads_or(bad);
  if (s.by_threshold) {
    for (int lane = 16; lane > 0; lane /= 2) {
      const T other = __shfl_xor_sync(kAllLanes, rule.maximum, lane);
      rule.maximum = other > rule.maximum ? other : rule.maximum;
    }
    if (thread % 32 == 0) maxima[thread / 32] = rule.maximum;
    __syncthreads();
    for (int i = 0; i < threads / 32; ++i) rule.maximum = maxima[i] > rule.maximum ? maxima[i] : rule.maximum;
    if (!rule.usable) rule.maximum = T(0);
    return rule;
  }
  if (thread == 0) {
    cut = {0, 0};
    k = int(s.k);
    done = s.k == 0;
  }
  __syncthreads();
  for (int place = 0; !done && place < digit_count<Key>(); ++place) {
    if (thread < kBins) histogram[thread] = 0;
    __syncthreads();
    for (int p = thread; p < patches; p += threads) {
      const int digit = digit_at(rule.rank(cam[p], p), cut, place);
      if (digit >= 0) atomicAdd(&histogram[digit], 1);
    }
    __syncthreads();
    if (thread == 0) done = narrow(histogram, place, cut, k);
    __syncthreads();
  }
  rule.cut = cut;
  return rule;
}

template <class T>
__global__ void select_kernel(const T* __restrict__ cam,  // [N, patches]
                              int patches, Selection<T> s,
                              bool* __restrict__ mask) {  // [N, patches]
  const int64_t offset = int64_t(blockIdx.x) * patches;
  const Rule<T> rule = block_rule(cam + offset, patches, s);
  for (int p = int(threadIdx.x); p < patches; p += int(blockDim.x)) mask[offset + p] = rule.selects(cam[offset + p], p);
}

}  // namespace maskcf
