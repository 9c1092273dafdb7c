// cnnlstm_fast::recurrent_layer and its backward on the CPU: checks, allocation, threads. The schema and the
// meaning of every argument stand in cnnlstm_fast/ops/recurrent.py, the arithmetic in cpu/recurrent.inc.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <limits>
#include <numeric>
#include <optional>
#include <thread>
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

// Measured limits. More inputs than these, or these if sequences are few, are projected for many steps at
// once instead of with the state. The bits are the same.
const int64_t kMostFusedInputs = limit("FUSED_INPUTS", 1024, 0), kFewSequences = 4,
              kMostFusedInputsOfFew = limit("FUSED_INPUTS_OF_FEW", 128, 0);
// So many weights of the state are shared by cores if sequences are not too many for a core.
const int64_t kSharedWeights = limit("SHARED_WEIGHTS", int64_t{1} << 18, 1), kMostSharingSequences = 32;
// Pre-activations, or their gradients, of the steps that are worked on at a time: what a second-level cache
// or two hold.
const int64_t kChunkFloats = limit("RECURRENT_CHUNK_FLOATS", int64_t{1} << 20, 1);
// Gradients of pre-activations that meet all weights of the inputs at a time.
const int64_t kRowsFloats = limit("RECURRENT_ROWS_FLOATS", int64_t{1} << 16, 1);
// Rows of a product that are worth an item.
const int64_t kRowsOfItem = limit("RECURRENT_ROWS", 24, 1);

int64_t padded(int64_t units) {
  return ceil_div(units, kUnitGroup) * kUnitGroup;
}

// ---- Tensors as the kernels read them

Tensor as_floats(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
}

// float32 whose last dimension is contiguous.
Tensor as_rows(const Tensor& t) {
  const Tensor floats = as_floats(t);
  const int64_t last = floats.dim() - 1;
  return floats.stride(last) == 1 || floats.size(last) <= 1 ? floats : torch::stable::contiguous(floats);
}

Tensor as_contiguous(const Tensor& t) {
  return torch::stable::contiguous(as_floats(t));
}

const float* floats(const Tensor& t) {
  return static_cast<const float*>(t.data_ptr());
}

float* mutable_floats(const Tensor& t) {
  return static_cast<float*>(t.data_ptr());
}

Tensor in_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// ---- Description of a call

struct DirectionWeights {
  Tensor w_ih, w_hh;
  Maybe b_ih, b_hh, w_hr;
};

struct Call {
  int64_t mode, steps, batch, inputs, hidden, width, gates;
  int64_t rows;  // steps of all sequences together
  bool batch_first, packed;
  ScalarType dtype;
  std::vector<DirectionWeights> directions;
  Maybe reset, lengths, h0, c0;
  // As the kernels number sequences, see recurrent.h; the last two are empty where all are of one length.
  std::vector<int64_t> starts, order, sorted;

  int64_t kept_of_gates() const { return mode == kLSTM ? 5 : 4; }
  int64_t padded_hidden() const { return padded(hidden); }
  int64_t padded_width() const { return padded(width); }
  Ints sequence(int64_t features) const {
    if (packed) return {rows, features};
    return batch_first ? Ints{batch, steps, features} : Ints{steps, batch, features};
  }
  int64_t step_dim() const { return batch_first ? 1 : 0; }
  int64_t longest() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t caller(int64_t q) const { return order.empty() ? q : order[q]; }
  int64_t length(int64_t q) const { return sorted.empty() ? steps : sorted[q]; }
  int64_t active(int64_t t) const { return starts[t + 1] - starts[t]; }
  bool fused_inputs() const {
    return inputs <= (rows < kFewSequences * longest() ? kMostFusedInputsOfFew : kMostFusedInputs);
  }
};

// A tensor's strides from step to step and from sequence to sequence.
struct Strides {
  int64_t step, sequence;
  Strides(const Call& call, const Tensor& t)
      : step(call.packed ? kPacked : t.stride(call.step_dim())),
        sequence(t.stride(call.packed ? 0 : 1 - call.step_dim())) {}
};

void check_tensor(const Maybe& t, const Ints& size, const char* name) {
  if (!t) return;
  bool fits = t->dim() == static_cast<int64_t>(size.size());
  for (size_t i = 0; fits && i < size.size(); ++i) fits = t->size(i) == size[i];
  STD_TORCH_CHECK(fits && t->is_cpu(), "recurrent_layer: ", name,
                  " does not fit the other arguments in shape or device");
}

