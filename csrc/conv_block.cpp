// cnnlstm_fast::conv_block and its backward on the CPU: checks and results. The schema and the meaning of every
// argument stand in cnnlstm_fast/ops/conv_block.py; the plans that compute it are those of conv_plan.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "block_description.h"
#include "conv_plan.h"
#include "memory.h"
#include "op.h"

namespace cnnlstm_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> conv_block(Tensor x, Tensor weight, std::optional<Tensor> bias, Ints conv,
                                              int64_t activation, Floats act, Ints pool, Ints order, int64_t plan,
                                              bool keep) {
  const BlockDescription description = describe_block(x, weight, conv, activation, act, pool, order);
  const Block& b = description.block;
  const Ints shape = result_shape(description);
  check_argument("conv_block", "bias", bias, {b.co}, x.scalar_type());
  const ConvPlan& chosen = conv_plan(plan, b, weight);
  const Tensor out = new_output(x, shape, x.scalar_type());
  const Tensor codes = new_output(x, keep && b.coded ? codes_shape(b) : Ints{0}, ScalarType::Byte);
  const Tensor slopes = new_output(x, keep && description.keeps_slopes ? shape : Ints{0}, x.scalar_type());
  if (b.n > 0) {
    const Outputs outputs{out.data_ptr(), codes_pointer(codes), slopes.numel() ? slopes.data_ptr() : nullptr};
    const Convolution convolution{conv, weight, bias};
    if (!chosen.block_forward(description, x, convolution, outputs))
      chunked_plan().block_forward(description, x, convolution, outputs);
  }
  return {out, codes, slopes};
}

// The sums over no images.
ConvolutionGrads gradients_of_nothing(const Tensor& x, const Tensor& weight, Needs need) {
  auto zeros = [&](const Ints& shape) { return torch::stable::new_zeros(x, shape); };
  return {need.x ? new_like_input(x) : no_elements(x), need.weight ? zeros(sizes(weight)) : no_elements(x),
          need.bias ? zeros({weight.size(0)}) : no_elements(x)};
}

std::tuple<Tensor, Tensor, Tensor> conv_block_backward(Tensor grad, Tensor x, Tensor weight, Tensor codes, Ints conv,
                                                       int64_t activation, Floats act, Ints pool, Ints order,
                                                       int64_t plan, bool need_x, bool need_weight, bool need_bias) {
  const char* op = "conv_block_backward";
  const BlockDescription description = describe_block(x, weight, conv, activation, act, pool, order);
  const Block& b = description.block;
  check_argument(op, "the gradient", grad, result_shape(description), x.scalar_type());
  check_argument(op, "codes", codes, b.coded ? codes_shape(b) : Ints{0}, ScalarType::Byte, Memory::kContiguous);
  const ConvPlan& chosen = conv_plan(plan, b, weight);
  const Needs need{need_x, need_weight, need_bias};
  const ResultGrad result{grad, strides_by_axis(grad, order), codes};
  std::optional<ConvolutionGrads> found;
  if (b.n == 0) found = gradients_of_nothing(x, weight, need);
  if (!found) found = chosen.block_backward(description, result, x, weight, need);
  if (!found) found = chunked_plan().block_backward(description, result, x, weight, need);
  return {found->x, found->weight, found->bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CPU, m) {
  m.impl("conv_block", CNNLSTM_FAST_OP(conv_block));
  m.impl("conv_block_backward", CNNLSTM_FAST_OP(conv_block_backward));
}

}  // namespace cnnlstm_fast
