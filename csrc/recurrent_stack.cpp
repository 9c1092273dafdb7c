#include "recurrent_stack.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <thread>

#include "cpu/dispatch.h"
#include "limits.h"
#include "memory.h"
#include "recurrent_pairs.h"
#include "recurrent_steps.h"
#include "tensors.h"
#include "threads.h"

namespace cnnlstm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

namespace {

// Rows, steps times sequences, that a layer hands to the next one at a time.
const int64_t kRowsTogether = limit("STACK_ROWS", 12, 1);
// Sequences, for each thread, up to which threads share layers: a layer's weights are then read for all of them at
// once.
const int64_t kStackSequences = limit("STACK_SEQUENCES", 3, 1);
// Multiply-adds of a layer's steps that are worth waking another thread, and of a product.
const int64_t kStackWork = limit("STACK_WORK", int64_t{1} << 20, 0);
const int64_t kProductWork = limit("STACK_PRODUCT_WORK", int64_t{1} << 19, 0);
// Chunks of products between a layer's projection and its steps.
constexpr int64_t kRing = 2;

// One layer of a call.
struct Running {
  RecurrentCall call;
  const BFloat16Table* low;  // null: products are of float32
  const RecurrentTable* kernels;
  PairLayer layer{};  // without projected_x
  Tensor x, out;
  std::optional<Tensor> words;  // out as words, if it is narrower
  std::deque<AlignedFloats> state;
  bool fused;  // inputs are multiplied with the state, step by step
  std::optional<Tensor> products;
};

// The state before step `t` of a sequence as words.
void narrow_state(const Running& r, int64_t t, int64_t b) {
  const PairLayer& l = r.layer;
  const int64_t row = t % 2 * l.batch + b;
  r.low->narrow_row(l.h + row * l.padded_width, l.width, reinterpret_cast<uint16_t*>(l.h_pairs + row * l.h_words));
}

void copy_rows(const Maybe& from, int64_t batch, int64_t size, float* to, int64_t step) {
  for (int64_t b = 0; from && b < batch; ++b) std::copy_n(floats(*from) + b * size, size, to + b * step);
}

// The result of a layer as the next one reads it: rows of words, whose ends are zeros.
Tensor new_word_rows(const Tensor& x, const RecurrentCall& call, const BFloat16Table& low, Running& r) {
  const int64_t padded = 2 * row_words(call.width, low);
  if (padded == call.width) return new_temporary(x, call.sequence(call.width), ScalarType::BFloat16);
  r.words = torch::stable::new_zeros(x, call.sequence(padded), ScalarType::BFloat16);
  return torch::stable::narrow(*r.words, 2, 0, call.width);
}

// `before` is the layer that gives x, if there is one.
void prepare(const StackLayer& given, const Tensor& x, const Running* before, bool last, Running& r) {
  const PackedDirection& w = given.layer->packed(0);
  RecurrentCall& call = r.call;
  call.weights_packed = true;
  number_sequences(call);
  r.low = low_kernels(call);
  r.x = !r.low ? as_float_rows(x) : before && before->words ? *before->words : as_word_rows(x, *r.low);
  const Ints size = call.sequence(call.width);
  const ScalarType dtype = r.low ? ScalarType::BFloat16 : ScalarType::Float;
  r.out = last ? new_output(x, size, dtype) : r.low ? new_word_rows(x, call, *r.low, r) : new_temporary(x, size, dtype);
  PairLayer& l = r.layer;
  l.mode = static_cast<int32_t>(call.mode);
  l.steps = call.steps, l.batch = call.batch, l.inputs = call.inputs, l.hidden = call.hidden, l.width = call.width;
  l.padded_hidden = call.padded_hidden(), l.padded_width = call.padded_width();
  const Strides of_x(call, r.x), of_out(call, r.out);
  l.x = static_cast<const float*>(r.x.data_ptr()), l.x_step = of_x.step, l.x_sequence = of_x.sequence;
  l.out = static_cast<float*>(r.out.data_ptr()), l.out_step = of_out.step, l.out_sequence = of_out.sequence;
  l.starts = call.starts.data();
  l.packed_x = floats(w.x), l.packed_h = floats(w.h), l.bias = floats(w.bias);
  l.unit = given.layer->unit();
  r.kernels = r.low ? &r.low->recurrent : &kernels_of(l);
  l.zeros = r.state.emplace_back(std::max({l.padded_hidden, l.padded_width, l.inputs})).data();
  l.h = r.state.emplace_back(2 * l.batch * l.padded_width).data();
  copy_rows(call.h0, l.batch, l.width, l.h, l.padded_width);
  if (r.low) {
    float* pairs = r.state.emplace_back(2 * l.batch * row_words(call.width, *r.low)).data();
    use_words(call, r.out, 0, *r.low, reinterpret_cast<uint32_t*>(pairs), l);
    for (int64_t b = 0; b < l.batch; ++b) narrow_state(r, 0, b);
  }
  if (call.mode == kLSTM) {
    l.c = r.state.emplace_back(l.batch * l.padded_hidden).data();
    copy_rows(call.c0, l.batch, l.hidden, l.c, l.padded_hidden);
  }
  r.fused = call.fused_inputs();
}

// A layer that reads products: those of `rows` rows, of which `first` come before, `skipped` floats behind the begin.
PairLayer reading(const Running& r, int64_t rows, int64_t first, int64_t skipped = 0) {
  PairLayer l = r.layer;
  if (r.products)
    l.projected_x = mutable_floats(*r.products) + skipped, l.projected_rows = rows, l.projected_first = first;
  return l;
}

std::vector<const float*> input_rows(const RecurrentLayer& l, int64_t t0, int64_t t1) {
  std::vector<const float*> rows;
  for (int64_t t = t0; t < t1; ++t)
    for (int64_t b = 0; b < l.batch; ++b) rows.push_back(l.x + position(l, t, b, l.x_step, l.x_sequence));
  return rows;
}

// The products of the inputs of steps [t0, t1), shared by all threads.
void project(Running& r, int64_t t0, int64_t t1) {
  const RecurrentLayer& l = r.layer;
  const RecurrentTable& k = *r.kernels;
  const int64_t threads = torch::stable::get_num_threads(), count = (t1 - t0) * l.batch;
  if (!r.products)
    r.products.emplace(new_temporary(r.x, {4 * l.padded_hidden * count}, ScalarType::Float));  // the first is longest
  const std::vector<const float*> rows = input_rows(l, t0, t1);
  const int64_t parts = shares(count, kProductRows, 32 * kProductRows);
  const bool alone = threads == 1 || count * l.inputs * r.call.gates * l.padded_hidden < kProductWork;
  const UnitBlocks blocks(l.padded_hidden, parts < threads && !alone ? k.lanes : l.padded_hidden, 4);
  auto run = [&](int64_t i) {
    const int64_t part = i / blocks.count, block = i % blocks.count;
    const int64_t first = part * count / parts, some = (part + 1) * count / parts - first;
    k.project_inputs(l, rows.data(), count, first, some, blocks.begin(block), blocks.end(block),
                     mutable_floats(*r.products), thread_scratch(k.project_scratch(l, some)));
  };
  if (!alone) return for_each_item(parts * blocks.count, run);
  const FlushDenormals flush;
  for (int64_t i = 0; i < parts * blocks.count; ++i) run(i);
}

void scale_state(const Running& r, const Tensor& keep, int64_t t, int64_t b0, int64_t n) {
  const RecurrentLayer& l = r.layer;
  for (int64_t b = b0; b < b0 + n; ++b) {
    const float by = floats(keep)[t * l.batch + b];
    if (by == 1.f) continue;
    float* h = l.h + t % 2 * l.batch * l.padded_width + b * l.padded_width;
    for (int64_t u = 0; u < l.width; ++u) h[u] *= by;
    for (int64_t u = 0; l.c && u < l.hidden; ++u) l.c[b * l.padded_hidden + u] *= by;
    if (r.low) narrow_state(r, t, b);
  }
}

// Steps [t0, t1) of sequences [b0, b0 + n), n <= kMaxRows, of the layer as it reads its products.
void run_steps(const Running& r, const PairLayer& l, const Maybe& keep, int64_t t0, int64_t t1, int64_t b0, int64_t n) {
  float* scratch = thread_scratch(r.kernels->forward_scratch(l));
  for (int64_t t = t0; t < t1; ++t) {
    if (keep) scale_state(r, *keep, t, b0, n);
    r.kernels->forward_step(l, t, b0, n, 0, l.padded_hidden, scratch);
  }
}

// Units [begin, end) of a step of all sequences.
void run_units(const RecurrentTable& k, const PairLayer& l, int64_t t, int64_t begin, int64_t end) {
  for (int64_t b = 0; b < l.batch; b += kMaxRows)
    k.forward_step(l, t, b, std::min(kMaxRows, l.batch - b), begin, end, thread_scratch(k.forward_scratch(l)));
}

// One layer after the other, whose sequences or units threads share; its state is scaled.
void run_scaled(std::vector<Running>& layers, const Maybe& keep) {
  for (Running& r : layers) {
    const int64_t most = r.fused ? r.call.rows + 1 : kStepFloats / (4 * r.layer.padded_hidden);
    const std::vector<int64_t> bounds = cut_steps(r.call, most);
    for (size_t c = 0; c + 1 < bounds.size(); ++c) {
      const int64_t t0 = bounds[c], t1 = bounds[c + 1], batch = r.layer.batch;
      if (!r.fused) r.products.reset(), project(r, t0, t1);
      const PairLayer l = reading(r, (t1 - t0) * batch, t0 * batch);
      if (by_units(l, batch)) {
        const UnitBlocks blocks(l.padded_hidden, r.kernels->lanes, 4);
        run_with_step_barrier(2 * (t1 - t0), blocks.count, [&](int64_t half, int64_t i) {
          const int64_t t = t0 + half / 2;
          if (half % 2)
            run_units(*r.kernels, l, t, blocks.begin(i), blocks.end(i));
          else if (i == 0)
            scale_state(r, *keep, t, 0, batch);
        });
        continue;
      }
      const Tiles tiles(batch);
      for_each_item(tiles.count, [&](int64_t i) { run_steps(r, l, keep, t0, t1, tiles.begin(i), tiles.size(i)); });
    }
    r.products.reset();
  }
}

// Chunks of steps go from stage to stage: a layer's steps, the next one's products, its steps, and so on. A stage works
// on one chunk at a time. A thread that looks for work takes the earliest chunk that can go on, so that it makes no
// difference how many threads ever run.
class Pipeline {
 public:
  Pipeline(std::vector<Running>& layers, const Maybe& keep) : keep_(keep) {
    const RecurrentLayer& first = layers[0].layer;
    steps_ = first.steps;
    together_ = std::clamp<int64_t>(kRowsTogether / first.batch, 1, std::max<int64_t>(1, steps_ / 4));
    chunks_ = ceil_div(steps_, together_);
    for (Running& r : layers) {
      if (!stages_.empty() && !r.fused) {
        r.products.emplace(new_temporary(r.x, {kRing * floats_of_chunk(r)}, ScalarType::Float));
        stages_.push_back({&r, true});
      }
      stages_.push_back({&r, false});
    }
    count_ = static_cast<int64_t>(stages_.size());
    begun_ = std::vector<std::atomic<int64_t>>(count_);
    done_ = std::vector<std::atomic<int64_t>>(count_);
    for (int64_t s = 0; s < count_; ++s) begun_[s] = 0, done_[s] = 0;
  }

