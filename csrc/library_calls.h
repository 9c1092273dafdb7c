// Calls of PyTorch's own convolution, with what it may be given (library_limits.h).
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "tensors.h"

namespace cnnlstm_fast {

// Gradients of a convolution; one that was not asked for has no element.
struct ConvolutionGrads {
  torch::stable::Tensor x, weight, bias;
};

// The convolution's map [N, OH, OW, CO], contiguous, of an input [N, C, H, W]; most convolutions are fastest on inputs
// and maps whose channels are innermost. `conv` as in the schema of conv_block.
torch::stable::Tensor library_convolution(const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                                          const std::optional<torch::stable::Tensor>& bias, const Ints& conv,
                                          int64_t out_width);

// Its gradients from that of the map, [N, CO, OH, OW] of any strides. The bias's is not computed.
ConvolutionGrads library_convolution_backward(const torch::stable::Tensor& grad_map, const torch::stable::Tensor& input,
                                              const torch::stable::Tensor& weight, const Ints& conv, bool need_x,
                                              bool need_weight);

}  // namespace cnnlstm_fast