Call describe(const Tensor& x, const Maybe& h0, const Maybe& c0, std::vector<DirectionWeights> directions,
              const Maybe& reset, const Maybe& lengths, int64_t mode, bool batch_first) {
  STD_TORCH_CHECK(mode == kLSTM || mode == kGRU, "recurrent_layer: unknown mode ", mode);
  const bool packed = x.dim() == 2 && lengths.has_value();
  STD_TORCH_CHECK(packed || x.dim() == 3, "recurrent_layer: expected a 3-d input, or a 2-d one with lengths, got ",
                  x.dim(), "-d");
  STD_TORCH_CHECK(!packed || (lengths->dim() == 1 && !batch_first && !reset),
                  "recurrent_layer: packed sequences take 1-d lengths, no reset and no batch_first");
  Call call{};
  call.packed = packed;
  call.mode = mode;
  call.dtype = x.scalar_type();
  STD_TORCH_CHECK(call.dtype == ScalarType::Float || call.dtype == ScalarType::BFloat16,
                  "recurrent_layer: the kernels compute float32 and bfloat16 only");
  call.batch_first = batch_first;
  call.steps = x.size(batch_first ? 1 : 0);
  call.batch = packed ? lengths->size(0) : x.size(batch_first ? 0 : 1), call.inputs = x.size(packed ? 1 : 2);
  call.gates = mode == kLSTM ? 4 : 3;
  const Tensor& w_hh = directions[0].w_hh;
  STD_TORCH_CHECK(w_hh.dim() == 2 && w_hh.size(0) % call.gates == 0, "recurrent_layer: w_hh has no whole gates");
  call.hidden = w_hh.size(0) / call.gates, call.width = w_hh.size(1);
  STD_TORCH_CHECK(call.hidden >= 1 && call.width >= 1 && call.inputs >= 1, "recurrent_layer: sizes must be positive");
  const bool projected = directions[0].w_hr.has_value();
  STD_TORCH_CHECK(projected ? mode == kLSTM && call.width <= call.hidden : call.width == call.hidden,
                  "recurrent_layer: w_hh must be square per gate unless an LSTM is projected, to no more units");
  const int64_t rows = call.gates * call.hidden;
  for (const DirectionWeights& d : directions) {
    check_tensor(d.w_ih, {rows, call.inputs}, "w_ih");
    check_tensor(d.w_hh, {rows, call.width}, "w_hh");
    check_tensor(d.b_ih, {rows}, "b_ih");
    check_tensor(d.b_hh, {rows}, "b_hh");
    check_tensor(d.w_hr, {call.width, call.hidden}, "w_hr");
    STD_TORCH_CHECK(d.w_hr.has_value() == projected && d.b_ih.has_value() == d.b_hh.has_value(),
                    "recurrent_layer: both directions and both biases must be given alike");
    for (const Maybe& w : {Maybe(d.w_ih), Maybe(d.w_hh), d.b_ih, d.b_hh, d.w_hr})
      if (w) STD_TORCH_CHECK(w->scalar_type() == call.dtype, "recurrent_layer: input and weights differ in dtype");
  }
  const int64_t count = static_cast<int64_t>(directions.size());
  elements("an input", x);
  elements("weights with their rows padded", {4, call.padded_hidden(), std::max(call.inputs, call.padded_width())});
  elements("what a recurrent layer keeps",
           {count, call.steps, call.batch, 5, std::max(call.padded_hidden(), call.padded_width())});
  STD_TORCH_CHECK(call.batch <= std::numeric_limits<int32_t>::max(), "recurrent_layer: a batch of ", call.batch,
                  " sequences is too large");
  check_tensor(h0, {count, call.batch, call.width}, "h0");
  STD_TORCH_CHECK(mode == kLSTM || !c0, "recurrent_layer: a GRU has no c0");
  check_tensor(c0, {count, call.batch, call.hidden}, "c0");
  for (const Maybe& s : {h0, c0})
    if (s) STD_TORCH_CHECK(s->scalar_type() == call.dtype, "recurrent_layer: input and state differ in dtype");
  if (reset) {
    check_tensor(reset, batch_first ? Ints{call.batch, call.steps} : Ints{call.steps, call.batch}, "reset");
    STD_TORCH_CHECK(reset->scalar_type() == ScalarType::Bool, "recurrent_layer: reset must be bool");
    call.reset = *reset;
  }
  if (lengths) {
    check_tensor(lengths, {call.batch}, "lengths");
    STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Long, "recurrent_layer: lengths must be int64");
    call.lengths = torch::stable::contiguous(*lengths);
    const int64_t* values = static_cast<const int64_t*>(call.lengths->data_ptr());
    for (int64_t b = 0; b < call.batch; ++b) {
      STD_TORCH_CHECK(values[b] >= 0 && values[b] <= call.steps, "recurrent_layer: lengths must lie in 0 to ",
                      call.steps);
      STD_TORCH_CHECK(!packed || (values[b] <= call.steps - call.rows && (b == 0 || values[b] <= values[b - 1])),
                      "recurrent_layer: lengths of packed sequences must fall, and their sum be that of all steps");
      call.rows += values[b];
    }
    STD_TORCH_CHECK(!packed || call.rows == call.steps,
                    "recurrent_layer: lengths of packed sequences must fall, and their sum be that of all steps");
  } else {
    call.rows = call.steps * call.batch;
  }
  if (h0) call.h0 = as_contiguous(*h0);
  if (c0) call.c0 = as_contiguous(*c0);
  call.directions = std::move(directions);
  return call;
}

