// Packed weights of frozen programs, and their linear layers.
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "frozen_conv.h"
#include "memory.h"
#include "program.h"

namespace cnnlstm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::shared_ptr<const FrozenConv> Code::packed(const FrozenConvDescription& description, const Tensor& weight,
                                               const std::optional<Tensor>& bias) {
  const Tensor dense = torch::stable::contiguous(weight);
  std::optional<Tensor> added;
  if (bias) {
    check_argument("packed weights", "bias", bias, {description.out_channels}, ScalarType::Float);
    added = torch::stable::contiguous(*bias);
  }
  std::vector<int64_t> key{reinterpret_cast<int64_t>(weight.data_ptr()),
                           bias ? reinterpret_cast<int64_t>(bias->data_ptr()) : 0,
                           description.channels,
                           description.out_channels,
                           description.kernel_h,
                           description.kernel_w,
                           description.activation,
                           description.adds,
                           description.winograd};
  auto put = [&](const Ints& values) {
    key.push_back(static_cast<int64_t>(values.size()));
    key.insert(key.end(), values.begin(), values.end());
  };
  put(description.conv), put(description.pool), put(description.in_order), put(description.out_order);
  for (int64_t i = 0; i < weight.dim(); ++i) key.push_back(weight.stride(i));
  for (const double number : description.act) {
    int64_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    key.push_back(bits);
  }
  std::shared_ptr<const FrozenConv>& found = packed_[key];
  if (!found) found = std::make_shared<const FrozenConv>(description, floats(dense), added ? floats(*added) : nullptr);
  return found;
}

Ints Code::key_of(const Ints& conv, const Tensor& weight, const std::optional<Tensor>& bias) {
  Ints key{reinterpret_cast<int64_t>(weight.data_ptr()), bias ? reinterpret_cast<int64_t>(bias->data_ptr()) : 0};
  for (int64_t i = 0; i < weight.dim(); ++i) key.push_back(weight.size(i)), key.push_back(weight.stride(i));
  key.insert(key.end(), conv.begin(), conv.end());
  return key;
}

void LinearNode::run(Frame& frame) const {
  const Tensor& given = frame.tensor(x_);
  STD_TORCH_CHECK(given.dim() >= 1 && given.size(given.dim() - 1) == in_ && given.scalar_type() == dtype_,
                  "a frozen linear layer: expected rows of ", in_, " of its weight's dtype");
  const Tensor x = torch::stable::contiguous(given);
  Ints size = sizes(x);
  size.back() = out_;
  const Tensor out = new_output(x, size, dtype_);
  if (const int64_t rows = x.numel() / in_; rows > 0) multiply(x, rows, out);
  frame.tensors[to_] = out;
}

namespace {

// activation(x @ weight.T + bias), a convolution of one tap whose positions are the rows of x. In bfloat16 by a unit,
// or where the processor has none, in float32 with one rounding.
class Linear : public LinearNode {
 public:
  explicit Linear(Code& code) : LinearNode(code.next_read()) {
    const Tensor weight = code.next_constant();
    const std::optional<Tensor> bias = code.next_maybe_constant();
    dtype_ = weight.scalar_type();
    STD_TORCH_CHECK(weight.dim() == 2 && (dtype_ == ScalarType::Float || dtype_ == ScalarType::BFloat16),
                    "program: a linear layer's weight is float32 or bfloat16, of 2 dimensions");
    out_ = weight.size(0), in_ = weight.size(1);
    FrozenConvDescription description{in_, out_, 1, 1};
    description.conv = {1, 1, 0, 0, 1, 1, 1};
    description.activation = code.next();
    description.act = code.next_floats();
    if (dtype_ == ScalarType::BFloat16 && bfloat16_kernels()) {
      check_activation(description.activation, description.act);
      activation_.activation = static_cast<int32_t>(description.activation);
      for (size_t i = 0; i < description.act.size(); ++i) activation_.act[i] = static_cast<float>(description.act[i]);
      pairs_ =
          code.packed<PackedPairs>(description.conv, view_strided(weight, {out_, in_, 1, 1}, {in_, 1, 1, 1}, 0), bias);
    } else {
      wide_ = {as_floats(weight), bias ? std::optional<Tensor>(as_floats(*bias)) : bias};
      packed_ = code.packed(description, wide_->first, wide_->second);
    }
    to_ = code.next_written();
  }

 private:
  void multiply(const Tensor& x, int64_t rows, const Tensor& out) const override {
    if (pairs_) return pairs_->multiply(activation_, x, rows, out);
    const Tensor from = as_floats(x);
    Tensor to = dtype_ == ScalarType::Float ? out : new_temporary(x, {rows, out_}, ScalarType::Float);
    const FrozenConvCall call{1, 1, rows, floats(from), mutable_floats(to)};
    const int64_t bytes = packed_->scratch_bytes(call);
    packed_->run(call, thread_scratch(bytes / static_cast<int64_t>(sizeof(float))), bytes);
    if (dtype_ != ScalarType::Float)
      torch::stable::copy_(const_cast<Tensor&>(out), torch::stable::view(to, sizes(out)));
  }

  Block activation_{};
  std::shared_ptr<const PackedPairs> pairs_;
  std::shared_ptr<const FrozenConv> packed_;
  std::optional<std::pair<Tensor, std::optional<Tensor>>> wide_;  // what packed_ is known by
};

}  // namespace

std::unique_ptr<Node> read_linear(Code& code) {
  return std::make_unique<Linear>(code);
}

}  // namespace cnnlstm_fast
