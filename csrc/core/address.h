// Where a patch's pixels lie. All arithmetic is 64-bit: a batch may exceed 2^31 elements.
#pragma once

#include <cstdint>

#include "macros.h"

namespace maskcf {

// Images as rows of patches, for either memory format: contiguous has one plane per channel; in channels-last the
// channels are part of the pixel, and there is one plane. A "run" is one line of a patch, contiguous in memory.
struct PatchGrid {
  int64_t images;
  int64_t planes;
  int64_t rows;    // patches above each other
  int64_t cols;    // patches beside each other
  int64_t height;  // lines of a patch
  int64_t run;     // bytes of a line of a patch

  MASKCF_HD int64_t patches() const { return rows * cols; }
  MASKCF_HD int64_t line_bytes() const { return cols * run; }

  // Byte offset of a whole line of an image: `line` counts within the row of patches.
  MASKCF_HD int64_t line_offset(int64_t image, int64_t plane, int64_t row, int64_t line) const {
    return (((image * planes + plane) * rows + row) * height + line) * line_bytes();
  }
};

// The image that patch `p` of image `n` is taken from. Donors are one per image or one per patch.
MASKCF_HD int64_t source_of(int64_t n, int64_t p, int64_t patches, bool masked, const int64_t* donors,
                            bool donor_per_patch) {
  if (!masked) return n;
  return donors[donor_per_patch ? n * patches + p : n];
}

// Element strides of [N, C, H, W] images in any layout, read without a copy.
struct ImageStrides {
  int64_t n, c, y, x;

  MASKCF_HD int64_t offset(int64_t image, int64_t channel, int64_t line, int64_t column) const {
    return image * n + channel * c + line * y + column * x;
  }
};

}  // namespace maskcf
