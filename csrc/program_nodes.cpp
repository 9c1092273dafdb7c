// Nodes of a frozen program that are ours: arithmetic of sizes, views, blocks, recurrent and linear layers.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "block_description.h"
#include "conv_plan.h"
#include "frozen_conv.h"
#include "memory.h"
#include "packed_library.h"
#include "packed_recurrent.h"
#include "program.h"
#include "recurrent_stack.h"

namespace cnnlstm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor view_strided(const Tensor& t, const Ints& size, const Ints& stride, int64_t offset) {
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(size.size()), size.data(),
                                                        stride.data(), offset, &made));
  return Tensor(made);
}

namespace {

Ints strides_of(const Tensor& t) {
  Ints found(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) found[i] = t.stride(i);
  return found;
}

// ---- Arithmetic of sizes

int64_t floor_div(int64_t a, int64_t b) {
  STD_TORCH_CHECK(b != 0, "program: a size is divided by 0");
  const int64_t quotient = a / b;
  return quotient * b != a && (a < 0) != (b < 0) ? quotient - 1 : quotient;
}

// In the order of ARITHMETIC in cnnlstm_fast/ops/program.py.
enum Operation { kAdd, kSub, kMul, kFloorDiv, kMod, kMax, kMin, kSize, kOperations };

class Arithmetic : public Node {
 public:
  explicit Arithmetic(Code& code) : operation_(code.next_between(0, kOperations - 1)) {
    if (operation_ == kSize) {
      tensor_ = code.next_read();
      a_ = {false, code.next()};
    } else {
      a_ = code.next_number(), b_ = code.next_number();
    }
    to_ = code.next_int_written();
  }

  void run(Frame& frame) const override { frame.ints[to_] = value(frame); }

 private:
  int64_t value(const Frame& frame) const {
    if (operation_ == kSize) {
      const Tensor& t = frame.tensor(tensor_);
      const int64_t dim = a_.value < 0 ? a_.value + t.dim() : a_.value;
      STD_TORCH_CHECK(0 <= dim && dim < t.dim(), "program: a tensor of ", t.dim(), " dimensions has no ", a_.value);
      return t.size(dim);
    }
    const int64_t a = a_.of(frame), b = b_.of(frame);
    switch (operation_) {
      case kAdd:
        return a + b;
      case kSub:
        return a - b;
      case kMul:
        return a * b;
      case kFloorDiv:
        return floor_div(a, b);
      case kMod:
        return a - floor_div(a, b) * b;
      case kMax:
        return std::max(a, b);
      default:
        return std::min(a, b);
    }
  }

  const int64_t operation_;
  int64_t tensor_ = -1, to_ = -1;
  Number a_{}, b_{};
};

// ---- Views

// In the order of VIEWS in cnnlstm_fast/ops/program.py.
enum ViewKind { kReshape, kPermute, kSelect, kSlice, kSqueeze, kUnsqueeze, kExpand, kContiguous, kViews };

int64_t dimension(int64_t dim, int64_t count) {
  const int64_t found = dim < 0 ? dim + count : dim;
  STD_TORCH_CHECK(0 <= found && found < count, "program: there is no dimension ", dim, " among ", count);
  return found;
}

// The strides of a view of `size` over memory of other sizes and strides, or nothing where there is none: dimensions
// that lie in one stretch are split and merged, others stay apart.
std::optional<Ints> strides_of_view(const Tensor& t, const Ints& size) {
  Ints stride(size.size());
  int64_t to = static_cast<int64_t>(size.size()) - 1, chunk_size = 1;
  int64_t base = t.dim() ? t.stride(t.dim() - 1) : 1;
  for (int64_t from = t.dim() - 1; from >= 0; --from) {
    chunk_size *= t.size(from);
    const bool ends = from == 0 || (t.size(from - 1) != 1 && t.stride(from - 1) != chunk_size * base);
    if (!ends) continue;
    int64_t filled = 1;
    while (to >= 0 && (filled < chunk_size || size[to] == 1)) {
      stride[to] = filled * base;
      filled *= size[to--];
    }
    if (filled != chunk_size) return {};
    if (from > 0) chunk_size = 1, base = t.stride(from - 1);
  }
  for (; to >= 0; --to) {
    if (size[to] != 1) return {};
    stride[to] = 1;
  }
  return stride;
}

Tensor reshaped(const Tensor& t, Ints size) {
  int64_t known = 1, open = -1;
  for (size_t i = 0; i < size.size(); ++i) {
    if (size[i] == -1) {
      STD_TORCH_CHECK(open < 0, "program: two sizes of a view are open");
      open = static_cast<int64_t>(i);
    } else {
      STD_TORCH_CHECK(size[i] >= 0, "program: a view has a size below 0");
      known *= size[i];
    }
  }
  if (open >= 0) {
    STD_TORCH_CHECK(known > 0 && t.numel() % known == 0, "program: ", t.numel(), " elements do not fit a view");
    size[open] = t.numel() / known, known *= size[open];
  }
  STD_TORCH_CHECK(known == t.numel(), "program: a view of ", known, " elements of a tensor of ", t.numel());
  if (known == 0) return torch::stable::view(torch::stable::contiguous(t), size);
  if (const std::optional<Ints> stride = strides_of_view(t, size)) return view_strided(t, size, *stride, 0);
  return torch::stable::view(torch::stable::contiguous(t), size);
}

class View : public Node {
 public:
  explicit View(Code& code)
      : kind_(code.next_between(0, kViews - 1)),
        from_(code.next_read()),
        numbers_(code.next_numbers()),
        to_(code.next_written()) {
    constexpr int64_t kCounts[kViews] = {-1, -1, 2, 4, -1, 1, -1, 0};
    STD_TORCH_CHECK(kCounts[kind_] < 0 || kCounts[kind_] == static_cast<int64_t>(numbers_.size()),
                    "program: a view has ", numbers_.size(), " numbers, expected ", kCounts[kind_]);
  }

