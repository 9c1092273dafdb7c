#include "library_calls.h"

#include <torch/csrc/stable/ops.h>

#include "library_limits.h"

namespace cnnlstm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// The input with the zeros after its last row and column that padding="same" adds for an even kernel: the library's
// own padding is the same on both sides.
Tensor pad_after(const Tensor& x, const Ints& conv) {
  if (conv.size() == 7) return x;
  const Ints sides{0, conv[8], 0, conv[7]};
  return torch::stable::pad(x, sides);
}

}  // namespace

Tensor library_convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                           const Ints& conv, int64_t out_width) {
  using torch::stable::detail::from;
  const LibraryLimits limits = library_limits(input, weight, conv, out_width);
  const ScalarType dtype = input.scalar_type(), inner = limits.as_float ? ScalarType::Float : dtype;
  const Tensor x =
      as_dtype(pad_after(limits.contiguous ? contiguous_strict(input) : channels_last(input), conv), inner);
  const Tensor w = as_dtype(limits.contiguous ? contiguous_strict(weight) : canonical_strides(weight), inner);
  std::optional<Tensor> added = bias;
  if (added) added = as_dtype(*added, inner);
  StableIValue stack[9] = {from(x),
                           from(w),
                           from(added),
                           from(Ints{conv[0], conv[1]}),
                           from(Ints{conv[2], conv[3]}),
                           from(Ints{conv[4], conv[5]}),
                           from(false),
                           from(Ints{0, 0}),
                           from(conv[6])};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack, TORCH_ABI_VERSION));
  return view_channels_inside(channels_last(as_dtype(torch::stable::detail::to<Tensor>(stack[0]), dtype)));
}

ConvolutionGrads library_convolution_backward(const Tensor& grad_map, const Tensor& input, const Tensor& weight,
                                              const Ints& conv, bool need_x, bool need_weight) {
  using torch::stable::detail::from;
  const LibraryLimits limits = library_limits(input, weight, conv, grad_map.size(3));
  const bool contiguous = limits.contiguous_grad;
  const ScalarType dtype = input.scalar_type(), inner = limits.as_float ? ScalarType::Float : dtype;
  const Tensor grad = as_dtype(contiguous ? contiguous_strict(grad_map) : grad_map, inner);
  const Tensor x = pad_after(as_dtype(contiguous ? contiguous_strict(input) : channels_last(input), inner), conv);
  const Tensor w = as_dtype(contiguous ? contiguous_strict(weight) : canonical_strides(weight), inner);
  const bool mask[3] = {need_x, need_weight, false};
  StableIValue stack[11] = {from(grad),
                            from(x),
                            from(w),
                            from(std::optional<Ints>(Ints{weight.size(0)})),
                            from(Ints{conv[0], conv[1]}),
                            from(Ints{conv[2], conv[3]}),
                            from(Ints{conv[4], conv[5]}),
                            from(false),
                            from(Ints{0, 0}),
                            from(conv[6]),
                            from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask, 3))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution_backward", "", stack, TORCH_ABI_VERSION));
  Tensor grad_x = torch::stable::detail::to<Tensor>(stack[0]),
         grad_weight = torch::stable::detail::to<Tensor>(stack[1]);
  const Tensor bias = torch::stable::detail::to<Tensor>(stack[2]);
  if (need_x && conv.size() > 7)
    for (int dim : {2, 3}) grad_x = torch::stable::narrow(grad_x, dim, 0, input.size(dim));
  return {need_x ? as_dtype(grad_x, dtype) : grad_x, need_weight ? as_dtype(grad_weight, dtype) : grad_weight, bias};
}

}  // namespace cnnlstm_fast