  void run() {
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count_);
    if (threads == 1) {
      const FlushDenormals flush;
      return work();
    }
    in_parallel(0, threads, 1, [&](int64_t, int64_t) { error_.free_of([&] { work(); }); });
    error_.rethrow();
  }

 private:
  struct Stage {
    Running* layer;
    bool projects;
  };

  // The chunk that stage `s` may begin, or -1.
  int64_t ready(int64_t s) const {
    const int64_t chunk = done_[s].load(std::memory_order_acquire);
    if (chunk == chunks_ || begun_[s].load(std::memory_order_relaxed) != chunk) return -1;
    if (s > 0 && done_[s - 1].load(std::memory_order_acquire) <= chunk) return -1;
    if (stages_[s].projects && done_[s + 1].load(std::memory_order_acquire) <= chunk - kRing) return -1;
    return chunk;
  }

  void work() {
    for (int64_t spins = 0; begun_[count_ - 1].load(std::memory_order_relaxed) < chunks_ && !error_.failed();) {
      int64_t best = -1, chunk = chunks_;
      for (int64_t s = count_ - 1; s >= 0; --s) {
        const int64_t found = ready(s);
        if (found >= 0 && found < chunk) best = s, chunk = found;
      }
      if (best < 0) {
        if (++spins > 4096) std::this_thread::yield();
        continue;
      }
      int64_t unclaimed = chunk;
      if (!begun_[best].compare_exchange_strong(unclaimed, chunk + 1)) continue;
      run_stage(stages_[best], chunk);
      done_[best].store(chunk + 1, std::memory_order_release);
      spins = 0;
    }
  }

