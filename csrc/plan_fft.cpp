// The plan `fft`: a convolution by Fourier transforms (cnnlstm_fast/ops/conv_fft.py), then one pass over its map.
#include <torch/csrc/stable/ops.h>

#include "conv_plan.h"

namespace cnnlstm_fast {
namespace {

using torch::stable::Tensor;
using torch::stable::detail::from;

class FFTForward : public ConvForward {
 public:
  FFTForward(const Convolution& convolution, NewTensor new_map) : convolution_(convolution), new_map_(new_map) {}

  Tensor map_of(const Tensor& x) const override {
    const auto& [conv, weight, bias] = convolution_;
    const Block b = describe_convolution(x, weight, conv).block;
    const Tensor map = new_map_(x, map_shape(b, b.n), x.scalar_type());
    StableIValue stack[5] = {from(x), from(weight), from(bias), from(conv), from(map)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("cnnlstm_fast::conv_fft", "", stack, TORCH_ABI_VERSION));
    return map;
  }

 private:
  const Convolution convolution_;
  const NewTensor new_map_;
};

class FFTBackward : public ConvBackward {
 public:
  using ConvBackward::ConvBackward;

 private:
  void add_images(const Tensor& x, const Tensor& grad_map, int64_t n0) override {
    std::optional<Tensor> to_x, to_weight;
    if (need_.x) to_x = grad_x(n0, x.size(0));
    if (need_.weight) to_weight = new_grad_weight();
    StableIValue stack[6] = {
        from(view_channels_first(grad_map)), from(x), from(weight_), from(conv_), from(to_x), from(to_weight)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("cnnlstm_fast::conv_fft_backward", "", stack, TORCH_ABI_VERSION));
    if (need_.weight) weight_sum_.add(*to_weight);
  }
};

class FFTPlan : public ConvPlan {
 public:
  const char* name() const override { return "fft"; }

  const char* why_not(const Block& b) const override {
    const bool taken = b.dtype == kFloat32 && b.dh == 1 && b.dw == 1 && b.groups == 1;
    return taken ? nullptr : "float32 without dilation and groups";
  }

  // All of them: the transforms cut their work themselves.
  int64_t images_per_chunk(const Block& b) const override { return b.n; }

  std::unique_ptr<ConvForward> conv_forward(const Convolution& convolution, NewTensor new_map) const override {
    return std::make_unique<FFTForward>(convolution, new_map);
  }

  std::unique_ptr<ConvBackward> conv_backward(const Ints& conv, const Tensor& x, const Tensor& weight,
                                              Needs need) const override {
    return std::make_unique<FFTBackward>(conv, x, weight, need);
  }
};

}  // namespace

const ConvPlan& fft_plan() {
  static const FFTPlan plan;
  return plan;
}

}  // namespace cnnlstm_fast