// Numbers the sequences from the longest to the shortest, once the results have found room.
void number_sequences(Call& call) {
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

std::vector<DirectionWeights> directions_of(const Tensor& w_ih, const Tensor& w_hh, const Maybe& b_ih,
                                            const Maybe& b_hh, const Maybe& w_hr, const Maybe& w_ih_r,
                                            const Maybe& w_hh_r, const Maybe& b_ih_r, const Maybe& b_hh_r,
                                            const Maybe& w_hr_r) {
  std::vector<DirectionWeights> directions{{w_ih, w_hh, b_ih, b_hh, w_hr}};
  STD_TORCH_CHECK(w_ih_r.has_value() == w_hh_r.has_value(), "recurrent_layer: the reverse direction lacks a weight");
  if (w_ih_r) directions.push_back({*w_ih_r, *w_hh_r, b_ih_r, b_hh_r, w_hr_r});
  return directions;
}

// The weights' order of gates by the kernels' columns.
const int32_t* gate_order(int64_t mode, bool of_inputs) {
  static constexpr int32_t kAsTheyAre[4] = {0, 1, 2, 3};
  static constexpr int32_t kNewFirst[3] = {2, 0, 1};
  return mode == kGRU && of_inputs ? kNewFirst : kAsTheyAre;
}

// ---- Threads

// Into how many even shares of at least `least` and about `most` to cut `count`, every thread having one.
int64_t shares(int64_t count, int64_t least, int64_t most) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = ceil_div(ceil_div(count, most), threads) * threads;
  return std::clamp<int64_t>(wanted, 1, ceil_div(count, least));
}

// Bounds of stretches of steps that have about `most` rows each.
std::vector<int64_t> cut_steps(const Call& call, int64_t most) {
  const int64_t longest = call.longest(), total = call.starts[longest];
  const int64_t wanted = ceil_div(total, std::max<int64_t>(1, most));
  const int64_t count = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, longest));
  std::vector<int64_t> bounds{0};
  for (int64_t i = 1; i <= count; ++i) {
    const int64_t rows = ceil_div(i * total, count);
    const int64_t t = std::lower_bound(call.starts.begin(), call.starts.end(), rows) - call.starts.begin();
    if (t > bounds.back()) bounds.push_back(t);
  }
  return bounds;
}

int64_t most_rows(const Call& call, const std::vector<int64_t>& bounds) {
  int64_t most = 0;
  for (size_t i = 1; i < bounds.size(); ++i) most = std::max(most, call.starts[bounds[i]] - call.starts[bounds[i - 1]]);
  return most;
}

// Steps [begin, end) in which at most `count` sequences take part.
struct Stretch {
  int64_t begin, end, count;
};

// Steps [begin, end) cut where so many sequences have ended that threads had better share the others anew.
std::vector<Stretch> cut_by_activity(const Call& call, int64_t begin, int64_t end) {
  std::vector<Stretch> stretches;
  while (begin < end) {
    Stretch s{begin, begin + 1, call.active(begin)};
    while (s.end < end && 4 * call.active(s.end) >= 3 * s.count) ++s.end;
    stretches.push_back(s);
    begin = s.end;
  }
  return stretches;
}

// Tiles of sequences, as many as threads can share evenly.
struct Tiles {
  int64_t batch, count;
  explicit Tiles(int64_t batch) : batch(batch) {
    const int64_t threads = torch::stable::get_num_threads();
    count = std::min(batch, ceil_div(ceil_div(batch, kMaxRows), threads) * threads);
  }
  int64_t begin(int64_t i) const { return i * batch / count; }
  int64_t size(int64_t i) const { return begin(i + 1) - begin(i); }
};

// ---- Forward

// A direction as the kernels see it, and the memory that it points to.
struct Prepared {
  RecurrentLayer layer{};
  std::deque<AlignedFloats> cleared;
  std::vector<Tensor> held;

  float* zeros(int64_t floats) { return cleared.emplace_back(floats).data(); }
  float* memory(const Tensor& like, int64_t floats) {
    return mutable_floats(held.emplace_back(new_temporary(like, {floats}, ScalarType::Float)));
  }
};