  int64_t floats_of_chunk(const Running& r) const { return 4 * r.layer.padded_hidden * together_ * r.layer.batch; }

  void run_stage(const Stage& stage, int64_t chunk) const {
    const Running& r = *stage.layer;
    const int64_t t0 = chunk * together_, t1 = std::min(steps_, t0 + together_), batch = r.layer.batch;
    const int64_t rows = (t1 - t0) * batch, place = chunk % kRing * floats_of_chunk(r);
    if (!stage.projects) {
      const bool whole = stage.layer == stages_[0].layer;  // whose products are there from the begin
      return run_steps(r, whole ? reading(r, r.call.rows, 0) : reading(r, rows, t0 * batch, place), keep_, t0, t1, 0,
                       batch);
    }
    const RecurrentTable& k = *r.kernels;
    k.project_inputs(r.layer, input_rows(r.layer, t0, t1).data(), rows, 0, rows, 0, r.layer.padded_hidden,
                     mutable_floats(*r.products) + place, thread_scratch(k.project_scratch(r.layer, rows)));
  }

  const Maybe& keep_;
  int64_t steps_, together_, chunks_, count_;
  std::vector<Stage> stages_;
  std::vector<std::atomic<int64_t>> begun_, done_;
  FirstError error_;
};

// Whether cores have more to do if they work on several layers at a time than if they share each one.
bool overlaps(const std::vector<StackLayer>& layers, int64_t steps, int64_t batch) {
  const int64_t threads = torch::stable::get_num_threads();
  if (layers.size() == 1 || threads == 1 || batch > std::min(kStackSequences * threads, kMaxRows)) return false;
  const int64_t rows = steps * batch;
  if (rows * 4 * padded_units(layers[0].layer->hidden()) > kStepFloats) return false;
  return std::all_of(layers.begin(), layers.end(), [&](const StackLayer& one) {
    RecurrentLayer l{};
    l.width = one.layer->hidden(), l.padded_hidden = padded_units(l.width);
    return rows * 4 * l.padded_hidden * l.width >= kStackWork && !by_units(l, batch);
  });
}

}  // namespace

