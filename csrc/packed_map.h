// Convolutions of frozen models that give a map, on weights that stand still, and what is behind them.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "block_description.h"
#include "tensors.h"

namespace cnnlstm_fast {

class PackedMap {
 public:
  virtual ~PackedMap() = default;

  // The block of x [N, C, H, W]; its bias, and a tensor [N, CO, OH, OW] if there is one, are added before the
  // activation. The result is [N, OH, OW, CO] in the memory order `order` of (N, C, H, W).
  torch::stable::Tensor run(const BlockDescription& description, const Ints& order, const torch::stable::Tensor& x,
                            const std::optional<torch::stable::Tensor>& added) const;

 protected:
  // The map [N, OH, OW, CO] of all images of `x`, contiguous; `activated` only where that is possible.
  virtual torch::stable::Tensor map_of(const Block& b, const torch::stable::Tensor& x,
                                       const std::optional<torch::stable::Tensor>& added, bool activated) const = 0;
  virtual bool can_activate() const { return false; }
};

}  // namespace cnnlstm_fast
