#include "recurrent_description.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "limits.h"
#include "memory.h"

namespace cnnlstm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

namespace {

constexpr const char* kLayerOp = "recurrent_layer";

// Measured limits. More inputs than these, or these if sequences are few, are projected for many steps at
// once instead of with the state. The bits are the same.
const int64_t kMostFusedInputs = limit("FUSED_INPUTS", 1024, 0), kFewSequences = 4,
              kMostFusedInputsOfFew = limit("FUSED_INPUTS_OF_FEW", 128, 0),
              kMostFusedFloats = limit("FUSED_FLOATS", int64_t{1} << 14, 0);

void set_sizes(RecurrentCall& call, const Tensor& x, const Tensor& w_hh, const Maybe& reset, const Maybe& lengths) {
  STD_TORCH_CHECK(call.mode == kLSTM || call.mode == kGRU, "recurrent_layer: unknown mode ", call.mode);
  call.packed = x.dim() == 2 && lengths.has_value();
  STD_TORCH_CHECK(call.packed || x.dim() == 3, "recurrent_layer: expected a 3-d input, or a 2-d one with lengths, got ",
                  x.dim(), "-d");
  STD_TORCH_CHECK(!call.packed || (lengths->dim() == 1 && !call.batch_first && !reset),
                  "recurrent_layer: packed sequences take 1-d lengths, no reset and no batch_first");
  call.dtype = x.scalar_type();
  STD_TORCH_CHECK(call.dtype == ScalarType::Float || call.dtype == ScalarType::BFloat16,
                  "recurrent_layer: the kernels compute float32 and bfloat16 only");
  call.steps = x.size(call.batch_first ? 1 : 0);
  call.batch = call.packed ? lengths->size(0) : x.size(call.batch_first ? 0 : 1);
  call.inputs = x.size(call.packed ? 1 : 2);
  call.gates = gates_of(call.mode);
  STD_TORCH_CHECK(w_hh.dim() == 2 && w_hh.size(0) % call.gates == 0, "recurrent_layer: w_hh has no whole gates");
  call.hidden = w_hh.size(0) / call.gates, call.width = w_hh.size(1);
  STD_TORCH_CHECK(call.hidden >= 1 && call.width >= 1 && call.inputs >= 1, "recurrent_layer: sizes must be positive");
}

void set_weights(RecurrentCall& call, std::vector<DirectionWeights> directions) {
  const bool projected = directions[0].w_hr.has_value();
  STD_TORCH_CHECK(projected ? call.mode == kLSTM && call.width <= call.hidden : call.width == call.hidden,
                  "recurrent_layer: w_hh must be square per gate unless an LSTM is projected, to no more units");
  const int64_t rows = call.gates * call.hidden;
  for (const DirectionWeights& d : directions) {
    check_argument(kLayerOp, "w_ih", d.w_ih, {rows, call.inputs}, call.dtype);
    check_argument(kLayerOp, "w_hh", d.w_hh, {rows, call.width}, call.dtype);
    check_argument(kLayerOp, "b_ih", d.b_ih, {rows}, call.dtype);
    check_argument(kLayerOp, "b_hh", d.b_hh, {rows}, call.dtype);
    check_argument(kLayerOp, "w_hr", d.w_hr, {call.width, call.hidden}, call.dtype);
    STD_TORCH_CHECK(d.w_hr.has_value() == projected && d.b_ih.has_value() == d.b_hh.has_value(),
                    "recurrent_layer: both directions and both biases must be given alike");
  }
  call.directions = std::move(directions);
}

void check_extent(const RecurrentCall& call, const Tensor& x) {
  elements("an input", x);
  elements("weights with their rows padded", {4, call.padded_hidden(), std::max(call.inputs, call.padded_width())});
  elements("what a recurrent layer keeps", {static_cast<int64_t>(call.directions.size()), call.steps, call.batch, 5,
                                            std::max(call.padded_hidden(), call.padded_width())});
  STD_TORCH_CHECK(call.batch <= std::numeric_limits<int32_t>::max(), "recurrent_layer: a batch of ", call.batch,
                  " sequences is too large");
}

void set_state(RecurrentCall& call, const Maybe& h0, const Maybe& c0) {
  const int64_t count = static_cast<int64_t>(call.directions.size());
  STD_TORCH_CHECK(call.mode == kLSTM || !c0, "recurrent_layer: a GRU has no c0");
  check_argument(kLayerOp, "h0", h0, {count, call.batch, call.width}, call.dtype);
  check_argument(kLayerOp, "c0", c0, {count, call.batch, call.hidden}, call.dtype);
  if (h0) call.h0 = as_contiguous_floats(*h0);
  if (c0) call.c0 = as_contiguous_floats(*c0);
}

// Also counts the steps of all sequences.
void set_lengths(RecurrentCall& call, const Maybe& lengths) {
  if (!lengths) {
    call.rows = call.steps * call.batch;
    return;
  }
  const char* wrong_sum = "recurrent_layer: lengths of packed sequences must fall, and their sum be that of all steps";
  check_argument(kLayerOp, "lengths", lengths, {call.batch}, ScalarType::Long);
  call.lengths = torch::stable::contiguous(*lengths);
  const int64_t* values = static_cast<const int64_t*>(call.lengths->data_ptr());
  for (int64_t b = 0; b < call.batch; ++b) {
    STD_TORCH_CHECK(values[b] >= 0 && values[b] <= call.steps, "recurrent_layer: lengths must lie in 0 to ",
                    call.steps);
    STD_TORCH_CHECK(!call.packed || (values[b] <= call.steps - call.rows && (b == 0 || values[b] <= values[b - 1])),
                    wrong_sum);
    call.rows += values[b];
  }
  STD_TORCH_CHECK(!call.packed || call.rows == call.steps, wrong_sum);
}

}  // namespace

