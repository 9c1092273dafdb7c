// A block as the kernels see it, made from the arguments of its ops. They are checked, since an op may be called with
// anything.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "cpu/conv_block/block.h"
#include "tensors.h"

namespace cnnlstm_fast {

struct BlockDescription {
  Block block;
  Ints conv, order;   // as in the schema of conv_block
  bool keeps_slopes;  // whether a backward of such a block reads slopes of its activation
};

// Raises where the arguments are not those of a block. All are as in the schema of conv_block.
BlockDescription describe_block(const torch::stable::Tensor& x, const torch::stable::Tensor& weight, const Ints& conv,
                                int64_t activation, const Floats& act, const Ints& pool, const Ints& order);

// The convolution alone, its map channels-last.
BlockDescription describe_convolution(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                                      const Ints& conv);

// How many numbers an activation has, one of enum Activation.
size_t activation_numbers(int64_t activation);

// Positions of a window of `kernel` elements along one axis; 0 where none fits.
int64_t out_length(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil);

// Whether every window along one axis meets at least one element.
bool windows_meet(int64_t size, int64_t windows, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation);

// Shapes of what a block gives: of its result in memory order, its argmax codes, and the convolution's map.
Ints result_shape(const BlockDescription& description);
Ints codes_shape(const Block& b);
Ints map_shape(const Block& b, int64_t images);

// Null for a tensor without elements.
uint8_t* codes_pointer(const torch::stable::Tensor& codes);

// Raises where an image is too large for offsets of 32 bits, as the kernels of the plan `direct` have them.
void check_offsets(const Block& b);

// Raises where an argmax code names a position outside the map. Codes may not be the forward's: a hook on saved tensors
// can change them.
void check_code_positions(const Block& b, const uint8_t* codes);

}  // namespace cnnlstm_fast
