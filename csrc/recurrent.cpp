// cnnlstm_fast::recurrent_layer and its backward on the CPU: checks, allocation, threads. The schema and the
// meaning of every argument stand in cnnlstm_fast/ops/recurrent.py, the arithmetic in cpu/recurrent.inc.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <deque>
#include <optional>
#include <vector>

#include "cpu/dispatch.h"
#include "int8_packing.h"
#include "limits.h"
#include "memory.h"
#include "op.h"
#include "packed_recurrent.h"
#include "recurrent_description.h"
#include "recurrent_packing.h"
#include "recurrent_pairs.h"
#include "recurrent_steps.h"
#include "tensors.h"
#include "threads.h"

namespace cnnlstm_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// Gradients of pre-activations that meet all weights of the inputs at a time.
const int64_t kRowsFloats = limit("RECURRENT_ROWS_FLOATS", int64_t{1} << 16, 1);

// Sequences whose rows every block of units quantizes for itself, sooner than all wait for one another.
const int64_t kFewQuantized = limit("INT8_ROWS_ALONE", 4, 0);

// ---- Forward

// A direction as the kernels see it, and the memory that it points to.
struct Prepared {
  explicit Prepared(const BFloat16Table* low, const Int8Unit* unit = nullptr)
      : low(low),
        kernels(low    ? low->recurrent
                : unit ? int8_kernels().recurrent
                       : recurrent_kernels()) {
    layer.unit = unit;
  }

  const BFloat16Table* const low;  // null: products are of float32
  const RecurrentTable& kernels;
  PairLayer layer{};
  std::deque<AlignedFloats> cleared;
  std::vector<Tensor> held;

  // Memory of the quantized rows of a step.
  float* step_rows() {
    if (!rows_of_step_) rows_of_step_ = zeros(int8_kernels().step_rows_floats(layer));
    return rows_of_step_;
  }

  float* zeros(int64_t floats) { return cleared.emplace_back(floats).data(); }
  float* memory(const Tensor& like, int64_t floats) {
    return mutable_floats(held.emplace_back(new_temporary(like, {floats}, ScalarType::Float)));
  }

 private:
  float* rows_of_step_ = nullptr;
};

// `out` may be missing where what is saved has it.
void describe_layer(const RecurrentCall& call, int64_t d, const Tensor& x, const Maybe& out, const Tensor& saved,
                    Prepared& p) {
  RecurrentLayer& l = p.layer;
  const int64_t directions = static_cast<int64_t>(call.directions.size());
  l.mode = static_cast<int32_t>(call.mode);
  l.reversed = d == 1;
  l.projected = call.directions[d].w_hr.has_value();
  l.steps = call.longest(), l.batch = call.batch, l.inputs = call.inputs, l.hidden = call.hidden, l.width = call.width;
  l.padded_hidden = call.padded_hidden(), l.padded_width = call.padded_width();
  const Strides of_x(call, x);
  l.x = floats(x), l.x_step = of_x.step, l.x_sequence = of_x.sequence;
  if (call.reset) {
    const Strides of_reset(call, *call.reset);
    l.reset = static_cast<const bool*>(call.reset->data_ptr());
    l.reset_step = of_reset.step, l.reset_sequence = of_reset.sequence;
  }
  l.starts = call.starts.data();
  if (!call.order.empty()) l.order = call.order.data();
  if (!call.sorted.empty()) l.lengths = call.sorted.data();
  if (out) {
    const Strides of_out(call, *out);
    l.out = mutable_floats(*out) + d * call.width, l.out_step = of_out.step, l.out_sequence = of_out.sequence;
  }
  if (saved.numel()) {
    const int64_t last = saved.dim() - 1;
    l.saved = mutable_floats(saved) + d * (saved.numel() / directions);
    l.kept = saved.size(last - 1), l.keep_out = l.kept > call.kept_of_gates();
    l.saved_sequence = saved.stride(last - 2), l.saved_step = last == 4 ? saved.stride(1) : kPacked;
  }
  l.zeros = p.zeros(std::max({l.padded_hidden, l.padded_width, l.inputs}));
}

