// Convolutions and matrix products whose weights were packed beforehand, compiled once per instruction set like the
// kernels of block.h. Activations are float32; channels-last memory is read and written where it lies.
#pragma once
#include <cstdint>

#include "../conv_block/block.h"

namespace cnnlstm_fast {

// Neighbouring weights [length][width] of a panel, of row `kernel_row` of the kernel, meet inputs that lie side by
// side, `offset` floats behind a position's first.
struct FrozenRun {
  int64_t offset, length, kernel_row;
};

// One call. Weights lie as [group][panel][tap][width]; `width` is FrozenTable::panel, less in the last panel of a
// group.
struct FrozenCall {
  const float *weight, *bias;  // bias: [group][channels of a group, rounded up to whole vectors]
  const FrozenRun* runs;       // in the order of the taps
  const int64_t* chunk_ends;   // a chunk of the sum ends before this run
  int64_t chunks;
  // The rows that tiles read: steps in floats between neighbouring input rows, columns and channels.
  int64_t row_step, col_step, channel_step;
  bool copied;    // into scratch, with the padding's zeros around them; otherwise x is read where it lies
  bool planes;    // taps are ordered (kh, c, kw) and inputs of one channel lie side by side; otherwise (kh, kw, c)
  bool by_chunk;  // copied chunk by chunk: a product of matrices, whose chunks are ranges of channels
  bool direct;    // sums go from registers to the result: no pool, a clamping activation, channels side by side
  int64_t line;   // columns for which a copied row has room
};

// A part of a block: columns that `part` describes as if they were a whole image, pooled rows [row0, row1) of `images`
// images, panels [panel0, panel1) counted over all groups. x, out and added point to image 0 of the part.
struct FrozenItem {
  const float* x;
  float* out;
  const float* added;           // of the convolution's map, or null
  const int64_t* added_stride;  // of (n, c, h, w)
  int64_t image, images, row0, row1, panel0, panel1;
};

struct FrozenTable {
  int64_t panel, lanes;

  // Writes panel `panel` of all groups' panels, weights (co, c / groups, kh, kw), to its place in `to`.
  void (*pack)(const Block&, const float* weight, bool planes, int64_t panel, float* to);

  int64_t (*item_scratch)(const Block& part, const FrozenCall&, int64_t images, int64_t rows, int64_t panels);
  void (*run)(const Block& part, const FrozenCall&, const FrozenItem&, float* scratch);

  // Depthwise: weights are [tap][channels rounded up to whole vectors]; panels count vectors of channels.
  void (*depthwise)(const Block& part, const FrozenCall&, const FrozenItem&, float* scratch);
};

}  // namespace cnnlstm_fast
