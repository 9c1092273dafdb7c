// Weights of a recurrent layer as its kernels read them: cpu/recurrent.h has the layouts. Sizes are in floats.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "cpu/recurrent/recurrent.h"
#include "threads.h"

namespace cnnlstm_fast {

// Units with their padding.
inline int64_t padded_units(int64_t units) {
  return ceil_div(units, kUnitGroup) * kUnitGroup;
}

inline int64_t gates_of(int64_t mode) {
  return mode == kLSTM ? 4 : 3;
}

// For every gate in the kernels' order its place in the weights of the inputs, or of the state.
const int32_t* gate_order(int64_t mode, bool of_inputs);

// w_ih [gates * H, I] or w_hh [gates * H, P], float32 with contiguous rows, by gates of units.
int64_t gate_floats(int64_t mode, int64_t hidden, int64_t inputs);
void pack_gate_weight(const torch::stable::Tensor& weight, int64_t mode, bool of_inputs, float* to);

// w_hr [P, H], float32.
int64_t projection_floats(int64_t hidden, int64_t width);
void pack_projection(const torch::stable::Tensor& w_hr, float* to);

// Both biases [gates * H], contiguous float32, into memory that is zero.
int64_t bias_floats(int64_t hidden);
void pack_bias(const torch::stable::Tensor& b_ih, const torch::stable::Tensor& b_hh, int64_t mode, float* to);
void pack_bias(const torch::stable::Tensor& b_ih, const torch::stable::Tensor& b_hh, int64_t mode, float* to,
               int64_t lanes);

}  // namespace cnnlstm_fast