  void run(Frame& frame) const override {
    Ints numbers;
    for (const Number& n : numbers_) numbers.push_back(n.of(frame));
    frame.tensors[to_] = view(frame.tensor(from_), numbers);
  }

 private:
  Tensor view(const Tensor& t, const Ints& n) const {
    switch (kind_) {
      case kReshape:
        return reshaped(t, n);
      case kContiguous:
        return t.is_contiguous() ? t : torch::stable::contiguous(t);
      default:
        break;
    }
    Ints size = sizes(t), stride = strides_of(t);
    int64_t offset = 0;
    if (kind_ == kPermute) {
      permute(n, size, stride);
    } else if (kind_ == kSelect) {
      const int64_t dim = dimension(n[0], t.dim()), at = n[1] < 0 ? n[1] + size[dim] : n[1];
      STD_TORCH_CHECK(0 <= at && at < size[dim], "program: index ", n[1], " of a dimension of ", size[dim]);
      offset += at * stride[dim];
      size.erase(size.begin() + dim), stride.erase(stride.begin() + dim);
    } else if (kind_ == kSlice) {
      const int64_t dim = dimension(n[0], t.dim()), all = size[dim], step = n[3];
      STD_TORCH_CHECK(step > 0, "program: a slice has a step of ", step);
      const int64_t begin = std::clamp<int64_t>(n[1] < 0 ? n[1] + all : n[1], 0, all);
      const int64_t end = std::clamp<int64_t>(n[2] < 0 ? n[2] + all : n[2], begin, all);
      offset += begin * stride[dim];
      size[dim] = (end - begin + step - 1) / step, stride[dim] *= step;
    } else if (kind_ == kSqueeze) {
      squeeze(n, size, stride);
    } else if (kind_ == kUnsqueeze) {
      const int64_t dim = dimension(n[0], t.dim() + 1);
      stride.insert(stride.begin() + dim, dim < t.dim() ? size[dim] * stride[dim] : 1);
      size.insert(size.begin() + dim, 1);
    } else {
      expand(n, size, stride);
    }
    return view_strided(t, size, stride, offset);
  }

  static void permute(const Ints& order, Ints& size, Ints& stride) {
    const Ints old_size = size, old_stride = stride;
    const int64_t count = static_cast<int64_t>(size.size());
    STD_TORCH_CHECK(static_cast<int64_t>(order.size()) == count, "program: a permutation of ", order.size(),
                    " dimensions of ", count);
    std::vector<bool> used(count, false);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t dim = dimension(order[i], count);
      STD_TORCH_CHECK(!used[dim], "program: a permutation has dimension ", dim, " twice");
      used[dim] = true;
      size[i] = old_size[dim], stride[i] = old_stride[dim];
    }
  }

  static void squeeze(const Ints& dims, Ints& size, Ints& stride) {
    const int64_t count = static_cast<int64_t>(size.size());
    std::vector<bool> gone(count, false);
    for (const int64_t dim : dims) {
      const int64_t at = dimension(dim, count);
      gone[at] = size[at] == 1;
    }
    for (int64_t i = count - 1; i >= 0; --i)
      if (gone[i]) size.erase(size.begin() + i), stride.erase(stride.begin() + i);
  }

