// A recurrent layer's call as its kernels see it, made from the arguments of its ops. They are checked, since an op may
// be called with anything.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "recurrent_packing.h"
#include "tensors.h"

namespace cnnlstm_fast {

struct DirectionWeights {
  torch::stable::Tensor w_ih, w_hh;
  std::optional<torch::stable::Tensor> b_ih, b_hh, w_hr;
};

// A recurrent layer's call: its sizes, and the arguments that are checked.
struct RecurrentCall {
  int64_t mode, steps, batch, inputs, hidden, width, gates;
  int64_t rows;  // steps of all sequences together
  bool batch_first, packed;
  bool weights_packed;  // before the call: see packed_recurrent.h
  torch::headeronly::ScalarType dtype;
  std::vector<DirectionWeights> directions;
  std::optional<torch::stable::Tensor> reset, lengths, h0, c0;
  // As the kernels number sequences, see recurrent.h; the last two are empty where all are of one length.
  std::vector<int64_t> starts, order, sorted;

  int64_t kept_of_gates() const { return mode == kLSTM ? 5 : 4; }
  int64_t padded_hidden() const { return padded_units(hidden); }
  int64_t padded_width() const { return padded_units(width); }
  Ints sequence(int64_t features) const {
    if (packed) return {rows, features};
    return batch_first ? Ints{batch, steps, features} : Ints{steps, batch, features};
  }
  // The shape of what a forward keeps: by steps and sequences, or by the rows of all sequences.
  Ints saved(int64_t directions, bool with_out, bool by_rows) const {
    const int64_t kept = kept_of_gates() + with_out;
    return by_rows ? Ints{directions, rows, kept, padded_hidden()}
                   : Ints{directions, steps, batch, kept, padded_hidden()};
  }
  int64_t step_dim() const { return batch_first ? 1 : 0; }
  int64_t longest() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t caller(int64_t q) const { return order.empty() ? q : order[q]; }
  int64_t length(int64_t q) const { return sorted.empty() ? steps : sorted[q]; }
  int64_t active(int64_t t) const { return starts[t + 1] - starts[t]; }
  // Whether inputs are projected with the state, step by step.
  bool fused_inputs() const;
};

// A tensor's strides from step to step and from sequence to sequence.
struct Strides {
  int64_t step, sequence;
  Strides(const RecurrentCall& call, const torch::stable::Tensor& t)
      : step(call.packed ? kPacked : t.stride(call.step_dim())),
        sequence(t.stride(call.packed ? 0 : 1 - call.step_dim())) {}
};

// The weights of one direction, or of two.
std::vector<DirectionWeights> directions_of(
    const torch::stable::Tensor& w_ih, const torch::stable::Tensor& w_hh,
    const std::optional<torch::stable::Tensor>& b_ih, const std::optional<torch::stable::Tensor>& b_hh,
    const std::optional<torch::stable::Tensor>& w_hr, const std::optional<torch::stable::Tensor>& w_ih_r,
    const std::optional<torch::stable::Tensor>& w_hh_r, const std::optional<torch::stable::Tensor>& b_ih_r,
    const std::optional<torch::stable::Tensor>& b_hh_r, const std::optional<torch::stable::Tensor>& w_hr_r);

// Raises where the arguments are not those of a layer. All are as in the schema of recurrent_layer.
RecurrentCall describe_recurrent(const torch::stable::Tensor& x, const std::optional<torch::stable::Tensor>& h0,
                                 const std::optional<torch::stable::Tensor>& c0,
                                 std::vector<DirectionWeights> directions,
                                 const std::optional<torch::stable::Tensor>& reset,
                                 const std::optional<torch::stable::Tensor>& lengths, int64_t mode, bool batch_first);

// Numbers the sequences from the longest to the shortest, once the results have found room.
void number_sequences(RecurrentCall& call);

}  // namespace cnnlstm_fast
