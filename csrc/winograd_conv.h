// Convolutions with 3x3 taps by Winograd's minimal filtering (cpu/winograd.h): whole tensors, threads and memory.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cpu/dispatch.h"
#include "memory.h"

namespace cnnlstm_fast {

// Whether the rounding of tiles suits this weight (co, c, 3, 3): it is relative to the largest element of a tile. Where
// a tap is nearly zero for a whole channel, that element may not contribute to the channel at all, and its rounding
// then is large beside the channel's values.
bool winograd_suits(const torch::stable::Tensor& weight);
bool winograd_suits(const float* weight, int64_t co, int64_t c);

// How a call is divided among threads.
struct WinogradItems {
  int64_t images, rows, bands, parts, part_channels, count, scratch_floats;
  // Item i; `channel0` may lie behind the last channel, and then there is nothing to do.
  WinogradItem at(const Winograd& g, const Block& block, int64_t i) const;
};
WinogradItems winograd_items(const Winograd& g, const Block& block);

// A float32 convolution with stride 1 by one weight, for input after input.
class WinogradConvolution {
 public:
  // `weight` is (co, c, 3, 3). Transposed, the convolution turns a gradient of the map into one of the input.
  WinogradConvolution(const torch::stable::Tensor& weight, bool transposed);

  // Writes the block of x (n, c, h, w). Returns whether its map is finite; otherwise NaN and infinity are not where
  // they belong.
  bool run(const Block& block, const torch::stable::Tensor& x, const std::optional<torch::stable::Tensor>& bias,
           const Outputs& out) const;
  // The same of the map (n, oh, ow, co), contiguous, of x behind `ph`, `pw` zeros.
  bool run(const torch::stable::Tensor& x, int64_t ph, int64_t pw, int64_t oh, int64_t ow,
           const std::optional<torch::stable::Tensor>& bias, float* map) const;

 private:
  int64_t c_, co_;
  torch::stable::Tensor transformed_;
};

// Sums up the gradient of such a weight.
class WinogradWeightGrad {
 public:
  explicit WinogradWeightGrad(const torch::stable::Tensor& weight);

  // `grad` is the map's (n, oh, ow, co), contiguous, of the input x (n, c, h, w) behind `ph`, `pw` zeros.
  void add(const torch::stable::Tensor& x, const torch::stable::Tensor& grad, int64_t ph, int64_t pw);

  // Writes the gradient in the weight's shape, contiguous. Returns whether it is finite.
  bool result(float* to) const;

 private:
  int64_t c_, co_;
  torch::stable::Tensor sums_;
  bool empty_ = true;
};

}  // namespace cnnlstm_fast