  static void expand(const Ints& to, Ints& size, Ints& stride) {
    STD_TORCH_CHECK(to.size() >= size.size(), "program: an expansion to fewer dimensions");
    const size_t more = to.size() - size.size();
    size.insert(size.begin(), more, 1), stride.insert(stride.begin(), more, 0);
    for (size_t i = 0; i < to.size(); ++i) {
      if (to[i] == -1 || to[i] == size[i]) continue;
      STD_TORCH_CHECK(size[i] == 1 && to[i] >= 0, "program: a dimension of ", size[i], " expanded to ", to[i]);
      size[i] = to[i], stride[i] = 0;
    }
  }

  const int64_t kind_, from_;
  const std::vector<Number> numbers_;
  const int64_t to_;
};

// ---- Blocks

// The plan of blocks of about so many positions of their map, as it was measured.
struct Measured {
  double positions;
  int64_t plan;
};

// Plans of a frozen program alone, below those of csrc/conv_plan.cpp: on weights that the program packs. BLOCK_PLANS of
// cnnlstm_fast/ops/program.py has the same numbers.
enum PackedPlan : int64_t { kPackedLibrary = -3, kPackedWinograd = -2, kPackedDirect = -1 };

class BlockNode : public Node {
 public:
  explicit BlockNode(Code& code)
      : x_(code.next_read()),
        given_weight_(code.next_constant()),
        bias_(code.next_maybe_constant()),
        added_(code.next_maybe_read()),
        signal_(code.next_bool()),
        weight_(signal_ ? with_height(given_weight_) : given_weight_),
        conv_(code.next_ints()),
        activation_(code.next()),
        act_(code.next_floats()),
        pool_(code.next_ints()),
        order_(code.next_ints()) {
    for (int64_t count = code.next_count(); count > 0; --count) {
      const double positions = code.next_float();
      plans_.push_back({positions, code.next()});
    }
    STD_TORCH_CHECK(!plans_.empty(), "program: a block has no plan");
    STD_TORCH_CHECK(added_ < 0 || !has_plan([](int64_t plan) { return plan >= 0; }),
                    "program: only packed plans add a tensor");
    to_ = code.next_written();
    if (has_plan([](int64_t plan) { return plan == kPackedDirect || plan == kPackedWinograd; })) pack(code);
    if (has_plan([](int64_t plan) { return plan == kPackedLibrary; }))
      library_ = code.packed<PackedLibraryConv>(conv_, weight_, bias_);
  }

  void run(Frame& frame) const override {
    const Tensor& given = frame.tensor(x_);
    Tensor x = signal_ ? with_height(given) : given;
    // Of an input that is to be rounded, which packed weights read as it is.
    const bool wide = x.scalar_type() == ScalarType::Float && weight_.scalar_type() == ScalarType::BFloat16;
    const Tensor like = wide ? torch::stable::new_empty(x, {1}, ScalarType::BFloat16) : x;
    BlockDescription description = describe_block(wide ? view_strided(like, sizes(x), Ints(x.dim(), 0), 0) : x, weight_,
                                                  conv_, activation_, act_, pool_, order_);
    const Block& b = description.block;
    if (wide && !(pairs_ && plan_of(b) == kPackedDirect)) {
      x = as_dtype(x, ScalarType::BFloat16);
      description = describe_block(x, weight_, conv_, activation_, act_, pool_, order_);
    }
    check_argument("a frozen block", "bias", bias_, {b.co}, weight_.scalar_type());
    std::optional<Tensor> added;
    if (added_ >= 0) {
      added = signal_ ? with_height(frame.tensor(added_)) : frame.tensor(added_);
      check_argument("a frozen block", "the tensor to add", *added, {b.n, b.co, b.oh, b.ow}, weight_.scalar_type());
    }
    frame.tensors[to_] = as_given(result_of(description, x, added));
  }

 private:
  static Tensor with_height(const Tensor& x) {  // [N, C, L] as [N, C, 1, L]
    STD_TORCH_CHECK(x.dim() == 3, "a frozen block of signals: expected 3 dimensions, got ", x.dim());
    return view_strided(x, {x.size(0), x.size(1), 1, x.size(2)},
                        {x.stride(0), x.stride(1), x.size(2) * x.stride(2), x.stride(2)}, 0);
  }

  int64_t plan_of(const Block& b) const {
    const double positions = static_cast<double>(b.n * b.oh * b.ow);
    const Measured* nearest = &plans_[0];
    auto distance = [&](const Measured& m) { return std::abs(std::log(m.positions / positions)); };
    for (const Measured& m : plans_)
      if (distance(m) < distance(*nearest)) nearest = &m;
    return nearest->plan;
  }

