// The body of every relevance kernel for the CPU (kernels_all.h).
//
// A block of queries at a time: its logits against all keys stay in cache, as does the head's packed k and v; the
// gradient of the attention map only ever exists as a tile in registers.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace maskcf {
namespace {

template <class W>
struct Tile {
  using V = Vector<W>;
  static constexpr int kLanes = lanes_of<W>;
  static constexpr int kRows = MASKCF_TILE_ROWS;  // queries
  static constexpr int kCols = 2 * kLanes;        // keys
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows [T, d] to panels [T / cols][d][cols], zeros past the end.
template <class W, class T>
void pack_panels(const T* in, int64_t row, int64_t t, int64_t d, W* out) {
  constexpr int cols = Tile<W>::kCols;
  for (int64_t first = 0; first < t; first += cols, out += d * cols) {
    const int count = int(t - first < cols ? t - first : cols);
    if (count < cols) memset(out, 0, size_t(d) * cols * sizeof(W));
    for (int j = 0; j < count; ++j) {
      const T* from = in + (first + j) * row;
      for (int64_t i = 0; i < d; ++i) out[i * cols + j] = widen(from[i]);
    }
  }
}

// Up to `rows` rows [count, d] to [d][rows], zeros past the end.
template <class W, class T>
void pack_block(const T* in, int64_t row, int64_t count, int64_t d, W* out) {
  constexpr int rows = Tile<W>::kRows;
  if (count < rows) memset(out, 0, size_t(d) * rows * sizeof(W));
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < d; ++j) out[j * rows + i] = widen(in[i * row + j]);
  }
}

// The tile's product over d, wholly in registers.
template <class W>
inline __attribute__((always_inline)) void multiply(const W* block, const W* panel, int64_t d,
                                                    typename Tile<W>::V (&c)[Tile<W>::kRows][2]) {
  using V = typename Tile<W>::V;
  constexpr int rows = Tile<W>::kRows;
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) c[i][0] = c[i][1] = V{};
  for (int64_t j = 0; j < d; ++j, block += rows, panel += Tile<W>::kCols) {
    const V left = *reinterpret_cast<const V*>(panel);
    const V right = *reinterpret_cast<const V*>(panel + Tile<W>::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      c[i][0] += left * block[i];
      c[i][1] += right * block[i];
    }
  }
}

// Replaces a row of logits by exp(logit - maximum); entries past `t` (there is room) become 0. Returns their sum.
template <class W>
W exp_row(W* logits, int64_t t) {
  using V = typename Tile<W>::V;
  constexpr int lanes = Tile<W>::kLanes;
  const int64_t padded = round_up(t, lanes);
  for (int64_t j = t; j < padded; ++j) logits[j] = -__builtin_inf();
  V most = *reinterpret_cast<V*>(logits);
  for (int64_t j = lanes; j < padded; j += lanes) {
    const V x = *reinterpret_cast<V*>(logits + j);
    most = x > most ? x : most;
  }
  W maximum = most[0];
  for (int i = 1; i < lanes; ++i) maximum = most[i] > maximum ? most[i] : maximum;
  V sums = V{};
  for (int64_t j = 0; j < padded; j += lanes) {
    V& x = *reinterpret_cast<V*>(logits + j);
    x = exp_of(V(x - maximum));
    sums += x;
  }
  W sum = 0;
  for (int i = 0; i < lanes; ++i) sum += sums[i];
  return sum;
}

template <class W>
struct Scratch {  // offsets in elements, each a multiple of a vector
  int64_t panel, block, logits, total;

  Scratch(int64_t t, int64_t d) {
    const int64_t padded = round_up(t, Tile<W>::kCols);
    panel = padded * d;                                             // two: k and v
    block = round_up(int64_t(Tile<W>::kRows) * d, Tile<W>::kCols);  // two: q and the gradient
    logits = padded * Tile<W>::kRows;
    total = 2 * panel + 2 * block + logits + padded;  // and the sum over queries
  }
};

