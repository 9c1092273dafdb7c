// The library's convolution on a weight that lies as it reads it: for frozen models, whose weights stand still.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "packed_map.h"

namespace cnnlstm_fast {

class PackedLibraryConv : public PackedMap {
 public:
  // `conv` as in the schema of conv_block. Raises where the library packs no such weight.
  PackedLibraryConv(const Ints& conv, const torch::stable::Tensor& weight,
                    const std::optional<torch::stable::Tensor>& bias);

 private:
  torch::stable::Tensor map_of(const Block& b, const torch::stable::Tensor& x,
                               const std::optional<torch::stable::Tensor>& added, bool activated) const override;

  const Ints conv_;
  const torch::stable::Tensor weight_, packed_;
  const std::optional<torch::stable::Tensor> bias_;
};

}  // namespace cnnlstm_fast
