// How threads share the rows of a block.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/conv_block/block.h"
#include "threads.h"

namespace cnnlstm_fast {

// Scratch of one item, in floats: what a second-level cache holds beside the weights.
extern const int64_t kItemFloats;
// Positions of a map that one item sums up.
extern const int64_t kPositionsPerSum;

// Pooled rows per item: enough items for every thread, scratch that stays in cache. The scratch of an item of one row
// and of two is in floats.
int64_t rows_per_item(const Block& b, int64_t scratch_of_row, int64_t scratch_of_two);

// What is behind the convolution, for `images` images from `first` on, from their map [images, OH, OW, CO], contiguous.
// Scale and shift of every channel are null where there is no norm.
void run_epilogue(const Block& b, const void* map, int64_t first, int64_t images, const float* scale,
                  const float* shift, const Outputs& out);

// Visits (image, row0, row1) for pooled rows [row0, row1) of each of `images` images, whose gradients go to rows of the
// map that no other visit writes: an image is cut where the windows of two pooled rows never meet.
template <class Visit>
void for_each_band(const Block& b, int64_t images, const Visit& visit) {
  const bool disjoint = (b.pool_kh - 1) * b.pool_dh < b.pool_sh;
  const int64_t bands = disjoint ? std::clamp<int64_t>(ceil_div(wanted_items(), images), 1, b.out_h) : 1;
  for_each_item(images * bands, [&](int64_t item) {
    const int64_t band = item % bands;
    visit(item / bands, band * b.out_h / bands, (band + 1) * b.out_h / bands);
  });
}

}  // namespace cnnlstm_fast
