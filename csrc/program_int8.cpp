// Linear layers of frozen programs whose weights are int8.
#include <algorithm>

#include "int8_packing.h"
#include "limits.h"
#include "memory.h"
#include "packed_memory.h"
#include "program.h"

namespace cnnlstm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::shared_ptr<const PackedFloats> Code::packed_int8(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) > 0,
                  "program: a linear layer's weight in int8 is of 2 dimensions");
  std::shared_ptr<const PackedFloats>& found =
      packed_int8_[{reinterpret_cast<int64_t>(weight.data_ptr()), weight.size(0), weight.size(1), weight.stride(0),
                    weight.stride(1)}];
  if (!found) {
    auto packed = std::make_shared<const PackedFloats>(int8_linear_floats(weight.size(0), weight.size(1)));
    pack_int8_linear(torch::stable::contiguous(weight), packed->data());
    found = std::move(packed);
  }
  return found;
}

namespace {

// Products that are worth waking another thread, and rows that meet the weights together.
const int64_t kInt8Work = limit("INT8_WORK", int64_t{1} << 20, 1), kInt8ItemRows = limit("INT8_ROWS", 64, 1);

class Int8LinearNode : public LinearNode {
 public:
  explicit Int8LinearNode(Code& code) : LinearNode(code.next_read()) {
    const Tensor weight = code.next_constant();
    const std::optional<Tensor> bias = code.next_maybe_constant();
    packed_ = code.packed_int8(weight);
    in_ = weight.size(1), out_ = layer_.outs = weight.size(0);
    layer_.words = int8_row(in_), layer_.unit = &int8_unit();
    layer_.panels = reinterpret_cast<const uint32_t*>(packed_->data());
    bias_ = std::make_unique<AlignedFloats>(round_up(layer_.outs, recurrent_kernels().lanes));
    layer_.bias = bias_->data();
    check_argument("a linear layer in int8", "bias", bias, {layer_.outs}, ScalarType::Float);
    if (bias) std::copy_n(floats(torch::stable::contiguous(*bias)), layer_.outs, bias_->data());
    const int64_t activation = code.next();
    const Floats act = code.next_floats();
    check_activation(activation, act);
    layer_.activation = static_cast<int32_t>(activation);
    for (size_t i = 0; i < act.size(); ++i) layer_.act[i] = static_cast<float>(act[i]);
    to_ = code.next_written();
  }

 private:
  // Rows are quantized first, once for all panels.
  void multiply(const Tensor& x, int64_t rows, const Tensor& result) const override {
    float* out = mutable_floats(result);
    const Int8Table& k = int8_kernels();
    const int64_t row = layer_.unit->format.parts * layer_.words;
    const Tensor memory = new_temporary(x, {rows * (row + 1)}, ScalarType::Float);
    uint32_t* quantized = reinterpret_cast<uint32_t*>(mutable_floats(memory));
    float* scales = mutable_floats(memory) + rows * row;
    auto quantize = [&](int64_t first, int64_t some) {
      for (int64_t r = first; r < first + some; ++r)
        scales[r] = k.quantize_row(floats(x) + r * in_, in_, layer_.words, layer_.unit->format, quantized + r * row);
    };
    auto run = [&](int64_t first, int64_t some, int64_t begin, int64_t end) {
      k.linear(layer_, quantized + first * row, scales + first, some, begin, end, out + first * layer_.outs);
    };
    const int64_t panels = ceil_div(layer_.outs, k.recurrent.panel), parts = ceil_div(rows, kInt8ItemRows);
    if (torch::stable::get_num_threads() == 1 || rows * layer_.outs * in_ < 2 * kInt8Work) {
      const FlushDenormals flush;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = part * rows / parts, some = (part + 1) * rows / parts - first;
        quantize(first, some);
        run(first, some, 0, panels);
      }
      return;
    }
    const int64_t groups = std::min(panels, ceil_div(wanted_items(), parts));
    for_each_item(parts, [&](int64_t part) {
      const int64_t first = part * rows / parts;
      quantize(first, (part + 1) * rows / parts - first);
    });
    for_each_item(parts * groups, [&](int64_t i) {
      const int64_t part = i / groups, group = i % groups, first = part * rows / parts;
      run(first, (part + 1) * rows / parts - first, group * panels / groups, (group + 1) * panels / groups);
    });
  }

  std::shared_ptr<const PackedFloats> packed_;
  std::unique_ptr<AlignedFloats> bias_;
  Int8Linear layer_{};
};

}  // namespace

std::unique_ptr<Node> read_int8_linear(Code& code) {
  return std::make_unique<Int8LinearNode>(code);
}

}  // namespace cnnlstm_fast
