// A stack of recurrent layers one step at a time on the CPU: weights packed once, states in place. The
// schema stands in cnnlstm_fast/ops/recurrent_stream.py; the arithmetic is that of whole sequences.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "cpu/dispatch.h"
#include "limits.h"
#include "memory.h"
#include "op.h"
#include "recurrent_packing.h"
#include "tensors.h"
#include "threads.h"

namespace cnnlstm_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// Weights that one core streams from its own cache sooner than a second one is woken.
const int64_t kFloatsOfOneThread = limit("STREAM_FLOATS", int64_t{1} << 19, 1);

// Where the parts of one packed layer lie, in floats. All are multiples of a cache line.
struct Parts {
  int64_t h, r, bias, zeros, end;  // packed_x lies at 0
  Parts(int64_t mode, int64_t inputs, int64_t hidden, int64_t width) {
    h = gate_floats(mode, hidden, inputs);
    r = h + gate_floats(mode, hidden, width);
    bias = r + (width < hidden ? projection_floats(hidden, width) : 0);
    zeros = bias + bias_floats(hidden);
    end = zeros + std::max(padded_units(hidden), padded_units(inputs));
  }
};

constexpr const char* kStreamOp = "recurrent_stream";

void check_floats(const char* name, const Maybe& t, const Ints& shape) {
  check_argument(kStreamOp, name, t, shape, ScalarType::Float, Memory::kContiguous);
}

Tensor recurrent_stream_pack(Tensor w_ih, Tensor w_hh, Maybe b_ih, Maybe b_hh, Maybe w_hr, int64_t mode) {
  STD_TORCH_CHECK((mode == kLSTM || mode == kGRU) && w_ih.dim() == 2 && w_hh.dim() == 2,
                  "recurrent_stream: expected mode 0 or 1 and 2-d weights");
  const int64_t gates = gates_of(mode), rows = w_hh.size(0), hidden = rows / gates, width = w_hh.size(1);
  const int64_t inputs = w_ih.size(1);
  STD_TORCH_CHECK(rows == gates * hidden, "recurrent_stream: w_hh has no whole gates");
  check_floats("w_ih", w_ih, {rows, inputs});
  check_floats("w_hh", w_hh, {rows, width});
  STD_TORCH_CHECK(b_ih.has_value() == b_hh.has_value(), "recurrent_stream: one bias without the other");
  check_floats("b_ih", b_ih, {rows});
  check_floats("b_hh", b_hh, {rows});
  check_floats("w_hr", w_hr, {width, hidden});
  STD_TORCH_CHECK(w_hr ? mode == kLSTM && width < hidden : width == hidden,
                  "recurrent_stream: only an LSTM is projected, to fewer units");
  elements("weights", {gates, hidden, std::max(inputs, width)});
  const Parts parts(mode, inputs, hidden, width);
  const Tensor packed = torch::stable::new_zeros(w_ih, Ints{parts.end});
  float* to = mutable_floats(packed);
  pack_gate_weight(w_ih, mode, true, to);
  pack_gate_weight(w_hh, mode, false, to + parts.h);
  if (w_hr) pack_projection(*w_hr, to + parts.r);
  if (b_ih) pack_bias(*b_ih, *b_hh, mode, to + parts.bias);
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
  check_floats("x", x, {batch, inputs});
  check_floats("h", h, {layers, 2, batch, padded_units(width)});
  if (mode == kLSTM) check_floats("c", c, {layers, batch, padded_units(hidden)});
  check_argument(kStreamOp, "reset", reset, {batch}, ScalarType::Bool);
  const Parts first(mode, inputs, hidden, width), other(mode, width, hidden, width);
  check_floats("packed", packed, {first.end + (layers - 1) * other.end});
  for (const Tensor* t : {&h, &c, &packed})  // as memory of PyTorch's is; their vectors are read whole
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t->data_ptr()) % 64 == 0,
                    "recurrent_stream: h, c and packed must begin at a multiple of 64 bytes: clone them");
  const Tensor out = torch::stable::new_empty(x, Ints{batch, width});
  const AlignedFloats unprojected(width < hidden ? batch * padded_units(hidden) : 0);
  const float* weights = floats(packed);
  const int64_t parity = batch * padded_units(width), done = step & 1;

  const FlushDenormals flush;  // on this thread, which works alone where the weights are few
  RecurrentLayer l{};
  l.mode = static_cast<int32_t>(mode);
  l.projected = width < hidden;
  const int64_t starts[3] = {0, batch, 2 * batch};
  l.starts = starts;
  l.steps = 2, l.batch = batch, l.hidden = hidden, l.width = width;  // the second step is as the first
  l.padded_hidden = padded_units(hidden), l.padded_width = padded_units(width);
  l.out = mutable_floats(out), l.out_sequence = width;
  if (reset) l.reset = static_cast<const bool*>(reset->data_ptr()), l.reset_sequence = reset->stride(0);
  l.m = unprojected.data();
  for (int64_t layer = 0; layer < layers; ++layer) {
    const Parts& parts = layer ? other : first;
    float* state = mutable_floats(h) + layer * 2 * parity;
    l.inputs = layer ? width : inputs;
    l.x = layer ? state - 2 * parity + (1 - done) * parity : floats(x);
    l.x_sequence = layer ? l.padded_width : inputs;
    l.h = state;
    if (mode == kLSTM) l.c = mutable_floats(c) + layer * batch * l.padded_hidden;
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
