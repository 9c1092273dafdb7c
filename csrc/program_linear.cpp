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

std::shared_ptr<const PackedLibraryConv> Code::packed(const Ints& conv, const Tensor& weight,
                                                      const std::optional<Tensor>& bias) {
  Ints key{reinterpret_cast<int64_t>(weight.data_ptr()), bias ? reinterpret_cast<int64_t>(bias->data_ptr()) : 0};
  for (int64_t i = 0; i < weight.dim(); ++i) key.push_back(weight.size(i)), key.push_back(weight.stride(i));
  key.insert(key.end(), conv.begin(), conv.end());
  std::shared_ptr<const PackedLibraryConv>& found = libraries_[key];
  if (!found) found = std::make_shared<const PackedLibraryConv>(conv, weight, bias);
  return found;
}

void LinearNode::run(Frame& frame) const {
  const Tensor& given = frame.tensor(x_);
  STD_TORCH_CHECK(given.dim() >= 1 && given.size(given.dim() - 1) == in_ && given.scalar_type() == ScalarType::Float,
                  "a frozen linear layer: expected float32 rows of ", in_);
  const Tensor x = torch::stable::contiguous(given);
  Ints size = sizes(x);
  size.back() = out_;
  const Tensor out = new_output(x, size, ScalarType::Float);
  if (const int64_t rows = x.numel() / in_; rows > 0) multiply(x, rows, mutable_floats(out));
  frame.tensors[to_] = out;
}

namespace {

// activation(x @ weight.T + bias), a convolution of one tap whose positions are the rows of x.
class Linear : public LinearNode {
 public:
  explicit Linear(Code& code) : LinearNode(code.next_read()) {
    const Tensor weight = code.next_constant();
    const std::optional<Tensor> bias = code.next_maybe_constant();
    STD_TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == ScalarType::Float,
                    "program: a linear layer's weight is float32 of 2 dimensions");
    out_ = weight.size(0), in_ = weight.size(1);
    FrozenConvDescription description{in_, out_, 1, 1};
    description.conv = {1, 1, 0, 0, 1, 1, 1};
    description.activation = code.next();
    description.act = code.next_floats();
    packed_ = code.packed(description, weight, bias);
    to_ = code.next_written();
  }

 private:
  void multiply(const Tensor& x, int64_t rows, float* out) const override {
    const FrozenConvCall call{1, 1, rows, floats(x), out};
    const int64_t bytes = packed_->scratch_bytes(call);
    packed_->run(call, thread_scratch(bytes / static_cast<int64_t>(sizeof(float))), bytes);
  }

  std::shared_ptr<const FrozenConv> packed_;
};

}  // namespace

std::unique_ptr<Node> read_linear(Code& code) {
  return std::make_unique<Linear>(code);
}

}  // namespace cnnlstm_fast
