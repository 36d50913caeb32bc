// Sums over rows on the CPU, beside what is done to each of them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>

namespace maskcf {

constexpr int64_t kRowBlock = 64;

inline int64_t row_grain(int64_t width) { return 1 + (1 << 14) / width; }

// Calls f(first row, count, to) for blocks of rows of one size, in parallel; f adds them to K rows of sums at `to`. Those
// are then added up over the blocks in their order, so that it does not depend on how many threads there are.
template <class W, size_t K, class F>
void sum_over_rows(int64_t rows, int64_t width, const std::array<W*, K>& sums, const F& f) {
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock, all = int64_t(K) * width;
  std::vector<W> partial(size_t(blocks * all));
  torch::stable::parallel_for(0, blocks, 1 + row_grain(width) / kRowBlock, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kRowBlock;
      f(first, std::min(kRowBlock, rows - first), partial.data() + block * all);
    }
  });
  for (size_t k = 0; k < K; ++k) {
    std::fill(sums[k], sums[k] + width, W(0));
    for (int64_t block = 0; block < blocks; ++block) {
      const W* from = partial.data() + block * all + int64_t(k) * width;
      for (int64_t i = 0; i < width; ++i) sums[k][i] += from[i];
    }
  }
}

}  // namespace maskcf