void pack_weights(const RecurrentCall& call, int64_t d, Prepared& p) {
  RecurrentLayer& l = p.layer;
  const DirectionWeights& w = call.directions[d];
  auto pack = [&](const Tensor& weight, bool of_inputs) {
    if (p.low) {
      const Tensor words = as_word_rows(weight, *p.low);
      float* packed = p.memory(weight, gate_floats(call.mode, l.hidden, words.size(1) / 2));
      pack_gate_words(words, call.mode, of_inputs, *p.low, packed);
      return packed;
    }
    const Tensor rows = as_float_rows(weight);
    float* packed = p.memory(weight, gate_floats(call.mode, l.hidden, rows.size(1)));
    pack_gate_weight(rows, call.mode, of_inputs, packed);
    return packed;
  };
  if (call.fused_inputs() || p.low) {
    l.packed_x = pack(w.w_ih, true);
  } else {
    const Tensor& rows = p.held.emplace_back(as_float_rows(w.w_ih));
    l.w_ih = floats(rows), l.w_ih_stride = rows.stride(0), l.order_x = gate_order(call.mode, true);
  }
  l.packed_h = pack(w.w_hh, false);
  if (l.projected) {
    float* packed = p.memory(*w.w_hr, projection_floats(l.hidden, l.width));
    pack_projection(*w.w_hr, packed);
    l.packed_r = packed;
  }
  float* bias = p.zeros(bias_floats(l.hidden));
  l.bias = bias;
  if (w.b_ih) pack_bias(as_contiguous_floats(*w.b_ih), as_contiguous_floats(*w.b_hh), call.mode, bias, p.kernels.lanes);
}

void use_packed(const PackedDirection& w, Prepared& p) {
  RecurrentLayer& l = p.layer;
  l.packed_x = floats(w.x), l.packed_h = floats(w.h), l.bias = floats(w.bias);
  if (l.projected) l.packed_r = floats(*w.r);
}

// The number of the i-th step that a stretch's forward takes.
int64_t forward_time(const RecurrentLayer& l, const Stretch& s, int64_t i) {
  return l.reversed ? s.end - 1 - i : s.begin + i;
}

void forward_by_units(Prepared& p, const Stretch& s) {
  const RecurrentTable& k = p.kernels;
  RecurrentLayer& l = p.layer;
  const int64_t steps = s.end - s.begin;
  const UnitBlocks blocks(l.padded_hidden, k.lanes, 4);
  auto run = [&](int64_t step, int64_t i) {
    for (int64_t b = 0; b < s.count; b += kMaxRows)
      k.forward_step(l, forward_time(l, s, step), b, std::min(kMaxRows, s.count - b), blocks.begin(i), blocks.end(i),
                     thread_scratch(k.forward_scratch(l)));
  };
  l.rows_of_step = l.unit && s.count > kFewQuantized ? p.step_rows() : nullptr;
  if (!l.rows_of_step) return run_with_step_barrier(steps, blocks.count, run);
  run_with_step_barrier(2 * steps, blocks.count, [&](int64_t half, int64_t i) {
    if (half % 2) return run(half / 2, i);
    const int64_t end = (i + 1) * s.count / blocks.count;
    for (int64_t b = i * s.count / blocks.count; b < end; b += kMaxRows)
      int8_kernels().quantize_step(l, forward_time(l, s, half / 2), b, std::min(kMaxRows, end - b));
  });
}

void forward_by_sequences(Prepared& p, const Stretch& s) {
  const RecurrentTable& k = p.kernels;
  RecurrentLayer& l = p.layer;
  l.rows_of_step = nullptr;
  const Tiles tiles(s.count);
  for_each_item(tiles.count, [&](int64_t i) {
    float* scratch = thread_scratch(k.forward_scratch(l));
    for (int64_t step = 0; step < s.end - s.begin; ++step) {
      const int64_t t = forward_time(l, s, step);
      k.forward_step(l, t, tiles.begin(i), tiles.size(i), 0, l.padded_hidden, scratch);
      if (l.projected) k.project_step(l, t, tiles.begin(i), tiles.size(i), scratch);
    }
  });
}