bool RecurrentCall::fused_inputs() const {
  if (weights_packed && longest() == 1) return true;  // every weight is read once in either way
  if (rows >= kFewSequences * longest()) return inputs <= kMostFusedInputs;
  // Packed weights cost nothing to read ahead: those stay with the state that a first-level cache holds.
  return weights_packed ? inputs * gates * padded_hidden() <= kMostFusedFloats : inputs <= kMostFusedInputsOfFew;
}

std::vector<DirectionWeights> directions_of(const Tensor& w_ih, const Tensor& w_hh, const Maybe& b_ih,
                                            const Maybe& b_hh, const Maybe& w_hr, const Maybe& w_ih_r,
                                            const Maybe& w_hh_r, const Maybe& b_ih_r, const Maybe& b_hh_r,
                                            const Maybe& w_hr_r) {
  std::vector<DirectionWeights> directions{{w_ih, w_hh, b_ih, b_hh, w_hr}};
  STD_TORCH_CHECK(w_ih_r.has_value() == w_hh_r.has_value(), "recurrent_layer: the reverse direction lacks a weight");
  if (w_ih_r) directions.push_back({*w_ih_r, *w_hh_r, b_ih_r, b_hh_r, w_hr_r});
  return directions;
}

RecurrentCall describe_recurrent(const Tensor& x, const Maybe& h0, const Maybe& c0,
                                 std::vector<DirectionWeights> directions, const Maybe& reset, const Maybe& lengths,
                                 int64_t mode, bool batch_first) {
  RecurrentCall call{};
  call.mode = mode;
  call.batch_first = batch_first;
  set_sizes(call, x, directions[0].w_hh, reset, lengths);
  set_weights(call, std::move(directions));
  check_extent(call, x);
  set_state(call, h0, c0);
  check_argument(kLayerOp, "reset", reset, batch_first ? Ints{call.batch, call.steps} : Ints{call.steps, call.batch},
                 ScalarType::Bool);
  call.reset = reset;
  set_lengths(call, lengths);
  return call;
}

void number_sequences(RecurrentCall& call) {
  int64_t longest = call.steps;
  if (call.lengths) {
    const int64_t* values = static_cast<const int64_t*>(call.lengths->data_ptr());
    call.sorted.assign(values, values + call.batch);
    if (!call.packed) {
      call.order.resize(call.batch);
      std::iota(call.order.begin(), call.order.end(), 0);
      std::stable_sort(call.order.begin(), call.order.end(),
                       [&](int64_t a, int64_t b) { return values[a] > values[b]; });
      for (int64_t q = 0; q < call.batch; ++q) call.sorted[q] = values[call.order[q]];
    }
    longest = call.batch ? call.sorted[0] : 0;
  }
  call.starts.resize(longest + 1);
  for (int64_t t = 0, active = call.batch; t < longest; ++t) {
    while (call.lengths && call.sorted[active - 1] <= t) --active;
    call.starts[t + 1] = call.starts[t] + active;
  }
}

}  // namespace cnnlstm_fast
