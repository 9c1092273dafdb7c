// Winograd's minimal filtering F(2x2, 3x3), compiled once per instruction set like the kernels of block.h:
// 16 products where a convolution of 3x3 taps takes 36. Of a tile of 4x4 inputs d, taps g and 2x2 outputs y,
// y = A^T ((G g G^T) * (B^T d B)) A (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2015).
#pragma once
#include <cstdint>

#include "../conv_block/block.h"

namespace cnnlstm_fast {

constexpr int64_t kWinogradPositions = 16;  // of a transformed tile; each is one matrix product over all channels
// The smallest of nine taps, in root mean square, is at least this share of the largest.
constexpr float kLeastTap = 1.f / 64;

// A convolution with 3x3 taps and stride 1 of floats whose channels are contiguous. Strides are in floats.
struct Winograd {
  int64_t n, c, h, w, co, oh, ow, ph, pw;
  int64_t x_stride[3];       // of (n, h, w)
  int64_t tiles_h, tiles_w;  // of an image
};

// A part of a block: pooled rows [row0, row1) of `images` images from `image` on, output channels [channel0, channel1),
// which begin with a panel of weights.
struct WinogradItem {
  int64_t image, images, row0, row1, channel0, channel1;
};

struct WinogradTable {
  int64_t width;  // channels of a panel of weights; the last panel may be narrower

  // Whether no tap is nearly zero for all outputs of an input, or for all inputs of an output, of `co` outputs over `c`
  // inputs. Otherwise a loud input that no tap multiplies would still round the rest of its tile. Looks at most at
  // `most` inputs and outputs.
  bool (*has_all_taps)(const float* weight, int64_t co, int64_t c, int64_t most);

  // Transformed taps of panel `panel` of `co` channels over `c`, at panel `panel` of `to`, which has 16 * c *
  // (co rounded up to 16) floats: [panel][position][c][channel]. Tap (o, i, kh, kw) is at
  // o * o_stride + i * i_stride + kh * 3 + kw; `flipped` reverses both axes of taps.
  void (*transform_weight)(const float* weight, int64_t co, int64_t c, int64_t o_stride, int64_t i_stride, bool flipped,
                           int64_t panel, float* to);

  // The block of an item; `bias` has co rounded up to 16 floats. Returns whether every sum is finite: otherwise NaN and
  // infinity are in all outputs of their tile.
  int64_t (*forward_scratch)(const Winograd&, const Block&, int64_t images, int64_t rows);
  bool (*forward)(const Winograd&, const Block&, const float* x, const float* weight, const float* bias, const Outputs&,
                  const WinogradItem&, float* scratch);

  // Floats of so many transformed tiles of `channels`, for the gradient of the weight.
  int64_t (*tile_floats)(int64_t tiles, int64_t channels);
  // The gradient of the weight from transformed inputs [position][c / 16][tile][16] and gradients of the map
  // [position][panel of co][tile][channel], of `tiles` tiles from `start` on.
  void (*transform_input)(const Winograd&, const float* x, int64_t start, int64_t tiles, int64_t first, int64_t last,
                          float* to, float* scratch);
  void (*transform_grad)(const Winograd&, const float* grad, int64_t start, int64_t tiles, int64_t first, int64_t last,
                         float* to);
  // Puts their product into sums [position][c rounded up to 16][co rounded up to 16], or adds it to what is there, for
  // groups [group0, group1) of 16 channels c at one position.
  void (*add_products)(const Winograd&, const float* inputs, const float* grads, int64_t tiles, int64_t position,
                       int64_t group0, int64_t group1, bool add, float* sums);
  // From the sums the gradient (co, c, 3, 3) of 16 channels co. Returns whether it is finite.
  bool (*weight_grad)(const Winograd&, const float* sums, int64_t co_group, float* to);
};

}  // namespace cnnlstm_fast
