// The library's convolution on a weight that lies as it reads it: for frozen models, whose weights stand still.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "block_description.h"
#include "tensors.h"

namespace cnnlstm_fast {

class PackedLibraryConv {
 public:
  // `conv` as in the schema of conv_block. Raises where the library packs no such weight.
  PackedLibraryConv(const Ints& conv, const torch::stable::Tensor& weight,
                    const std::optional<torch::stable::Tensor>& bias);

  // The block of x [N, C, H, W]; its bias, and a tensor [N, CO, OH, OW] if there is one, are added before the
  // activation. The result is [N, OH, OW, CO] in the memory order `order` of (N, C, H, W).
  torch::stable::Tensor run(const BlockDescription& description, const Ints& order, const torch::stable::Tensor& x,
                            const std::optional<torch::stable::Tensor>& added) const;

 private:
  // The map [N, OH, OW, CO], contiguous.
  torch::stable::Tensor map_of(const Block& b, const torch::stable::Tensor& x,
                               const std::optional<torch::stable::Tensor>& added) const;

  const Ints conv_;
  const torch::stable::Tensor weight_, packed_;
  const std::optional<torch::stable::Tensor> bias_;
};

}  // namespace cnnlstm_fast