// `out` may be missing where what is saved has it.
void describe_layer(const Call& call, int64_t d, const Tensor& x, const Maybe& out, const Tensor& saved, Prepared& p) {
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

void pack_weights(const Call& call, int64_t d, Prepared& p) {
  const RecurrentTable& k = recurrent_kernels();
  RecurrentLayer& l = p.layer;
  const DirectionWeights& w = call.directions[d];
  const int64_t units = l.padded_hidden, blocks = units / k.lanes;
  auto pack = [&](const Tensor& weight, int64_t inputs, bool of_inputs) {
    const Tensor rows = as_rows(weight);
    float* packed = p.memory(weight, units * call.gates * inputs);
    for_each_item(blocks, [&](int64_t i) {
      k.pack_gates(floats(rows), rows.stride(0), l.hidden, inputs, call.gates, gate_order(call.mode, of_inputs), packed,
                   i * k.lanes, (i + 1) * k.lanes);
    });
    return packed;
  };
  if (call.fused_inputs()) {
    l.packed_x = pack(w.w_ih, l.inputs, true);
  } else {
    const Tensor& rows = p.held.emplace_back(as_rows(w.w_ih));
    l.w_ih = floats(rows), l.w_ih_stride = rows.stride(0), l.order_x = gate_order(call.mode, true);
  }
  l.packed_h = pack(w.w_hh, l.width, false);
  if (l.projected) {
    const Tensor turned = as_contiguous(torch::stable::transpose(*w.w_hr, 0, 1));
    float* packed = p.memory(turned, ceil_div(l.width, k.panel) * k.panel * l.padded_hidden);
    k.pack_columns(floats(turned), l.width, 1, l.hidden, gate_order(call.mode, false), l.width, packed, 0,
                   ceil_div(l.width, k.panel));
    l.packed_r = packed;
  }
  float* bias = p.zeros(4 * units);
  l.bias = bias;
  if (!w.b_ih) return;
  const Tensor b_ih = as_contiguous(*w.b_ih), b_hh = as_contiguous(*w.b_hh);
  for (int64_t u = 0; u < l.hidden; ++u) {
    float* to = bias + u / k.lanes * 4 * k.lanes + u % k.lanes;
    auto of = [&](const Tensor& b, int64_t gate) { return floats(b)[gate * l.hidden + u]; };
    if (call.mode == kLSTM) {
      for (int64_t g = 0; g < 4; ++g) to[g * k.lanes] = of(b_ih, g) + of(b_hh, g);
    } else {
      to[0] = of(b_ih, 2), to[k.lanes] = of(b_ih, 0) + of(b_hh, 0);
      to[2 * k.lanes] = of(b_ih, 1) + of(b_hh, 1), to[3 * k.lanes] = of(b_hh, 2);
    }
  }
}

// Steps of all unit blocks by a team of threads: within a step blocks are claimed, the next one begins when
// all are done. A thread waits only for blocks that a running thread has claimed, so that it makes no
// difference how many of the team ever run, or whether they do so one after another.
template <class F>
void run_with_step_barrier(int64_t steps, int64_t blocks, const F& run) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), blocks);
  std::vector<std::atomic<int64_t>> claimed(blocks);
  for (auto& c : claimed) c = 0;
  std::atomic<int64_t> done{0};
  FirstError error;
  in_parallel(0, threads, 1, [&](int64_t member, int64_t) {
    const int64_t own = member * blocks / threads;
    for (int64_t step = done.load(std::memory_order_acquire) / blocks; step < steps; ++step) {
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t block = (own + i) % blocks;
        int64_t unclaimed = step;
        if (!claimed[block].compare_exchange_strong(unclaimed, step + 1)) continue;
        if (!error.free_of([&] { run(step, block); })) return;
        done.fetch_add(1, std::memory_order_release);
      }
      for (int64_t spins = 0; done.load(std::memory_order_acquire) < (step + 1) * blocks; ++spins) {
        if (error.failed()) return;  // a block that is never done
        if (spins > 4096) std::this_thread::yield();
      }
    }
  });
  error.rethrow();
}

// Whether cores divide the units between them, each keeping its part of large weights in its cache, rather
// than the sequences.
bool by_units(const RecurrentLayer& l, int64_t sequences) {
  const int64_t threads = torch::stable::get_num_threads();
  return threads > 1 && !l.projected && 4 * l.padded_hidden * l.width >= kSharedWeights &&
         sequences <= kMostSharingSequences * threads;
}

// Blocks of units for a team, multiples of `least`.
struct UnitBlocks {
  int64_t units, size, count;
  UnitBlocks(int64_t units, int64_t least, int64_t per_thread) : units(units) {
    const int64_t wanted = per_thread * torch::stable::get_num_threads();
    size = std::max<int64_t>(1, units / least / wanted) * least;
    count = ceil_div(units, size);
  }
  int64_t begin(int64_t i) const { return i * size; }
  int64_t end(int64_t i) const { return std::min(units, (i + 1) * size); }
};

