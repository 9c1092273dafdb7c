// What the library's convolutions (oneDNN) may be given, by the instruction set in force: one row for each fault that
// has been seen, with what is done instead. Each names its test.
//
// | where                     | convolutions                                        | fault             | instead    |
// |---------------------------|-----------------------------------------------------|-------------------|------------|
// | everywhere                | channels-last, input or map one column wide         | crash, unwritten  | contiguous |
// | everywhere                | weight's gradient, channels-last, pointwise with a  | writes beyond its | contiguous |
// |                           | stride (float32), pointwise, dilated or grouped     | memory            |            |
// |                           | (bfloat16)                                          |                   |            |
// | everywhere                | bfloat16, channels-last, depthwise, a wide kernel   | never ends        | contiguous |
// | AMX (tiles of bfloat16)   | bfloat16, input or map one column wide, or a kernel | reads unwritten   | float32    |
// |                           | longer than the image that has more than 3 taps,    | memory, crash     |            |
// |                           | dilation or a padding as long as itself             |                   |            |
//
// In that order: tests/test_regressions.py::test_maps_of_one_column,
// ::test_the_weight_gradient_of_a_strided_pointwise_convolution, ::test_a_depthwise_convolution_of_a_wide_kernel and
// tests/test_library.py.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace cnnlstm_fast {

// Whether the library multiplies tiles of bfloat16 by AMX: the processor has it, and ONEDNN_MAX_CPU_ISA does not forbid
// it. CNNLSTM_FAST_LIBRARY_ISA=amx makes tests believe so.
bool library_has_amx();

// Whether it multiplies bfloat16 by units of the processor, AMX or AVX512_BF16.
bool library_has_bfloat16();

// Of a convolution of x (n, c, h, w), padded after if at all, by a weight into a map of `out_width` columns. `conv` as
// in the schema of conv_block.
struct LibraryLimits {
  bool contiguous;       // input and weight are to be contiguous in all of a call
  bool contiguous_grad;  // or in the gradient of the weight
  bool as_float;         // they are to be float32
};
LibraryLimits library_limits(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                             const std::vector<int64_t>& conv, int64_t out_width);

}  // namespace cnnlstm_fast
