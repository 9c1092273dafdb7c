// Recurrent layers on packed weights, one behind the other, whose steps overlap: while one core works on step t of a
// layer, another works on an earlier step of the next one.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <vector>

#include "packed_recurrent.h"

namespace cnnlstm_fast {

// A layer, and the state before its first step.
struct StackLayer {
  std::shared_ptr<const PackedRecurrent> layer;
  std::optional<torch::stable::Tensor> h0, c0;
};

struct StackResults {
  torch::stable::Tensor out;                    // of the last layer
  std::vector<torch::stable::Tensor> h_n, c_n;  // of each layer
};

// The results of layers of one direction each, of the same bits as one after the other. With `keep` (T, B), float32,
// the state of sequence b is multiplied by keep[t][b] before step t of every layer.
StackResults run_stack(const std::vector<StackLayer>& layers, const torch::stable::Tensor& x,
                       const std::optional<torch::stable::Tensor>& keep, bool batch_first);

}  // namespace cnnlstm_fast