void run_forward(const Call& call, int64_t d, Prepared& p, const Tensor& h_n, const Tensor& c_n) {
  const RecurrentTable& k = recurrent_kernels();
  RecurrentLayer& l = p.layer;
  const int64_t parity = l.batch * l.padded_width;
  l.h = p.zeros(2 * parity);
  if (call.mode == kLSTM) l.c = p.zeros(l.batch * l.padded_hidden);
  if (l.projected) l.m = p.zeros(l.batch * l.padded_hidden);
  if (call.h0) {
    const float* from = floats(*call.h0) + d * l.batch * l.width;
    for (int64_t q = 0; q < l.batch; ++q)
      std::copy_n(from + call.caller(q) * l.width, l.width, l.h + q * l.padded_width);
  }
  if (call.c0) {
    const float* from = floats(*call.c0) + d * l.batch * l.hidden;
    for (int64_t q = 0; q < l.batch; ++q)
      std::copy_n(from + call.caller(q) * l.hidden, l.hidden, l.c + q * l.padded_hidden);
  }
  const bool fused = call.fused_inputs();
  const std::vector<int64_t> bounds = cut_steps(call, fused ? call.rows + 1 : kChunkFloats / (4 * l.padded_hidden));
  const int64_t chunks = static_cast<int64_t>(bounds.size()) - 1;
  float* projected = fused ? nullptr : p.memory(h_n, 4 * l.padded_hidden * most_rows(call, bounds));
  std::vector<const float*> rows;
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t position_of = l.reversed ? chunks - 1 - c : c, t0 = bounds[position_of], t1 = bounds[position_of + 1];
    if (!fused) {
      rows.clear();
      for (int64_t t = t0; t < t1; ++t)
        for (int64_t q = 0; q < call.active(t); ++q) rows.push_back(l.x + position(l, t, q, l.x_step, l.x_sequence));
      const int64_t count = static_cast<int64_t>(rows.size()), items = shares(count, kRowsOfItem, 32 * kRowsOfItem);
      l.projected_x = projected, l.projected_rows = count, l.projected_first = call.starts[t0];
      for_each_item(items, [&](int64_t i) {
        const int64_t first = i * count / items, some = (i + 1) * count / items - first;
        k.project_inputs(l, rows.data(), count, first, some, projected, thread_scratch(k.project_scratch(l, some)));
      });
    }
    std::vector<Stretch> stretches = cut_by_activity(call, t0, t1);
    if (l.reversed) std::reverse(stretches.begin(), stretches.end());
    for (const Stretch& s : stretches) {
      const int64_t steps = s.end - s.begin;
      auto time = [&](int64_t i) { return l.reversed ? s.end - 1 - i : s.begin + i; };
      if (by_units(l, s.count)) {
        const UnitBlocks blocks(l.padded_hidden, k.lanes, 4);
        run_with_step_barrier(steps, blocks.count, [&](int64_t step, int64_t i) {
          for (int64_t b = 0; b < s.count; b += kMaxRows)
            k.forward_step(l, time(step), b, std::min(kMaxRows, s.count - b), blocks.begin(i), blocks.end(i),
                           thread_scratch(k.forward_scratch(l)));
        });
      } else {
        const Tiles tiles(s.count);
        for_each_item(tiles.count, [&](int64_t i) {
          float* scratch = thread_scratch(k.forward_scratch(l));
          for (int64_t step = 0; step < steps; ++step) {
            k.forward_step(l, time(step), tiles.begin(i), tiles.size(i), 0, l.padded_hidden, scratch);
            if (l.projected) k.project_step(l, time(step), tiles.begin(i), tiles.size(i), scratch);
          }
        });
      }
    }
  }
  for (int64_t q = 0; q < l.batch; ++q) {
    const int64_t length = call.length(q), row = d * l.batch + call.caller(q);
    std::copy_n(l.h + length % 2 * parity + q * l.padded_width, l.width, mutable_floats(h_n) + row * l.width);
    if (call.mode == kLSTM) std::copy_n(l.c + q * l.padded_hidden, l.hidden, mutable_floats(c_n) + row * l.hidden);
    if (call.packed) continue;
    for (int64_t t = length; t < call.steps; ++t)
      std::fill_n(l.out + position(l, t, q, l.out_step, l.out_sequence), l.width, 0.f);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrent_layer(Tensor x, Maybe h0, Maybe c0, Tensor w_ih, Tensor w_hh,
                                                           Maybe b_ih, Maybe b_hh, Maybe w_hr, Maybe w_ih_r,
                                                           Maybe w_hh_r, Maybe b_ih_r, Maybe b_hh_r, Maybe w_hr_r,
                                                           Maybe reset, Maybe lengths, int64_t mode, bool batch_first,
                                                           bool keep, bool keep_out, int64_t rows) {
  Call call = describe(x, h0, c0, directions_of(w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_r, w_hh_r, b_ih_r, b_hh_r, w_hr_r),
                       reset, lengths, mode, batch_first);
  const int64_t directions = static_cast<int64_t>(call.directions.size());
  const ScalarType wide = ScalarType::Float;
  const Tensor out = new_output(x, call.sequence(directions * call.width), wide);
  const Tensor h_n = torch::stable::new_empty(x, Ints{directions, call.batch, call.width}, wide);
  const Tensor c_n =
      torch::stable::new_empty(x, mode == kLSTM ? Ints{directions, call.batch, call.hidden} : Ints{0}, wide);
  STD_TORCH_CHECK(rows == -1 ? !keep || !call.packed : rows == call.rows, "recurrent_layer: expected ", call.rows,
                  " rows, the steps of all sequences together, got ", rows);
  const int64_t kept = call.kept_of_gates() + keep_out, units = call.padded_hidden();
  Ints size = rows == -1 ? Ints{directions, call.steps, call.batch, kept, units} : Ints{directions, rows, kept, units};
  const Tensor saved = new_output(x, keep ? size : Ints{0}, wide);
  number_sequences(call);
  if (call.batch > 0) {
    const Tensor from = as_rows(x);
    for (int64_t d = 0; d < directions; ++d) {
      Prepared p;
      describe_layer(call, d, from, out, saved, p);
      pack_weights(call, d, p);
      run_forward(call, d, p, h_n, c_n);
    }
  }
  return {in_dtype(out, call.dtype), in_dtype(h_n, call.dtype), in_dtype(c_n, call.dtype), saved};
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
  int64_t panel, begin, end, count;  // columns [begin, end) of the gates, `count` rows
  AlignedFloats sums;
  Products(int64_t panel, int64_t begin, int64_t end, int64_t columns, int64_t count)
      : panel(panel), begin(begin), end(end), count(count), sums(ceil_div(columns, panel) * panel * count) {}

  // Items are a part of the rows and a share of the panels each.
  int64_t parts() const { return ceil_div(count, recurrent_kernels().outer_rows); }
  int64_t panels() const { return ceil_div(end, panel); }
  int64_t groups() const {
    const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
    return std::clamp<int64_t>(ceil_div(wanted, parts()), 1, panels());
  }
  int64_t items() const { return groups() * parts(); }
  void add(int64_t item, const float* const* rows, const float* gates, int64_t gate_rows) {
    const RecurrentTable& k = recurrent_kernels();
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
      recurrent_kernels().transpose(sums.data() + (column + u) / panel * count * panel + inside, panel, count, some,
                                    to + u * count, count);
      u += some;
    }
  }
};