  // (N, C, H, W) in the memory order `order_`, dimensions in that order.
  Tensor result_of(const BlockDescription& description, const Tensor& x, const std::optional<Tensor>& added) const {
    const Block& b = description.block;
    const int64_t plan = plan_of(b);
    if (plan == kPackedLibrary && b.n > 0) return library_->run(description, order_, x, added);
    if (plan == kPackedDirect && pairs_ && b.n > 0) return pairs_->run(description, order_, x, added);
    const Tensor out = new_output(x, result_shape(description), x.scalar_type());
    if (b.n == 0) return out;
    if (plan < 0)
      run_packed(plan, x, added, out);
    else
      run_plan(plan, description, x, out);
    return out;
  }

  void run_plan(int64_t plan, const BlockDescription& description, const Tensor& x, const Tensor& out) const {
    const Outputs outputs{out.data_ptr(), nullptr, nullptr};
    const Convolution convolution{conv_, weight_, bias_};
    if (!conv_plan(plan, description.block, weight_).block_forward(description, x, convolution, outputs))
      chunked_plan().block_forward(description, x, convolution, outputs);
  }

  // By weights that lie in the order in which the kernels read them.
  void pack(Code& code) {
    if (weight_.scalar_type() == ScalarType::BFloat16) {
      STD_TORCH_CHECK(!has_plan([](int64_t plan) { return plan == kPackedWinograd; }) && conv_.size() > 6,
                      "program: weights in bfloat16 are not transformed");
      pairs_ = code.packed<PackedPairs>(conv_, weight_, bias_);
      return;
    }
    STD_TORCH_CHECK(weight_.scalar_type() == ScalarType::Float && weight_.dim() == 4 && conv_.size() > 6,
                    "program: only float32 and bfloat16 weights of 4 dimensions are packed");
    FrozenConvDescription description{weight_.size(1) * conv_[6], weight_.size(0), weight_.size(2), weight_.size(3)};
    description.conv = conv_, description.pool = pool_, description.out_order = order_;
    description.activation = activation_, description.act = act_;
    description.adds = added_ >= 0;
    description.winograd = has_plan([](int64_t plan) { return plan == kPackedWinograd; });
    constexpr int64_t kFewPlanes = 8;  // images come in planes, other maps with their channels side by side
    if (description.channels < kFewPlanes) description.in_order = {0, 1, 2, 3};
    packed_ = code.packed(description, weight_, bias_);
  }

  template <class F>
  bool has_plan(const F& wanted) const {
    return std::any_of(plans_.begin(), plans_.end(), [&](const Measured& m) { return wanted(m.plan); });
  }

  void run_packed(int64_t plan, const Tensor& x, const std::optional<Tensor>& added, const Tensor& out) const {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "a frozen block: its packed weights take float32 only");
    FrozenConvCall call{x.size(0), x.size(2), x.size(3), floats(x), mutable_floats(out)};
    call.x_strides = MapStrides{{x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
    call.method = plan == kPackedWinograd ? FrozenMethod::kWinograd : FrozenMethod::kDirect;
    if (added) {
      call.added = floats(*added);
      call.added_strides = MapStrides{{added->stride(0), added->stride(1), added->stride(2), added->stride(3)}};
    }
    const int64_t bytes = packed_->scratch_bytes(call);
    packed_->run(call, thread_scratch(bytes / static_cast<int64_t>(sizeof(float))), bytes);
  }

  // (N, C, H, W) or (N, C, L), whose memory is in `order_`.
  Tensor as_given(const Tensor& raw) const {
    Ints size(4), stride(4);
    for (int64_t i = 0; i < 4; ++i) size[order_[i]] = raw.size(i), stride[order_[i]] = raw.stride(i);
    if (signal_) size.erase(size.begin() + 2), stride.erase(stride.begin() + 2);
    return view_strided(raw, size, stride, 0);
  }

  const int64_t x_;
  const Tensor given_weight_;
  const std::optional<Tensor> bias_;
  const int64_t added_;
  const bool signal_;
  const Tensor weight_;
  const Ints conv_;
  const int64_t activation_;
  const Floats act_;
  const Ints pool_, order_;
  std::vector<Measured> plans_;
  std::shared_ptr<const FrozenConv> packed_;
  std::shared_ptr<const PackedLibraryConv> library_;
  std::shared_ptr<const PackedPairs> pairs_;
  int64_t to_ = -1;
};

// ---- Recurrent layers

// Layers one behind the other, mostly one.
class RecurrentNode : public Node {
 public:
  explicit RecurrentNode(Code& code)
      : x_(code.next_read()),
        keep_(code.next_maybe_read()),
        reset_(code.next_maybe_read()),
        lengths_(code.next_maybe_read()),
        mode_(code.next_between(0, 1)),
        batch_first_(code.next_bool()) {
    for (int64_t count = code.next_count(); count > 0; --count) layers_.push_back(read_layer(code));
    STD_TORCH_CHECK(!layers_.empty() && (layers_.size() == 1 || (reset_ < 0 && lengths_ < 0)) &&
                        (keep_ < 0 || (reset_ < 0 && lengths_ < 0)),
                    "program: layers one behind the other have neither resets nor lengths");
    out_ = code.next_maybe_written();
    for (Layer& l : layers_) l.h_n = code.next_maybe_written(), l.c_n = code.next_maybe_written();
  }

