// Convolutions and linear layers in bfloat16 on packed weights, by the processor's unit for pairs or tiles of them: for
// frozen models, whose weights stand still.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>

#include "cpu/bfloat16/bfloat16.h"
#include "packed_map.h"
#include "packed_memory.h"

namespace cnnlstm_fast {

// An input in float32 is rounded first.
class PackedPairs : public PackedMap {
 public:
  // Packs a bfloat16 weight (co, c, kh, kw) and the bias, which may be missing; `conv` as in the schema of conv_block,
  // of one group. Raises where the processor has no unit for them.
  PackedPairs(const Ints& conv, const torch::stable::Tensor& weight, const std::optional<torch::stable::Tensor>& bias);

  // The same of a linear layer, whose weight is (co, c, 1, 1): activation(x @ weight.T + bias) of `rows` contiguous
  // rows. `b` has the activation alone.
  void multiply(Block b, const torch::stable::Tensor& x, int64_t rows, const torch::stable::Tensor& out) const;

 private:
  torch::stable::Tensor map_of(const Block& b, const torch::stable::Tensor& x,
                               const std::optional<torch::stable::Tensor>& added, bool activated) const override;
  bool can_activate() const override { return true; }
  // `x` in bfloat16, its channels side by side and padded.
  torch::stable::Tensor interleaved(const torch::stable::Tensor& x) const;
  // A copy with the convolution's zeros around it, where that lets it be multiplied as it lies; `b` is then of that.
  torch::stable::Tensor padded(const torch::stable::Tensor& x, Block& b) const;
  void compute(const Block& b, const torch::stable::Tensor& x, const torch::stable::Tensor* added,
               const torch::stable::Tensor& out) const;

  const BFloat16Table& kernels_;
  const int64_t channels_, padded_channels_, out_channels_, words_;
  std::unique_ptr<const PackedFloats> panels_, bias_;
};

}  // namespace cnnlstm_fast
