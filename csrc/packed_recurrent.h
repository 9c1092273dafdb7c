// A recurrent layer whose weights are packed once, for frozen models: elsewhere weights may change between calls.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "recurrent_description.h"

namespace cnnlstm_fast {

// The weights of one direction as the kernels read them (recurrent_packing.h).
struct PackedDirection {
  torch::stable::Tensor x, h, bias;
  std::optional<torch::stable::Tensor> r;
};

class PackedRecurrent {
 public:
  // One direction or two, contiguous float32 or bfloat16; those of float32 are packed in int8, if that is asked for,
  // where they are not projected.
  PackedRecurrent(std::vector<DirectionWeights> directions, int64_t mode, bool int8);

  // (out, h_n, c_n) as the op recurrent_layer gives them, of the same bits unless in int8. `x` has the weights' dtype.
  std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> run(
      const torch::stable::Tensor& x, const std::optional<torch::stable::Tensor>& h0,
      const std::optional<torch::stable::Tensor>& c0, const std::optional<torch::stable::Tensor>& reset,
      const std::optional<torch::stable::Tensor>& lengths, bool batch_first) const;

  // The call of a layer without resets and lengths; raises where its arguments do not fit.
  RecurrentCall describe(const torch::stable::Tensor& x, const std::optional<torch::stable::Tensor>& h0,
                         const std::optional<torch::stable::Tensor>& c0, bool batch_first) const {
    return describe_recurrent(x, h0, c0, directions_, {}, {}, mode_, batch_first);
  }
  torch::headeronly::ScalarType dtype() const { return directions_[0].w_hh.scalar_type(); }
  bool has_one_direction() const { return directions_.size() == 1 && !directions_[0].w_hr; }  // not projected
  int64_t hidden() const { return directions_[0].w_hh.size(0) / gates_of(mode_); }
  const PackedDirection& packed(int64_t direction) const { return packed_[direction]; }
  const Int8Unit* unit() const { return unit_; }  // null: float32

 private:
  const int64_t mode_;
  const Int8Unit* const unit_;
  std::vector<DirectionWeights> directions_;
  std::vector<PackedDirection> packed_;
};

}  // namespace cnnlstm_fast