void run_forward(const RecurrentCall& call, int64_t d, Prepared& p, const Tensor& h_n, const Tensor& c_n) {
  const RecurrentTable& k = p.kernels;
  const int64_t threads = torch::stable::get_num_threads();
  PairLayer& l = p.layer;
  const int64_t parity = l.batch * l.padded_width;
  l.h = p.zeros(2 * parity);
  if (call.mode == kLSTM) l.c = p.zeros(l.batch * l.padded_hidden);
  if (l.projected) l.m = p.zeros(l.batch * l.padded_hidden);
  if (call.h0) {
    const float* from = floats(*call.h0) + d * l.batch * l.width;
    for (int64_t q = 0; q < l.batch; ++q)
      std::copy_n(from + call.caller(q) * l.width, l.width, l.h + q * l.padded_width);
    for (int64_t q = 0; p.low && q < l.batch; ++q)
      p.low->narrow_row(l.h + q * l.padded_width, l.width, reinterpret_cast<uint16_t*>(l.h_pairs + q * l.h_words));
  }
  if (call.c0) {
    const float* from = floats(*call.c0) + d * l.batch * l.hidden;
    for (int64_t q = 0; q < l.batch; ++q)
      std::copy_n(from + call.caller(q) * l.hidden, l.hidden, l.c + q * l.padded_hidden);
  }
  const bool fused = call.fused_inputs();
  const std::vector<int64_t> bounds = cut_steps(call, fused ? call.rows + 1 : kStepFloats / (4 * l.padded_hidden));
  const int64_t chunks = static_cast<int64_t>(bounds.size()) - 1;
  float* projected = fused ? nullptr : p.memory(h_n, 4 * l.padded_hidden * most_rows(call, bounds));
  std::vector<const float*> rows;
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t position_of = l.reversed ? chunks - 1 - c : c, t0 = bounds[position_of], t1 = bounds[position_of + 1];
    if (!fused) {
      rows.clear();
      for (int64_t t = t0; t < t1; ++t)
        for (int64_t q = 0; q < call.active(t); ++q) rows.push_back(l.x + position(l, t, q, l.x_step, l.x_sequence));
      const int64_t count = static_cast<int64_t>(rows.size()), parts = shares(count, kProductRows, 32 * kProductRows);
      // Rows that are too few for all threads: these share the units as well.
      const UnitBlocks blocks(l.padded_hidden, parts < threads ? k.lanes : l.padded_hidden, 4);
      l.projected_x = projected, l.projected_rows = count, l.projected_first = call.starts[t0];
      for_each_item(parts * blocks.count, [&](int64_t i) {
        const int64_t part = i / blocks.count, block = i % blocks.count;
        const int64_t first = part * count / parts, some = (part + 1) * count / parts - first;
        k.project_inputs(l, rows.data(), count, first, some, blocks.begin(block), blocks.end(block), projected,
                         thread_scratch(k.project_scratch(l, some)));
      });
    }
    std::vector<Stretch> stretches = cut_by_activity(call, t0, t1);
    if (l.reversed) std::reverse(stretches.begin(), stretches.end());
    for (const Stretch& s : stretches) {
      if (by_units(l, s.count))
        forward_by_units(p, s);
      else
        forward_by_sequences(p, s);
    }
  }
  for (int64_t q = 0; q < l.batch; ++q) {
    const int64_t length = call.length(q), row = d * l.batch + call.caller(q);
    std::copy_n(l.h + length % 2 * parity + q * l.padded_width, l.width, mutable_floats(h_n) + row * l.width);
    if (call.mode == kLSTM) std::copy_n(l.c + q * l.padded_hidden, l.hidden, mutable_floats(c_n) + row * l.hidden);
    if (call.packed) continue;
    for (int64_t t = length; t < call.steps; ++t) {
      const int64_t at = position(l, t, q, l.out_step, l.out_sequence);
      if (p.low)
        std::fill_n(l.out_low + at, l.width, uint16_t{0});
      else
        std::fill_n(l.out + at, l.width, 0.f);
    }
  }
}

struct LayerResults {
  Tensor out, h_n, c_n;  // float32, or the first one bfloat16
};

