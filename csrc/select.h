// Selecting the patches of one image on the CPU.
#pragma once

#include "core/select.h"

namespace maskcf {

template <class T>
void select_row(const T* cam,  // [L]
                int64_t patches, const Selection<T>& s,
                bool* mask) {  // [L]
  Rule<T> rule{s, true, cam[0], {0, 0}};
  for (int64_t p = 0; p < patches; ++p) {
    rule.usable &= is_finite(cam[p]);
    rule.maximum = cam[p] > rule.maximum ? cam[p] : rule.maximum;
  }
  if (!rule.usable) rule.maximum = T(0);
  int k = int(s.by_threshold ? 0 : s.k);
  for (int place = 0; k > 0 && place < digit_count<typename KeyOf<T>::type>(); ++place) {
    int histogram[kBins] = {};
    for (int64_t p = 0; p < patches; ++p) {
      const int digit = digit_at(rule.rank(cam[p], p), rule.cut, place);
      if (digit >= 0) ++histogram[digit];
    }
    if (narrow(histogram, place, rule.cut, k)) break;
  }
  for (int64_t p = 0; p < patches; ++p) mask[p] = rule.selects(cam[p], p);
}

}  // namespace maskcf