void put_weight_grad(const Call& call, const Products& products, bool of_inputs, const Tensor& to) {
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

void run_backward(const Call& call, const BackwardCall& want, int64_t d, Prepared& p, const DirectionGrads& grads) {
  const RecurrentTable& k = recurrent_kernels();
  RecurrentLayer& l = p.layer;
  const DirectionWeights& w = call.directions[d];
  const int64_t hidden = l.padded_hidden, columns = 4 * hidden;
  const int64_t x_end = call.gates * hidden, h_begin = columns - call.gates * hidden;

  RecurrentBackward b{};
  if (want.grad_out) {
    const Strides of_grad(call, *want.grad_out);
    b.grad_out = floats(*want.grad_out) + d * call.width * want.grad_out->stride(want.grad_out->dim() - 1);
    b.grad_step = of_grad.step, b.grad_sequence = of_grad.sequence;
  }
  if (call.h0) b.h0 = floats(*call.h0) + d * l.batch * l.width;
  if (call.c0) b.c0 = floats(*call.c0) + d * l.batch * l.hidden;
  auto state = [&](const Maybe& from, int64_t size, int64_t row) {
    float* to = p.zeros(l.batch * row);
    if (from)
      for (int64_t q = 0; q < l.batch; ++q)
        std::copy_n(floats(*from) + (d * l.batch + call.caller(q)) * size, size, to + q * row);
    return to;
  };
  b.dh = state(want.grad_h_n, l.width, l.padded_width);
  if (call.mode == kLSTM) b.dc = state(want.grad_c_n, l.hidden, hidden);

  auto pack_columns = [&](const Tensor& weight, int64_t blocks, int64_t block, bool of_inputs) {
    const Tensor rows = as_rows(weight);
    const int64_t n = rows.size(1), panels = ceil_div(n, k.panel);
    float* packed = p.memory(weight, panels * k.panel * blocks * padded(block));
    for_each_item(panels, [&](int64_t i) {
      k.pack_columns(floats(rows), rows.stride(0), blocks, block, gate_order(call.mode, of_inputs), n, packed, i,
                     i + 1);
    });
    return packed;
  };
  // The state before the first step has no gradient that anyone wants.
  const bool to_the_end = want.grad_h0.has_value();
  if (l.steps > 1 || to_the_end) b.columns_h = pack_columns(w.w_hh, call.gates, l.hidden, false);
  if (l.projected) b.columns_r = pack_columns(*w.w_hr, 1, l.width, false);
  const float* columns_x = want.grad_x ? pack_columns(w.w_ih, call.gates, l.hidden, true) : nullptr;

  const std::vector<int64_t> bounds = cut_steps(call, kChunkFloats / columns);
  const int64_t chunks = static_cast<int64_t>(bounds.size()) - 1, most = most_rows(call, bounds);
  b.gates = p.memory(want.rows, ceil_div(columns, k.panel) * k.panel * most);
  if (l.projected) {
    b.dy = p.memory(want.rows, ceil_div(l.padded_width, k.panel) * k.panel * most);
    b.my = p.memory(want.rows, hidden * most);
  }
  std::optional<Products> of_x, of_h, of_m;
  AlignedFloats bias(ceil_div(columns, k.panel) * k.panel);
  if (want.need_weights) {
    of_x.emplace(k.panel, 0, x_end, columns, l.inputs);
    of_h.emplace(k.panel, h_begin, columns, columns, l.width);
    if (l.projected) of_m.emplace(k.panel, 0, l.padded_width, l.padded_width, l.hidden);
  }
  ChunkRows rows;
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t position_of = l.reversed ? c : chunks - 1 - c, t0 = bounds[position_of], t1 = bounds[position_of + 1];
    const int64_t count = call.starts[t1] - call.starts[t0], previous = l.reversed ? 1 : -1;
    rows.x.clear(), rows.h.clear(), rows.m.clear(), rows.grad_x.clear();
    for (int64_t t = t0; t < t1; ++t)
      for (int64_t q = 0; q < call.active(t); ++q) {
        rows.x.push_back(l.x + position(l, t, q, l.x_step, l.x_sequence));
        const bool first = t == (l.reversed ? call.length(q) - 1 : 0);
        const bool fresh = l.reset && l.reset[position(l, t, q, l.reset_step, l.reset_sequence)];
        rows.h.push_back(fresh || (first && !b.h0) ? l.zeros
                         : first                   ? b.h0 + call.caller(q) * l.width
                         : l.keep_out ? l.saved + position(l, t + previous, q, l.saved_step, l.saved_sequence) +
                                            (l.kept - 1) * hidden
                                      : l.out + position(l, t + previous, q, l.out_step, l.out_sequence));
        if (columns_x) {
          const Strides of_grad(call, *want.grad_x);
          rows.grad_x.push_back(mutable_floats(*want.grad_x) + position(l, t, q, of_grad.step, of_grad.sequence));
        }
      }
    if (l.projected)
      for (int64_t i = 0; i < count; ++i) rows.m.push_back(b.my + i * hidden);
    b.rows = count, b.first_row = call.starts[t0];

    std::vector<Stretch> stretches = cut_by_activity(call, t0, t1);
    if (!l.reversed) std::reverse(stretches.begin(), stretches.end());
    for (size_t at = 0; at < stretches.size(); ++at) {
      const Stretch& s = stretches[at];
      const int64_t steps = s.end - s.begin;
      auto time = [&](int64_t i) { return l.reversed ? s.begin + i : s.end - 1 - i; };
      const bool last = c == chunks - 1 && at + 1 == stretches.size() && !to_the_end;
      if (by_units(l, s.count)) {
        const UnitBlocks blocks(hidden, k.panel, 4);
        run_with_step_barrier(steps + (last ? 0 : 1), blocks.count, [&](int64_t i, int64_t block) {
          const int64_t begin = blocks.begin(block), end = blocks.end(block);
          for (int64_t q = 0; q < s.count; q += kMaxRows) {
            const int64_t n = std::min(kMaxRows, s.count - q);
            if (i > 0) k.backward_state(l, b, time(i - 1), q, n, begin, end);
            if (i < steps) k.backward_gates(l, b, time(i), q, n, begin, end, nullptr);
          }
        });
      } else {
        const Tiles tiles(s.count);
        const int64_t scratch_size = k.backward_scratch(l);
        for_each_item(tiles.count, [&](int64_t item) {
          float* scratch = thread_scratch(scratch_size);
          const int64_t b0 = tiles.begin(item), n = tiles.size(item);
          for (int64_t i = 0; i < steps; ++i) {
            k.backward_gates(l, b, time(i), b0, n, 0, hidden, scratch);
            if (!last || i + 1 < steps) k.backward_state(l, b, time(i), b0, n, 0, l.padded_width);
          }
        });
      }
    }
    // Everything that all steps of the chunk contribute to, in one list of items.
    const int64_t x_items = of_x ? of_x->items() : 0, h_items = of_h ? of_h->items() : 0;
    const int64_t m_items = of_m ? of_m->items() : 0, bias_items = want.need_weights ? ceil_div(columns, k.panel) : 0;
    const int64_t row_items =
        columns_x ? shares(count, kRowsOfItem, std::max<int64_t>(2 * kRowsOfItem, kRowsFloats / x_end)) : 0;
    for_each_item(x_items + h_items + m_items + bias_items + row_items, [&](int64_t i) {
      if (i < x_items) return of_x->add(i, rows.x.data(), b.gates, count);
      if ((i -= x_items) < h_items) return of_h->add(i, rows.h.data(), b.gates, count);
      if ((i -= h_items) < m_items) return of_m->add(i, rows.m.data(), b.dy, count);
      if ((i -= m_items) < bias_items)
        return k.add_rows(b.gates + i * k.panel * count, count, bias.data() + i * k.panel);
      i -= bias_items;
      const int64_t first = i * count / row_items;
      k.multiply_rows(b.gates, count, first, (i + 1) * count / row_items - first, 0, x_end, columns_x, l.inputs, d > 0,
                      rows.grad_x.data() + first);
    });
  }

  auto put_state = [&](const Maybe& to, const float* from, int64_t size, int64_t row) {
    if (to)
      for (int64_t q = 0; q < l.batch; ++q)
        std::copy_n(from + q * row, size, mutable_floats(*to) + (d * l.batch + call.caller(q)) * size);
  };
  put_state(want.grad_h0, b.dh, l.width, l.padded_width);
  put_state(want.grad_c0, b.dc, l.hidden, hidden);
  if (!want.need_weights) return;
  put_weight_grad(call, *of_x, true, grads.w_ih);
  put_weight_grad(call, *of_h, false, grads.w_hh);
  if (of_m) of_m->put(0, l.width, mutable_floats(*grads.w_hr));
  if (grads.b_ih)
    for (int64_t g = 0; g < call.gates; ++g)
      for (int64_t u = 0; u < l.hidden; ++u) {
        mutable_floats(*grads.b_ih)[gate_order(call.mode, true)[g] * l.hidden + u] = bias[g * hidden + u];
        mutable_floats(*grads.b_hh)[g * l.hidden + u] = bias[h_begin + g * hidden + u];
      }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
recurrent_layer_backward(Maybe grad_out, Maybe grad_h_n, Maybe grad_c_n, Tensor x, Maybe h0, Maybe c0, Tensor w_ih,
                         Tensor w_hh, Maybe b_ih, Maybe b_hh, Maybe w_hr, Maybe w_ih_r, Maybe w_hh_r, Maybe b_ih_r,
                         Maybe b_hh_r, Maybe w_hr_r, Maybe reset, Maybe lengths, Maybe out, Tensor saved, int64_t mode,
                         bool batch_first, bool need_x, bool need_state, bool need_weights) {
  Call call = describe(x, h0, c0, directions_of(w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_r, w_hh_r, b_ih_r, b_hh_r, w_hr_r),
                       reset, lengths, mode, batch_first);
  const int64_t directions = static_cast<int64_t>(call.directions.size());
  const ScalarType wide = ScalarType::Float;
  check_tensor(out, call.sequence(directions * call.width), "out");
  check_tensor(grad_out, call.sequence(directions * call.width), "grad_out");
  check_tensor(grad_h_n, {directions, call.batch, call.width}, "grad_h_n");
  STD_TORCH_CHECK(mode == kLSTM || !grad_c_n, "recurrent_layer_backward: a GRU has no c_n");
  check_tensor(grad_c_n, {directions, call.batch, call.hidden}, "grad_c_n");
  const int64_t kept = call.kept_of_gates() + !out, units = call.padded_hidden();
  if (saved.dim() == 4)
    check_tensor(saved, {directions, call.rows, kept, units}, "saved");
  else
    check_tensor(saved, {directions, call.steps, call.batch, kept, units}, "saved");
  STD_TORCH_CHECK(!call.packed || saved.dim() == 4, "recurrent_layer: saved does not fit packed sequences");
  STD_TORCH_CHECK(saved.scalar_type() == wide && saved.is_contiguous() && (!out || out->is_contiguous()),
                  "recurrent_layer_backward: expected the forward's own out and saved");
  number_sequences(call);

  const Maybe wide_out = out ? Maybe(as_floats(*out)) : Maybe();
  BackwardCall want{};
  want.rows = as_rows(x);
  want.need_weights = need_weights;
  if (grad_out) want.grad_out = as_rows(*grad_out);
  if (grad_h_n) want.grad_h_n = as_contiguous(*grad_h_n);
  if (grad_c_n) want.grad_c_n = as_contiguous(*grad_c_n);
  if (need_x) {
    // Its memory has first what the input's has: whoever computed that wants it so.
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
    Prepared p;
    describe_layer(call, d, want.rows, wide_out, saved, p);
    run_backward(call, want, d, p, grads[d]);
  }
  auto result = [&](const Maybe& t) { return t ? in_dtype(*t, call.dtype) : torch::stable::new_empty(x, Ints{0}); };
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

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CPU, m) {
  m.impl("recurrent_layer", CNNLSTM_FAST_OP(recurrent_layer));
  m.impl("recurrent_layer_backward", CNNLSTM_FAST_OP(recurrent_layer_backward));
}

}  // namespace cnnlstm_fast