// The results, written but for those of no sequences. `saved` may have no elements; with `packed`, a direction each, no
// weight of the call is read.
LayerResults run_layer(RecurrentCall& call, const Tensor& x, const Tensor& saved, const PackedRecurrent* packed) {
  const int64_t directions = static_cast<int64_t>(call.directions.size());
  const ScalarType wide = ScalarType::Float;
  const Ints cells = call.mode == kLSTM ? Ints{directions, call.batch, call.hidden} : Ints{0};
  const BFloat16Table* low = low_kernels(call);
  const LayerResults results{new_output(x, call.sequence(directions * call.width), low ? ScalarType::BFloat16 : wide),
                             torch::stable::new_empty(x, Ints{directions, call.batch, call.width}, wide),
                             torch::stable::new_empty(x, cells, wide)};
  call.weights_packed = packed != nullptr;
  number_sequences(call);
  if (call.batch == 0) return results;
  const Tensor from = low ? as_word_rows(x, *low) : as_float_rows(x);
  for (int64_t d = 0; d < directions; ++d) {
    Prepared p(low, packed ? packed->unit() : nullptr);
    describe_layer(call, d, from, results.out, saved, p);
    if (low) {
      float* pairs = p.zeros(2 * call.batch * row_words(call.width, *low));
      use_words(call, results.out, d, *low, reinterpret_cast<uint32_t*>(pairs), p.layer);
    }
    if (packed)
      use_packed(packed->packed(d), p);
    else
      pack_weights(call, d, p);
    run_forward(call, d, p, results.h_n, results.c_n);
  }
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrent_layer(Tensor x, Maybe h0, Maybe c0, Tensor w_ih, Tensor w_hh,
                                                           Maybe b_ih, Maybe b_hh, Maybe w_hr, Maybe w_ih_r,
                                                           Maybe w_hh_r, Maybe b_ih_r, Maybe b_hh_r, Maybe w_hr_r,
                                                           Maybe reset, Maybe lengths, int64_t mode, bool batch_first,
                                                           bool keep, bool keep_out, int64_t rows) {
  RecurrentCall call =
      describe_recurrent(x, h0, c0, directions_of(w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_r, w_hh_r, b_ih_r, b_hh_r, w_hr_r),
                         reset, lengths, mode, batch_first);
  const int64_t directions = static_cast<int64_t>(call.directions.size());
  STD_TORCH_CHECK(rows == -1 ? !keep || !call.packed : rows == call.rows, "recurrent_layer: expected ", call.rows,
                  " rows, the steps of all sequences together, got ", rows);
  const Tensor saved = new_output(x, keep ? call.saved(directions, keep_out, rows != -1) : Ints{0}, ScalarType::Float);
  const LayerResults found = run_layer(call, x, saved, nullptr);
  return {as_dtype(found.out, call.dtype), as_dtype(found.h_n, call.dtype), as_dtype(found.c_n, call.dtype), saved};
}

// ---- Backward

struct DirectionGrads {
  Tensor w_ih, w_hh;
  Maybe b_ih, b_hh, w_hr;
};

// Rows of a chunk: what was read for each.
struct ChunkRows {
  std::vector<const float*> x, h, m;
  std::vector<float*> grad_x;
};

// Sums of outer products [n][panel] for every panel of the gates, and their columns' own sums.
struct Products {
  const RecurrentTable& k;
  int64_t panel, begin, end, count;  // columns [begin, end) of the gates, `count` rows
  AlignedFloats sums;
  Products(const RecurrentTable& k, int64_t begin, int64_t end, int64_t columns, int64_t count)
      : k(k), panel(k.panel), begin(begin), end(end), count(count), sums(ceil_div(columns, panel) * panel * count) {}

  // Items are a part of the rows and a share of the panels each.
  int64_t parts() const { return ceil_div(count, k.outer_rows); }
  int64_t panels() const { return ceil_div(end, panel); }
  int64_t groups() const {
    const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
    return std::clamp<int64_t>(ceil_div(wanted, parts()), 1, panels());
  }
  int64_t items() const { return groups() * parts(); }
  void add(int64_t item, const float* const* rows, const float* gates, int64_t gate_rows) {
    const int64_t group = item % groups(), n = item / groups() * k.outer_rows;
    const int64_t first = std::max(begin, group * panels() / groups() * panel);
    const int64_t last = std::min(end, (group + 1) * panels() / groups() * panel);
    if (first < last)
      k.add_outer(rows, n, std::min(count, n + k.outer_rows), gates, gate_rows, first, last, count, sums.data());
  }
  // Columns that begin at `column`, of `units`, as rows of `to`.
  void put(int64_t column, int64_t units, float* to) const {
    for (int64_t u = 0; u < units;) {
      const int64_t inside = (column + u) % panel, some = std::min(units - u, panel - inside);
      k.transpose(sums.data() + (column + u) / panel * count * panel + inside, panel, count, some, to + u * count,
                  count);
      u += some;
    }
  }
};

void put_weight_grad(const RecurrentCall& call, const Products& products, bool of_inputs, const Tensor& to) {
  const int32_t* order = gate_order(call.mode, of_inputs);
  const int64_t blocks = call.padded_hidden() / kUnitGroup;
  for_each_item(call.gates * blocks, [&](int64_t i) {
    const int64_t gate = i / blocks, u = i % blocks * kUnitGroup;
    products.put(products.begin + gate * call.padded_hidden() + u, std::min(kUnitGroup, call.hidden - u),
                 mutable_floats(to) + (order[gate] * call.hidden + u) * products.count);
  });
}

struct BackwardCall {
  Maybe grad_out, grad_h_n, grad_c_n;  // float32, the first with contiguous outputs, the others contiguous
  Tensor rows;                         // the input, float32
  Maybe grad_x, grad_h0, grad_c0;      // float32
  bool need_weights;
};

// The backward of one direction, chunk of steps by chunk of steps.
class DirectionBackward {
 public:
  DirectionBackward(const RecurrentCall& call, const BackwardCall& want, int64_t d, Prepared& p)
      : call_(call),
        want_(want),
        d_(d),
        p_(p),
        k_(p.kernels),
        l_(p.layer),
        gate_columns_(4 * l_.padded_hidden),
        bias_(ceil_div(gate_columns_, panel()) * panel()) {
    set_gradients();
    pack();
    bounds_ = cut_steps(call, kStepFloats / gate_columns_);
    const int64_t most = most_rows(call, bounds_);
    const int64_t of_gates = ceil_div(gate_columns_, panel()) * panel() * most;
    b_.gates = p.memory(want.rows, of_gates);
    if (p.low) b_.gates_low = reinterpret_cast<uint16_t*>(p.memory(want.rows, of_gates / 2));
    if (l_.projected) {
      b_.dy = p.memory(want.rows, ceil_div(l_.padded_width, panel()) * panel() * most);
      b_.my = p.memory(want.rows, l_.padded_hidden * most);
    }
    if (!want.need_weights) return;
    of_x_.emplace(k_, 0, input_end(), gate_columns_, l_.inputs);
    of_h_.emplace(k_, state_begin(), gate_columns_, gate_columns_, l_.width);
    if (l_.projected) of_m_.emplace(k_, 0, l_.padded_width, l_.padded_width, l_.hidden);
  }

  void run(const DirectionGrads& grads) {
    const int64_t chunks = static_cast<int64_t>(bounds_.size()) - 1;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t at = l_.reversed ? c : chunks - 1 - c, t0 = bounds_[at], t1 = bounds_[at + 1];
      gather_rows(t0, t1);
      run_steps(t0, t1, c == chunks - 1);
      add_chunk();
    }
    put_state(want_.grad_h0, b_.dh, l_.width, l_.padded_width);
    put_state(want_.grad_c0, b_.dc, l_.hidden, l_.padded_hidden);
    if (want_.need_weights) put_weights(grads);
  }

 private:
  int64_t panel() const { return k_.panel; }
  // Columns of the gates that belong to the inputs end there, and those of the state begin there.
  int64_t input_end() const { return call_.gates * l_.padded_hidden; }
  int64_t state_begin() const { return gate_columns_ - call_.gates * l_.padded_hidden; }

  // The gradients that the direction begins with.
  void set_gradients() {
    if (want_.grad_out) {
      const Strides of_grad(call_, *want_.grad_out);
      b_.grad_out = floats(*want_.grad_out) + d_ * call_.width * want_.grad_out->stride(want_.grad_out->dim() - 1);
      b_.grad_step = of_grad.step, b_.grad_sequence = of_grad.sequence;
    }
    if (call_.h0) b_.h0 = floats(*call_.h0) + d_ * l_.batch * l_.width;
    if (call_.c0) b_.c0 = floats(*call_.c0) + d_ * l_.batch * l_.hidden;
    b_.dh = state(want_.grad_h_n, l_.width, l_.padded_width);
    if (call_.mode == kLSTM) b_.dc = state(want_.grad_c_n, l_.hidden, l_.padded_hidden);
  }

  // [B][row] as the kernels number sequences, from the caller's [directions, B, size].
  float* state(const Maybe& from, int64_t size, int64_t row) {
    float* to = p_.zeros(l_.batch * row);
    if (from)
      for (int64_t q = 0; q < l_.batch; ++q)
        std::copy_n(floats(*from) + (d_ * l_.batch + call_.caller(q)) * size, size, to + q * row);
    return to;
  }

  void put_state(const Maybe& to, const float* from, int64_t size, int64_t row) const {
    if (to)
      for (int64_t q = 0; q < l_.batch; ++q)
        std::copy_n(from + q * row, size, mutable_floats(*to) + (d_ * l_.batch + call_.caller(q)) * size);
  }

  void pack() {
    const DirectionWeights& w = call_.directions[d_];
    if (l_.steps > 1 || wants_first_state()) b_.columns_h = pack_columns(w.w_hh, call_.gates, l_.hidden, false);
    if (l_.projected) b_.columns_r = pack_columns(*w.w_hr, 1, l_.width, false);
    if (want_.grad_x) columns_x_ = pack_columns(w.w_ih, call_.gates, l_.hidden, true);
  }

  // Whether the gradient of the state before the first step is a result.
  bool wants_first_state() const { return want_.grad_h0.has_value(); }

  const float* pack_columns(const Tensor& weight, int64_t blocks, int64_t block, bool of_inputs) {
    const RecurrentTable& k = k_;
    const Tensor rows = p_.low ? torch::stable::contiguous(weight) : as_float_rows(weight);
    const int64_t n = rows.size(1), panels = ceil_div(n, k.panel);
    float* packed = p_.memory(weight, panels * k.panel * blocks * padded_units(block));
    for_each_item(panels, [&](int64_t i) {
      k.pack_columns(floats(rows), rows.stride(0), blocks, block, gate_order(call_.mode, of_inputs), n, packed, i,
                     i + 1);
    });
    return packed;
  }

  // What was read for every row of steps [t0, t1), and where its gradient goes.
  void gather_rows(int64_t t0, int64_t t1) {
    const int64_t count = call_.starts[t1] - call_.starts[t0], previous = l_.reversed ? 1 : -1;
    rows_.x.clear(), rows_.h.clear(), rows_.m.clear(), rows_.grad_x.clear();
    for (int64_t t = t0; t < t1; ++t)
      for (int64_t q = 0; q < call_.active(t); ++q) {
        rows_.x.push_back(l_.x + position(l_, t, q, l_.x_step, l_.x_sequence));
        const bool first = t == (l_.reversed ? call_.length(q) - 1 : 0);
        const bool fresh = l_.reset && l_.reset[position(l_, t, q, l_.reset_step, l_.reset_sequence)];
        rows_.h.push_back(fresh || (first && !b_.h0) ? l_.zeros
                          : first                    ? b_.h0 + call_.caller(q) * l_.width
                          : l_.keep_out ? l_.saved + position(l_, t + previous, q, l_.saved_step, l_.saved_sequence) +
                                              (l_.kept - 1) * l_.padded_hidden
                                        : l_.out + position(l_, t + previous, q, l_.out_step, l_.out_sequence));
        if (columns_x_) {
          const Strides of_grad(call_, *want_.grad_x);
          rows_.grad_x.push_back(mutable_floats(*want_.grad_x) + position(l_, t, q, of_grad.step, of_grad.sequence));
        }
      }
    if (l_.projected)
      for (int64_t i = 0; i < count; ++i) rows_.m.push_back(b_.my + i * l_.padded_hidden);
    b_.rows = count, b_.first_row = call_.starts[t0];
  }

  void run_steps(int64_t t0, int64_t t1, bool last_chunk) const {
    std::vector<Stretch> stretches = cut_by_activity(call_, t0, t1);
    if (!l_.reversed) std::reverse(stretches.begin(), stretches.end());
    for (size_t at = 0; at < stretches.size(); ++at) {
      const bool last = last_chunk && at + 1 == stretches.size() && !wants_first_state();
      if (by_units(l_, stretches[at].count))
        run_by_units(stretches[at], last);
      else
        run_by_sequences(stretches[at], last);
    }
  }

  // The number of the i-th step from where a stretch's backward begins.
  int64_t time(const Stretch& s, int64_t i) const { return l_.reversed ? s.begin + i : s.end - 1 - i; }

  void run_by_units(const Stretch& s, bool last) const {
    const RecurrentTable& k = k_;
    const int64_t steps = s.end - s.begin;
    const UnitBlocks blocks(l_.padded_hidden, k.panel, 4);
    run_with_step_barrier(steps + (last ? 0 : 1), blocks.count, [&](int64_t i, int64_t block) {
      const int64_t begin = blocks.begin(block), end = blocks.end(block);
      for (int64_t q = 0; q < s.count; q += kMaxRows) {
        const int64_t n = std::min(kMaxRows, s.count - q);
        if (i > 0) k.backward_state(l_, b_, time(s, i - 1), q, n, begin, end);
        if (i < steps) k.backward_gates(l_, b_, time(s, i), q, n, begin, end, nullptr);
      }
    });
  }

  void run_by_sequences(const Stretch& s, bool last) const {
    const RecurrentTable& k = k_;
    const int64_t steps = s.end - s.begin, scratch_size = k.backward_scratch(l_);
    const Tiles tiles(s.count);
    for_each_item(tiles.count, [&](int64_t item) {
      float* scratch = thread_scratch(scratch_size);
      const int64_t b0 = tiles.begin(item), n = tiles.size(item);
      for (int64_t i = 0; i < steps; ++i) {
        k.backward_gates(l_, b_, time(s, i), b0, n, 0, l_.padded_hidden, scratch);
        if (!last || i + 1 < steps) k.backward_state(l_, b_, time(s, i), b0, n, 0, l_.padded_width);
      }
    });
  }

  // Everything that all steps of the chunk contribute to, in one list of items.
  void add_chunk() {
    const RecurrentTable& k = k_;
    const float* gates = p_.low ? reinterpret_cast<const float*>(b_.gates_low) : b_.gates;  // as they meet weights
    const int64_t count = b_.rows, x_end = input_end();
    const int64_t x_items = of_x_ ? of_x_->items() : 0, h_items = of_h_ ? of_h_->items() : 0;
    const int64_t m_items = of_m_ ? of_m_->items() : 0;
    const int64_t bias_items = want_.need_weights ? ceil_div(gate_columns_, k.panel) : 0;
    const int64_t row_items =
        columns_x_ ? shares(count, kProductRows, std::max<int64_t>(2 * kProductRows, kRowsFloats / x_end)) : 0;
    for_each_item(x_items + h_items + m_items + bias_items + row_items, [&](int64_t i) {
      if (i < x_items) return of_x_->add(i, rows_.x.data(), b_.gates, count);
      if ((i -= x_items) < h_items) return of_h_->add(i, rows_.h.data(), b_.gates, count);
      if ((i -= h_items) < m_items) return of_m_->add(i, rows_.m.data(), b_.dy, count);
      if ((i -= m_items) < bias_items)
        return k.add_rows(b_.gates + i * k.panel * count, count, bias_.data() + i * k.panel);
      i -= bias_items;
      const int64_t first = i * count / row_items;
      k.multiply_rows(gates, count, first, (i + 1) * count / row_items - first, 0, x_end, columns_x_, l_.inputs, d_ > 0,
                      rows_.grad_x.data() + first);
    });
  }

  void put_weights(const DirectionGrads& grads) const {
    put_weight_grad(call_, *of_x_, true, grads.w_ih);
    put_weight_grad(call_, *of_h_, false, grads.w_hh);
    if (of_m_) of_m_->put(0, l_.width, mutable_floats(*grads.w_hr));
    if (!grads.b_ih) return;
    for (int64_t g = 0; g < call_.gates; ++g)
      for (int64_t u = 0; u < l_.hidden; ++u) {
        mutable_floats(*grads.b_ih)[gate_order(call_.mode, true)[g] * l_.hidden + u] = bias_[g * l_.padded_hidden + u];
        mutable_floats(*grads.b_hh)[g * l_.hidden + u] = bias_[state_begin() + g * l_.padded_hidden + u];
      }
  }

  const RecurrentCall& call_;
  const BackwardCall& want_;
  const int64_t d_;
  Prepared& p_;
  const RecurrentTable& k_;
  const RecurrentLayer& l_;
  const int64_t gate_columns_;
  AlignedFloats bias_;
  PairBackward b_{};
  const float* columns_x_ = nullptr;
  std::vector<int64_t> bounds_;
  std::optional<Products> of_x_, of_h_, of_m_;  // sums for w_ih, w_hh and w_hr
  ChunkRows rows_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
recurrent_layer_backward(Maybe grad_out, Maybe grad_h_n, Maybe grad_c_n, Tensor x, Maybe h0, Maybe c0, Tensor w_ih,
                         Tensor w_hh, Maybe b_ih, Maybe b_hh, Maybe w_hr, Maybe w_ih_r, Maybe w_hh_r, Maybe b_ih_r,
                         Maybe b_hh_r, Maybe w_hr_r, Maybe reset, Maybe lengths, Maybe out, Tensor saved, int64_t mode,
                         bool batch_first, bool need_x, bool need_state, bool need_weights) {
  const char* op = "recurrent_layer_backward";
  RecurrentCall call =
      describe_recurrent(x, h0, c0, directions_of(w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_r, w_hh_r, b_ih_r, b_hh_r, w_hr_r),
                         reset, lengths, mode, batch_first);
  const int64_t directions = static_cast<int64_t>(call.directions.size());
  const ScalarType wide = ScalarType::Float;
  check_argument(op, "out", out, call.sequence(directions * call.width), std::nullopt, Memory::kContiguous);
  check_argument(op, "grad_out", grad_out, call.sequence(directions * call.width), std::nullopt);
  check_argument(op, "grad_h_n", grad_h_n, {directions, call.batch, call.width}, std::nullopt);
  STD_TORCH_CHECK(mode == kLSTM || !grad_c_n, "recurrent_layer_backward: a GRU has no c_n");
  check_argument(op, "grad_c_n", grad_c_n, {directions, call.batch, call.hidden}, std::nullopt);
  const bool by_rows = call.packed || saved.dim() == 4;
  check_argument(op, "saved", saved, call.saved(directions, !out, by_rows), wide, Memory::kContiguous);
  number_sequences(call);

  const Maybe wide_out = out ? Maybe(as_floats(*out)) : Maybe();
  BackwardCall want{};
  want.rows = as_float_rows(x);
  want.need_weights = need_weights;
  if (grad_out) want.grad_out = as_float_rows(*grad_out);
  if (grad_h_n) want.grad_h_n = as_contiguous_floats(*grad_h_n);
  if (grad_c_n) want.grad_c_n = as_contiguous_floats(*grad_c_n);
  if (need_x) {
    // The first two dimensions lie in memory as those of the input do: then the layer below, which reads this as the
    // gradient of its result, finds it as that was laid out.
    if (!call.packed && x.stride(0) < x.stride(1)) {
      Tensor made = new_output(x, Ints{x.size(1), x.size(0), call.inputs}, wide);
      want.grad_x = torch::stable::transpose(made, 0, 1);
    } else {
      want.grad_x = new_output(x, call.sequence(call.inputs), wide);
    }
    if ((lengths && !call.packed) || call.batch * call.steps == 0) torch::stable::zero_(*want.grad_x);
  }
  auto like = [&](const Tensor& t) {
    Ints size;
    for (int64_t i = 0; i < t.dim(); ++i) size.push_back(t.size(i));
    Tensor made = torch::stable::new_empty(t, size, wide);
    if (call.batch * call.steps == 0) torch::stable::zero_(made);
    return made;
  };
  auto like_maybe = [&](const Maybe& t) { return t ? Maybe(like(*t)) : Maybe(); };
  if (need_state) want.grad_h0 = like_maybe(h0), want.grad_c0 = like_maybe(c0);
  std::vector<DirectionGrads> grads(directions);
  for (int64_t d = 0; d < directions; ++d) {
    const DirectionWeights& w = call.directions[d];
    if (need_weights)
      grads[d] = {like(w.w_ih), like(w.w_hh), like_maybe(w.b_ih), like_maybe(w.b_hh), like_maybe(w.w_hr)};
    if (call.batch * call.steps == 0) continue;
    Prepared p(low_kernels(call));
    describe_layer(call, d, want.rows, wide_out, saved, p);
    DirectionBackward(call, want, d, p).run(grads[d]);
  }
  auto result = [&](const Maybe& t) { return t ? as_dtype(*t, call.dtype) : torch::stable::new_empty(x, Ints{0}); };
  auto weights = [&](int64_t d) {
    if (!need_weights || d >= directions)
      return std::make_tuple(result({}), result({}), result({}), result({}), result({}));
    return std::make_tuple(result(grads[d].w_ih), result(grads[d].w_hh), result(grads[d].b_ih), result(grads[d].b_hh),
                           result(grads[d].w_hr));
  };
  return std::tuple_cat(std::make_tuple(result(want.grad_x), result(want.grad_h0), result(want.grad_c0)), weights(0),
                        weights(1));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> PackedRecurrent::run(const Tensor& x, const Maybe& h0, const Maybe& c0,
                                                        const Maybe& reset, const Maybe& lengths,
                                                        bool batch_first) const {
  RecurrentCall call = describe_recurrent(x, h0, c0, directions_, reset, lengths, mode_, batch_first);
  const LayerResults found = run_layer(call, x, no_elements(x), this);
  return {as_dtype(found.out, call.dtype), as_dtype(found.h_n, call.dtype), as_dtype(found.c_n, call.dtype)};
}

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CPU, m) {
  m.impl("recurrent_layer", CNNLSTM_FAST_OP(recurrent_layer));
  m.impl("recurrent_layer_backward", CNNLSTM_FAST_OP(recurrent_layer_backward));
}

}  // namespace cnnlstm_fast
