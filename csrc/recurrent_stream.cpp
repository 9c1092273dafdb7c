// A stack of recurrent layers one step at a time on the CPU: weights packed once, states in place. The
// schema stands in cnnlstm_fast/ops/recurrent_stream.py; the arithmetic is that of whole sequences.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/dispatch.h"
#include "limits.h"
#include "memory.h"
#include "op.h"
#include "threads.h"

namespace cnnlstm_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using Maybe = std::optional<Tensor>;

// Weights that one core streams from its own cache sooner than a second one is woken.
const int64_t kFloatsOfOneThread = limit("STREAM_FLOATS", int64_t{1} << 19, 1);

int64_t padded(int64_t units) {
  return ceil_div(units, kUnitGroup) * kUnitGroup;
}

// Where the parts of one packed layer lie, in floats. All are multiples of a cache line.
struct Parts {
  int64_t h, r, bias, zeros, end;  // packed_x lies at 0
  Parts(int64_t gates, int64_t inputs, int64_t hidden, int64_t width) {
    const int64_t units = padded(hidden), panel = recurrent_kernels().panel;
    h = units * gates * inputs;
    r = h + units * gates * width;
    bias = r + (width < hidden ? ceil_div(width, panel) * panel * units : 0);
    zeros = bias + 4 * units;
    end = zeros + std::max(units, padded(inputs));
  }
};

int64_t gates_of(int64_t mode) {
  return mode == kLSTM ? 4 : 3;
}

const float* rows_of(const Tensor& t) {
  return static_cast<const float*>(t.data_ptr());
}

void check_float(const Tensor& t, const Ints& size, const char* name) {
  bool fits = t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous() &&
              t.dim() == static_cast<int64_t>(size.size());
  for (size_t i = 0; fits && i < size.size(); ++i) fits = t.size(i) == size[i];
  STD_TORCH_CHECK(fits, "recurrent_stream: ", name, " must be a contiguous float32 tensor that fits the others");
}

Tensor recurrent_stream_pack(Tensor w_ih, Tensor w_hh, Maybe b_ih, Maybe b_hh, Maybe w_hr, int64_t mode) {
  const RecurrentTable& k = recurrent_kernels();
  STD_TORCH_CHECK((mode == kLSTM || mode == kGRU) && w_ih.dim() == 2 && w_hh.dim() == 2,
                  "recurrent_stream: expected mode 0 or 1 and 2-d weights");
  const int64_t gates = gates_of(mode), rows = w_hh.size(0), hidden = rows / gates, width = w_hh.size(1);
  const int64_t inputs = w_ih.size(1), units = padded(hidden);
  check_float(w_ih, {gates * hidden, inputs}, "w_ih");
  check_float(w_hh, {gates * hidden, w_hr ? width : hidden}, "w_hh");
  STD_TORCH_CHECK(b_ih.has_value() == b_hh.has_value(), "recurrent_stream: one bias without the other");
  if (b_ih) check_float(*b_ih, {rows}, "b_ih"), check_float(*b_hh, {rows}, "b_hh");
  if (w_hr) check_float(*w_hr, {width, hidden}, "w_hr");
  STD_TORCH_CHECK(w_hr ? mode == kLSTM && width < hidden : width == hidden,
                  "recurrent_stream: only an LSTM is projected, to fewer units");
  elements("weights", {gates, hidden, std::max(inputs, width)});
  const Parts parts(gates, inputs, hidden, width);
  const Tensor packed = torch::stable::new_zeros(w_ih, Ints{parts.end});
  float* to = static_cast<float*>(packed.data_ptr());
  static constexpr int32_t kAsTheyAre[4] = {0, 1, 2, 3}, kNewFirst[3] = {2, 0, 1};
  k.pack_gates(rows_of(w_ih), inputs, hidden, inputs, gates, mode == kGRU ? kNewFirst : kAsTheyAre, to, 0, units);
  k.pack_gates(rows_of(w_hh), width, hidden, width, gates, kAsTheyAre, to + parts.h, 0, units);
  if (w_hr) {
    const Tensor turned = torch::stable::contiguous(torch::stable::transpose(*w_hr, 0, 1));
    k.pack_columns(rows_of(turned), width, 1, hidden, kAsTheyAre, width, to + parts.r, 0, ceil_div(width, k.panel));
  }
  if (!b_ih) return packed;
  const float *of_x = rows_of(*b_ih), *of_h = rows_of(*b_hh);
  for (int64_t u = 0; u < hidden; ++u) {
    float* bias = to + parts.bias + u / k.lanes * 4 * k.lanes + u % k.lanes;
    if (mode == kLSTM) {
      for (int64_t g = 0; g < 4; ++g) bias[g * k.lanes] = of_x[g * hidden + u] + of_h[g * hidden + u];
    } else {
      bias[0] = of_x[2 * hidden + u], bias[3 * k.lanes] = of_h[2 * hidden + u];
      for (int64_t g = 0; g < 2; ++g) bias[(1 + g) * k.lanes] = of_x[g * hidden + u] + of_h[g * hidden + u];
    }
  }
  return packed;
}

