// Weights of frozen layers in int8, as cpu/int8 reads them.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "cpu/dispatch.h"
#include "threads.h"

namespace cnnlstm_fast {

// Words of a quantized row of so many numbers.
inline int64_t int8_row(int64_t inputs) {
  return round_up(ceil_div(inputs, 4), int8_unit().row_words);
}

// Floats of memory of the panels of w_ih or w_hh, and the panels: a scale for every row of the weight, which is a
// gate's unit. Contiguous float32, at most kMostInt8Inputs columns.
int64_t int8_gate_floats(int64_t mode, int64_t hidden, int64_t inputs);
void pack_int8_gates(const torch::stable::Tensor& weight, int64_t mode, bool of_inputs, float* to);

// The same of a linear layer's weight.
int64_t int8_linear_floats(int64_t outs, int64_t inputs);
void pack_int8_linear(const torch::stable::Tensor& weight, float* to);

}  // namespace cnnlstm_fast
