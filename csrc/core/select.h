// Which patches a relevance map selects: the score, and the exact top-k without sorting.
#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

namespace maskcf {

// What the public arguments of a selection come down to.
template <class T>
struct Selection {
  bool by_threshold;
  bool context;  // the complement of the object mask, or the k lowest
  T threshold;
  int64_t k;
};

// A NaN or an infinity: the difference with itself is then no zero.
template <class T>
MASKCF_HD bool is_finite(T x) {
  return x - x == T(0);
}

// The same operations in the same order as the reference: masks must agree to the bit.
template <class T>
MASKCF_HD bool passes(T value, T row_maximum, const Selection<T>& s) {
  return (value / (row_maximum + T(1e-8)) > s.threshold) != s.context;
}

template <class T>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
};

// An integer that orders as the floats do, highest first to be chosen; both zeros are equal.
template <class T>
MASKCF_HD typename KeyOf<T>::type order_key(T value, bool lowest_first) {
  using Key = typename KeyOf<T>::type;
  constexpr Key sign = Key(1) << (sizeof(Key) * 8 - 1);
  if (value == T(0)) value = T(0);
  Key key;
  memcpy(&key, &value, sizeof key);
  key = (key & sign) ? Key(~key) : Key(key | sign);
  return lowest_first ? Key(~key) : key;
}

// A patch's place in the order of choice: the larger rank is chosen first. No two patches have the same one, since
// equal values are told apart by their index, the lower one first.
template <class Key>
struct Rank {
  Key key;
  uint32_t index;  // inverted

  MASKCF_HD bool reaches(const Rank& cut) const {
    return key > cut.key || (key == cut.key && index >= cut.index);
  }
};

template <class T>
MASKCF_HD Rank<typename KeyOf<T>::type> rank_of(T value, int64_t patch, bool lowest_first) {
  return {order_key(value, lowest_first), ~uint32_t(patch)};
}

// Radix selection: digit by digit from the top, the bin that holds the k-th rank is kept. Its steps are here; the
// loops that fill the histogram belong to the caller.
constexpr int kDigitBits = 4;
constexpr int kBins = 1 << kDigitBits;

template <class Key>
MASKCF_HD constexpr int digit_count() {
  return (int(sizeof(Key)) + 4) * 8 / kDigitBits;
}

// The digit of `rank` at `place` (0 is the most significant), or -1 if a digit before it differs from the cut's.
template <class Key>
MASKCF_HD int digit_at(const Rank<Key>& rank, const Rank<Key>& cut, int place) {
  constexpr int key_places = int(sizeof(Key)) * 8 / kDigitBits;
  if (place < key_places) {
    const int shift = (key_places - 1 - place) * kDigitBits;
    if (((rank.key ^ cut.key) >> shift) >> kDigitBits) return -1;  // two shifts: one by the full width is undefined
    return int(rank.key >> shift) & (kBins - 1);
  }
  if (rank.key != cut.key) return -1;
  const int shift = (32 / kDigitBits - 1 - (place - key_places)) * kDigitBits;
  if (((rank.index ^ cut.index) >> shift) >> kDigitBits) return -1;
  return int(rank.index >> shift) & (kBins - 1);
}

// Extends `cut` by the digit whose bin holds the k-th rank, and lowers `k` to its place inside that bin. True when
// the whole bin is needed: then the cut, its lower digits left at zero, already separates the chosen from the rest.
template <class Key>
MASKCF_HD bool narrow(const int (&histogram)[kBins], int place, Rank<Key>& cut, int& k) {
  int digit = kBins - 1;
  while (digit > 0 && histogram[digit] < k) k -= histogram[digit--];
  constexpr int key_places = int(sizeof(Key)) * 8 / kDigitBits;
  if (place < key_places) {
    cut.key |= Key(digit) << ((key_places - 1 - place) * kDigitBits);
  } else {
    cut.index |= uint32_t(digit) << ((32 / kDigitBits - 1 - (place - key_places)) * kDigitBits);
  }
  return histogram[digit] == k;
}

// The whole rule of one row: what is left to do per patch once the row has been looked at.
template <class T>
struct Rule {
  Selection<T> s;
  bool usable;  // a row with a NaN or an infinity counts as a row of zeros
  T maximum;    // of a usable row; by threshold
  Rank<typename KeyOf<T>::type> cut;  // by top-k

  MASKCF_HD T value(T raw) const { return usable ? raw : T(0); }
  MASKCF_HD Rank<typename KeyOf<T>::type> rank(T raw, int64_t patch) const {
    return rank_of(value(raw), patch, s.context);
  }
  MASKCF_HD bool selects(T raw, int64_t patch) const {
    if (s.by_threshold) return passes(value(raw), maximum, s);
    return s.k > 0 && rank(raw, patch).reaches(cut);
  }
};

}  // namespace maskcf