Tensor recurrent_stream_step(Tensor x, Tensor h, Tensor c, Tensor packed, Maybe reset, int64_t mode, int64_t hidden,
                             int64_t width, int64_t step) {
  const RecurrentTable& k = recurrent_kernels();
  STD_TORCH_CHECK(mode == kLSTM || mode == kGRU, "recurrent_stream: unknown mode ", mode);
  constexpr int64_t kMostUnits = int64_t{1} << 24;
  STD_TORCH_CHECK(x.dim() == 2 && h.dim() == 4 && h.size(0) >= 1 && width >= 1 && hidden <= kMostUnits &&
                      (mode == kLSTM ? width <= hidden : width == hidden),
                  "recurrent_stream: sizes do not fit");
  const int64_t layers = h.size(0), batch = x.size(0), inputs = x.size(1), gates = gates_of(mode);
  elements("weights", {gates, hidden, std::max(inputs, width)});
  check_float(x, {batch, inputs}, "x");
  check_float(h, {layers, 2, batch, padded(width)}, "h");
  if (mode == kLSTM) check_float(c, {layers, batch, padded(hidden)}, "c");
  if (reset) {
    STD_TORCH_CHECK(
        reset->is_cpu() && reset->scalar_type() == ScalarType::Bool && reset->dim() == 1 && reset->size(0) == batch,
        "recurrent_stream: reset must be bool, one of each sequence");
  }
  const Parts first(gates, inputs, hidden, width), other(gates, width, hidden, width);
  check_float(packed, {first.end + (layers - 1) * other.end}, "packed");
  for (const Tensor* t : {&h, &c, &packed})  // as memory of PyTorch's is; their vectors are read whole
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t->data_ptr()) % 64 == 0,
                    "recurrent_stream: h, c and packed must begin at a multiple of 64 bytes: clone them");
  const Tensor out = torch::stable::new_empty(x, Ints{batch, width});
  const AlignedFloats unprojected(width < hidden ? batch * padded(hidden) : 0);
  const float* weights = rows_of(packed);
  const int64_t parity = batch * padded(width), done = step & 1;

  const FlushDenormals flush;  // on this thread, which works alone where the weights are few
  RecurrentLayer l{};
  l.mode = static_cast<int32_t>(mode);
  l.projected = width < hidden;
  const int64_t starts[3] = {0, batch, 2 * batch};
  l.starts = starts;
  l.steps = 2, l.batch = batch, l.hidden = hidden, l.width = width;  // the second step is as the first
  l.padded_hidden = padded(hidden), l.padded_width = padded(width);
  l.out = static_cast<float*>(out.data_ptr()), l.out_sequence = width;
  if (reset) l.reset = static_cast<const bool*>(reset->data_ptr()), l.reset_sequence = reset->stride(0);
  l.m = unprojected.data();
  for (int64_t layer = 0; layer < layers; ++layer) {
    const Parts& parts = layer ? other : first;
    float* state = static_cast<float*>(h.data_ptr()) + layer * 2 * parity;
    l.inputs = layer ? width : inputs;
    l.x = layer ? state - 2 * parity + (1 - done) * parity : rows_of(x);
    l.x_sequence = layer ? l.padded_width : inputs;
    l.h = state;
    if (mode == kLSTM) l.c = static_cast<float*>(c.data_ptr()) + layer * batch * l.padded_hidden;
    l.packed_x = weights, l.packed_h = weights + parts.h, l.packed_r = weights + parts.r;
    l.bias = weights + parts.bias, l.zeros = weights + parts.zeros;
    auto units = [&](int64_t begin, int64_t end) {
      float* scratch = thread_scratch(k.forward_scratch(l));
      for (int64_t b = 0; b < batch; b += kMaxRows)
        k.forward_step(l, done, b, std::min(kMaxRows, batch - b), begin * k.lanes, end * k.lanes, scratch);
    };
    const int64_t blocks = l.padded_hidden / k.lanes;
    if (parts.end > kFloatsOfOneThread && torch::stable::get_num_threads() > 1)
      in_parallel(0, blocks, ceil_div(blocks, torch::stable::get_num_threads()), units);
    else
      units(0, blocks);
    if (l.projected) {
      float* scratch = thread_scratch(k.forward_scratch(l));
      for (int64_t b = 0; b < batch; b += kMaxRows) k.project_step(l, done, b, std::min(kMaxRows, batch - b), scratch);
    }
    weights += parts.end;
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CPU, m) {
  m.impl("recurrent_stream_pack", CNNLSTM_FAST_OP(recurrent_stream_pack));
  m.impl("recurrent_stream_step", CNNLSTM_FAST_OP(recurrent_stream_step));
}

}  // namespace cnnlstm_fast