template <class W, class T>
void all_queries(const Head& head, W* scratch) {
  using V = typename Tile<W>::V;
  constexpr int rows = Tile<W>::kRows, cols = Tile<W>::kCols, lanes = Tile<W>::kLanes;
  const int64_t t = head.t, d = head.d, padded = round_up(t, cols);
  const Scratch<W> sizes(t, d);
  W* const k = scratch;
  W* const v = k + sizes.panel;
  W* const q = v + sizes.panel;
  W* const g = q + sizes.block;
  W* const logits = g + sizes.block;  // [rows, padded]
  W* const sums = logits + sizes.logits;
  const W scale = W(head.scale);
  pack_panels(static_cast<const T*>(head.k), head.k_row, t, d, k);
  pack_panels(static_cast<const T*>(head.v), head.v_row, t, d, v);
  memset(sums, 0, size_t(padded) * sizeof(W));
  for (int64_t first = 0; first < head.tq; first += rows) {
    const int64_t count = head.tq - first < rows ? head.tq - first : rows;
    pack_block(static_cast<const T*>(head.q) + first * head.q_row, head.q_row, count, d, q);
    pack_block(static_cast<const T*>(head.g) + first * head.g_row, head.g_row, count, d, g);
    V c[rows][2];
    for (int64_t j = 0; j < padded; j += cols) {
      multiply<W>(q, k + j * d, d, c);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        *reinterpret_cast<V*>(logits + i * padded + j) = c[i][0] * scale;
        *reinterpret_cast<V*>(logits + i * padded + j + lanes) = c[i][1] * scale;
      }
    }
    W weight[rows] = {};
    for (int64_t i = 0; i < count; ++i) {
      weight[i] = static_cast<const W*>(head.relevance)[first + i] / exp_row(logits + i * padded, t);
    }
    for (int64_t j = 0; j < padded; j += cols) {
      multiply<W>(g, v + j * d, d, c);
      V left = *reinterpret_cast<V*>(sums + j), right = *reinterpret_cast<V*>(sums + j + lanes);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const V a = c[i][0] * *reinterpret_cast<V*>(logits + i * padded + j);
        const V b = c[i][1] * *reinterpret_cast<V*>(logits + i * padded + j + lanes);
        left += (a < W(0) ? V{} : a) * weight[i];  // a NaN stays one
        right += (b < W(0) ? V{} : b) * weight[i];
      }
      *reinterpret_cast<V*>(sums + j) = left;
      *reinterpret_cast<V*>(sums + j + lanes) = right;
    }
  }
  memcpy(head.out, sums, size_t(t) * sizeof(W));
}

template <class W, class T>
W dot(const W* a, const T* b, int64_t d) {
  using V = typename Tile<W>::V;
  constexpr int lanes = Tile<W>::kLanes;
  V sums = V{};
  int64_t i = 0;
  for (; i + lanes <= d; i += lanes) {
    V x, y;
    memcpy(&x, a + i, sizeof x);
    if constexpr (sizeof(T) == sizeof(W)) {
      memcpy(&y, b + i, sizeof y);
    } else {
      W wide[lanes];
      for (int j = 0; j < lanes; ++j) wide[j] = widen(b[i + j]);
      memcpy(&y, wide, sizeof y);
    }
    sums += x * y;
  }
  W sum = 0;
  for (; i < d; ++i) sum += a[i] * widen(b[i]);
  for (int j = 0; j < lanes; ++j) sum += sums[j];
  return sum;
}

// One query reads every key and value once: packing them would double the traffic.
template <class W, class T>
void one_query(const Head& head, W* scratch) {
  const int64_t t = head.t, d = head.d;
  const Scratch<W> sizes(t, d);
  W* const q = scratch;
  W* const g = q + sizes.block;
  W* const logits = g + sizes.block;
  W* const out = static_cast<W*>(head.out);
  for (int64_t i = 0; i < d; ++i) {
    q[i] = widen(static_cast<const T*>(head.q)[i]);
    g[i] = widen(static_cast<const T*>(head.g)[i]);
  }
  for (int64_t j = 0; j < t; ++j) {
    logits[j] = dot(q, static_cast<const T*>(head.k) + j * head.k_row, d) * W(head.scale);
    out[j] = dot(g, static_cast<const T*>(head.v) + j * head.v_row, d);
  }
  const W weight = *static_cast<const W*>(head.relevance) / exp_row(logits, t);
  for (int64_t j = 0; j < t; ++j) {
    const W a = logits[j] * out[j];
    out[j] = (a < W(0) ? W(0) : a) * weight;
  }
}

template <class W, class T>
void run_typed(const Head& head, void* scratch) {
  if (head.tq == 1) return one_query<W, T>(head, static_cast<W*>(scratch));
  all_queries<W, T>(head, static_cast<W*>(scratch));
}

void relevance(Element element, const Head& head, void* scratch) {
  for_element(element, [&](auto zero) {
    using T = decltype(zero);
    run_typed<typename Wider<T>::type, T>(head, scratch);
  });
}

int64_t relevance_scratch_bytes(Element element, int64_t t, int64_t d) {
  if (element == Element::kFloat64) return Scratch<double>(t, d).total * int64_t(sizeof(double));
  return Scratch<float>(t, d).total * int64_t(sizeof(float));
}

}  // namespace
}  // namespace maskcf
