#include "recurrent_packing.h"

#include <torch/csrc/stable/ops.h>

#include "cpu/dispatch.h"
#include "tensors.h"

namespace cnnlstm_fast {

using torch::stable::Tensor;

const int32_t* gate_order(int64_t mode, bool of_inputs) {
  static constexpr int32_t kAsTheyAre[4] = {0, 1, 2, 3};
  static constexpr int32_t kNewFirst[3] = {2, 0, 1};
  return mode == kGRU && of_inputs ? kNewFirst : kAsTheyAre;
}

int64_t gate_floats(int64_t mode, int64_t hidden, int64_t inputs) {
  return padded_units(hidden) * gates_of(mode) * inputs;
}

void pack_gate_weight(const Tensor& weight, int64_t mode, bool of_inputs, float* to) {
  const RecurrentTable& k = recurrent_kernels();
  const int64_t gates = gates_of(mode), hidden = weight.size(0) / gates;
  const float* from = floats(weight);
  for_each_item(padded_units(hidden) / k.lanes, [&](int64_t i) {
    k.pack_gates(from, weight.stride(0), hidden, weight.size(1), gates, gate_order(mode, of_inputs), to, i * k.lanes,
                 (i + 1) * k.lanes);
  });
}

int64_t projection_floats(int64_t hidden, int64_t width) {
  const int64_t panel = recurrent_kernels().panel;
  return ceil_div(width, panel) * panel * padded_units(hidden);
}

void pack_projection(const Tensor& w_hr, float* to) {
  const RecurrentTable& k = recurrent_kernels();
  const int64_t width = w_hr.size(0), hidden = w_hr.size(1);
  const Tensor columns = as_contiguous_floats(torch::stable::transpose(const_cast<Tensor&>(w_hr), 0, 1));  // [H, P]
  k.pack_columns(floats(columns), width, 1, hidden, gate_order(kLSTM, false), width, to, 0, ceil_div(width, k.panel));
}

int64_t bias_floats(int64_t hidden) {
  return 4 * padded_units(hidden);
}

void pack_bias(const Tensor& b_ih, const Tensor& b_hh, int64_t mode, float* to) {
  pack_bias(b_ih, b_hh, mode, to, recurrent_kernels().lanes);
}

void pack_bias(const Tensor& b_ih, const Tensor& b_hh, int64_t mode, float* to, int64_t lanes) {
  const int64_t hidden = b_ih.size(0) / gates_of(mode);
  const float *of_inputs = floats(b_ih), *of_state = floats(b_hh);
  for (int64_t u = 0; u < hidden; ++u) {
    float* columns = to + u / lanes * 4 * lanes + u % lanes;
    auto sum = [&](int64_t gate) { return of_inputs[gate * hidden + u] + of_state[gate * hidden + u]; };
    if (mode == kLSTM) {
      for (int64_t g = 0; g < 4; ++g) columns[g * lanes] = sum(g);
    } else {
      columns[0] = of_inputs[2 * hidden + u], columns[3 * lanes] = of_state[2 * hidden + u];
      for (int64_t g = 0; g < 2; ++g) columns[(1 + g) * lanes] = sum(g);
    }
  }
}

}  // namespace cnnlstm_fast
