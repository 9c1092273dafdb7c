#include "packed_library.h"

#include <torch/csrc/stable/ops.h>

#include <string>

#include "library_calls.h"
#include "library_limits.h"

namespace cnnlstm_fast {

using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

namespace {

Tensor reordered(const Ints& conv, const Tensor& weight) {
  StableIValue opaque[2] = {from(torch::stable::contiguous(weight)), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::to_mkldnn", "", opaque, TORCH_ABI_VERSION));
  StableIValue stack[6] = {opaque[0],
                           from(Ints{conv[2], conv[3]}),
                           from(Ints{conv[0], conv[1]}),
                           from(Ints{conv[4], conv[5]}),
                           from(conv[6]),
                           from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mkldnn_reorder_conv2d_weight", "", stack, TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

}  // namespace

PackedLibraryConv::PackedLibraryConv(const Ints& conv, const Tensor& weight, const std::optional<Tensor>& bias)
    : conv_(conv), weight_(weight), packed_(reordered(conv, weight)), bias_(bias) {}

// The library's own activations are not used: its ReLU makes zeros of NaN.
Tensor PackedLibraryConv::map_of(const Block& b, const Tensor& x, const std::optional<Tensor>& added, bool) const {
  const LibraryLimits limits = library_limits(x, weight_, conv_, b.ow);
  if (limits.contiguous || limits.as_float || conv_.size() > 7) {
    const Tensor map = library_convolution(x, weight_, bias_, conv_, b.ow);
    return added ? view_channels_inside(channels_last(torch::stable::subtract(view_channels_first(map), *added, -1.0)))
                 : map;
  }
  const Ints padding{conv_[2], conv_[3]}, stride{conv_[0], conv_[1]}, dilation{conv_[4], conv_[5]};
  StableIValue found;
  if (added) {
    StableIValue stack[13] = {from(channels_last(x)),
                              from(channels_last(*added)),
                              from(packed_),
                              from(bias_),
                              from(padding),
                              from(stride),
                              from(dilation),
                              from(conv_[6]),
                              from(std::string("add")),
                              from(std::nullopt),
                              from(std::nullopt),
                              from(Ints{}),
                              from(std::nullopt)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mkldnn::_convolution_pointwise", "binary", stack, TORCH_ABI_VERSION));
    found = stack[0];
  } else {
    StableIValue stack[10] = {from(channels_last(x)), from(packed_),     from(bias_),    from(padding),
                              from(stride),           from(dilation),    from(conv_[6]), from(std::string("none")),
                              from(Ints{}),           from(std::nullopt)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mkldnn::_convolution_pointwise", "", stack, TORCH_ABI_VERSION));
    found = stack[0];
  }
  return view_channels_inside(channels_last(to<Tensor>(found)));
}

}  // namespace cnnlstm_fast