  void run(Frame& frame) const override {
    const Tensor& x = frame.tensor(x_);
    if (keep_ < 0 && layers_.size() == 1) {
      Tensor at = x;
      for (const Layer& l : layers_) {
        auto [out, h_n, c_n] = l.layer->run(at, maybe(frame, l.h0), maybe(frame, l.c0), maybe(frame, reset_),
                                            maybe(frame, lengths_), batch_first_);
        put(frame, l.h_n, h_n), put(frame, l.c_n, c_n);
        at = out;
      }
      put(frame, out_, at);
      return;
    }
    std::vector<StackLayer> stack;
    for (const Layer& l : layers_) stack.push_back({l.layer, maybe(frame, l.h0), maybe(frame, l.c0)});
    const StackResults found = run_stack(stack, x, maybe(frame, keep_), batch_first_);
    put(frame, out_, found.out);
    for (size_t i = 0; i < layers_.size(); ++i)
      put(frame, layers_[i].h_n, found.h_n[i]), put(frame, layers_[i].c_n, found.c_n[i]);
  }

 private:
  struct Layer {
    int64_t h0, c0;
    std::shared_ptr<const PackedRecurrent> layer;
    int64_t h_n = -1, c_n = -1;
  };

  static std::optional<Tensor> maybe(const Frame& frame, int64_t slot) {
    return slot < 0 ? std::optional<Tensor>() : frame.tensors[slot];
  }

  static void put(Frame& frame, int64_t slot, const Tensor& t) {
    if (slot >= 0) frame.tensors[slot] = t;
  }

  // A loop over steps that was unrolled has many nodes with the same weights.
  Layer read_layer(Code& code) const {
    Layer found{code.next_maybe_read(), code.next_maybe_read(), nullptr};
    const int64_t number = code.next_between(0, int64_t{1} << 20);
    std::vector<DirectionWeights> directions;
    for (int64_t count = code.next_between(1, 2); count > 0; --count) {
      const Tensor w_ih = code.next_constant(), w_hh = code.next_constant();
      const std::optional<Tensor> b_ih = code.next_maybe_constant(), b_hh = code.next_maybe_constant();
      directions.push_back({w_ih, w_hh, b_ih, b_hh, code.next_maybe_constant()});
    }
    std::shared_ptr<const PackedRecurrent>& layer = code.layers[number];
    const bool int8 = code.next_bool();
    if (!layer) layer = std::make_shared<const PackedRecurrent>(std::move(directions), mode_, int8);
    found.layer = layer;
    return found;
  }

  const int64_t x_, keep_, reset_, lengths_, mode_;
  const bool batch_first_;
  std::vector<Layer> layers_;
  int64_t out_ = -1;
};

// ---- Sums of tensors

class Sum : public Node {
 public:
  explicit Sum(Code& code)
      : a_(code.next_read()), b_(code.next_read()), times_(code.next_float()), to_(code.next_written()) {}

  // a + times * b: PyTorch's add takes a number that the stable interface has no type for, its subtract does not.
  void run(Frame& frame) const override {
    frame.tensors[to_] = torch::stable::subtract(frame.tensor(a_), frame.tensor(b_), -times_);
  }

 private:
  const int64_t a_, b_;
  const double times_;
  const int64_t to_;
};

}  // namespace

std::unique_ptr<Node> read_arithmetic(Code& code) {
  return std::make_unique<Arithmetic>(code);
}

std::unique_ptr<Node> read_view(Code& code) {
  return std::make_unique<View>(code);
}

std::unique_ptr<Node> read_block(Code& code) {
  return std::make_unique<BlockNode>(code);
}

std::unique_ptr<Node> read_recurrent(Code& code) {
  return std::make_unique<RecurrentNode>(code);
}

std::unique_ptr<Node> read_sum(Code& code) {
  return std::make_unique<Sum>(code);
}

}  // namespace cnnlstm_fast