StackResults run_stack(const std::vector<StackLayer>& layers, const Tensor& x, const Maybe& keep, bool batch_first) {
  for (const StackLayer& one : layers)
    STD_TORCH_CHECK(one.layer->has_one_direction(), "a stack of layers: expected one direction each, not projected");
  const ScalarType dtype = layers[0].layer->dtype();
  STD_TORCH_CHECK(x.dim() == 3 && x.scalar_type() == dtype,
                  "a stack of layers: expected a 3-d input of the weights' dtype");
  const int64_t steps = x.size(batch_first ? 1 : 0), batch = x.size(batch_first ? 0 : 1);
  check_argument("a stack of layers", "keep", keep, {steps, batch}, ScalarType::Float, Memory::kContiguous);
  // Without a unit for bfloat16, what is between layers is float32, which one after the other would have rounded.
  const bool wide = dtype == ScalarType::BFloat16 && !low_kernels(dtype, false);
  const bool overlap = !wide && overlaps(layers, steps, batch);
  StackResults found{x, {}, {}};
  if (!overlap && !keep) {
    for (const StackLayer& one : layers) {
      auto [out, h_n, c_n] = one.layer->run(found.out, one.h0, one.c0, {}, {}, batch_first);
      found.out = out, found.h_n.push_back(h_n), found.c_n.push_back(c_n);
    }
    return found;
  }
  std::vector<Running> running(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    const Tensor like =
        found.out.scalar_type() == dtype ? found.out : torch::stable::new_empty(x, sizes(found.out), dtype);
    running[i].call = layers[i].layer->describe(like, layers[i].h0, layers[i].c0, batch_first);
    prepare(layers[i], found.out, i ? &running[i - 1] : nullptr, i + 1 == layers.size(), running[i]);
    found.out = running[i].out;
  }
  if (overlap) {
    if (!running[0].fused) project(running[0], 0, steps);
    Pipeline(running, keep).run();
  } else if (steps * batch > 0) {
    run_scaled(running, keep);
  }
  for (const Running& r : running) {
    const RecurrentLayer& l = r.layer;
    const bool lstm = l.mode == kLSTM;
    const Tensor h_n = torch::stable::new_empty(x, Ints{1, batch, l.width}, ScalarType::Float);
    const Tensor c_n = torch::stable::new_empty(x, lstm ? Ints{1, batch, l.hidden} : Ints{0}, ScalarType::Float);
    const float* h = l.h + steps % 2 * batch * l.padded_width;
    for (int64_t b = 0; b < batch; ++b) {
      std::copy_n(h + b * l.padded_width, l.width, mutable_floats(h_n) + b * l.width);
      if (lstm) std::copy_n(l.c + b * l.padded_hidden, l.hidden, mutable_floats(c_n) + b * l.hidden);
    }
    found.h_n.push_back(as_dtype(h_n, dtype)), found.c_n.push_back(as_dtype(c_n, dtype));
  }
  found.out = as_dtype(found.out, dtype);
  return found;
}

}  // namespace cnnlstm_fast
