// The plan `winograd`: our own convolution of 3x3 taps (winograd_conv.h), which takes 16 products where others take 36.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "conv_plan.h"
#include "op.h"
#include "winograd_conv.h"

namespace cnnlstm_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

class WinogradForward : public ConvForward {
 public:
  WinogradForward(const Convolution& convolution, NewTensor new_map)
      : convolution_(convolution), new_map_(new_map), winograd_(convolution.weight, false) {}

  // By the library where a sum is not finite.
  Tensor map_of(const Tensor& x) const override {
    const auto& [conv, weight, bias] = convolution_;
    const Block b = describe_convolution(x, weight, conv).block;
    const Tensor map = new_map_(x, map_shape(b, b.n), x.scalar_type());
    if (winograd_.run(x, b.ph, b.pw, b.oh, b.ow, bias, static_cast<float*>(map.data_ptr()))) return map;
    return library_convolution(x, weight, bias, conv, b.ow);
  }

 private:
  const Convolution convolution_;
  const NewTensor new_map_;
  const WinogradConvolution winograd_;
};

class WinogradBackward : public ConvBackward {
 public:
  WinogradBackward(const Ints& conv, const Tensor& x, const Tensor& weight, Needs need)
      : ConvBackward(conv, x, weight, need) {
    if (need.x) for_x_.emplace(weight, true);
    if (need.weight) for_weight_.emplace(weight);
  }

 private:
  void add_images(const Tensor& x, const Tensor& grad_map, int64_t n0) override {
    if (need_.x) put_grad_x(grad_map, n0);
    if (need_.weight) for_weight_->add(x, grad_map, conv_[2], conv_[3]);
  }

  void put_grad_x(const Tensor& grad_map, int64_t n0) {
    const int64_t n = grad_map.size(0), c = x_.size(1), h = x_.size(2), w = x_.size(3);
    const bool in_place = lies_channels_last(grad_x());
    const Tensor to = in_place ? grad_x() : new_temporary(x_, Ints{n, h, w, c}, x_.scalar_type());
    float* data = static_cast<float*>(to.data_ptr()) + (in_place ? n0 * h * w * c : 0);
    if (!for_x_->run(view_channels_first(grad_map), 2 - conv_[2], 2 - conv_[3], h, w, std::nullopt, data))
      finite_ = false;
    if (in_place) return;
    Tensor images = grad_x(n0, n);
    torch::stable::copy_(images, view_channels_first(to));
  }

  bool finish() override {
    if (for_weight_) {
      const Tensor to = new_grad_weight();
      if (!for_weight_->result(static_cast<float*>(to.data_ptr()))) finite_ = false;
      weight_sum_.add(to);
    }
    return finite_;
  }

  std::optional<WinogradConvolution> for_x_;
  std::optional<WinogradWeightGrad> for_weight_;
  bool finite_ = true;
};

// Where the results of the images from n0 on go.
Outputs from_image(const Block& b, const Outputs& out, int64_t n0) {
  const int64_t floats = n0 * b.out_stride[0], codes = n0 * b.out_h * b.out_w * b.code_groups * b.code_bytes;
  return {static_cast<float*>(out.data) + floats, out.codes ? out.codes + codes : nullptr,
          out.kept ? static_cast<float*>(out.kept) + floats : nullptr};
}

class WinogradPlan : public ConvPlan {
 public:
  const char* name() const override { return "winograd"; }

  const char* why_not(const Block& b) const override {
    const bool taken = b.dtype == kFloat32 && b.kh == 3 && b.kw == 3 && b.sh == 1 && b.sw == 1 && b.dh == 1 &&
                       b.dw == 1 && b.groups == 1;
    return taken ? nullptr : "float32 and 3x3 taps with stride 1";
  }

  bool suits(const Tensor& weight) const override { return winograd_suits(weight); }

  std::unique_ptr<ConvForward> conv_forward(const Convolution& convolution, NewTensor new_map) const override {
    return std::make_unique<WinogradForward>(convolution, new_map);
  }

  std::unique_ptr<ConvBackward> conv_backward(const Ints& conv, const Tensor& x, const Tensor& weight,
                                              Needs need) const override {
    return std::make_unique<WinogradBackward>(conv, x, weight, need);
  }

  // The kernels do what is behind the convolution while its tiles are in cache.
  bool block_forward(const BlockDescription& description, const Tensor& x, const Convolution& convolution,
                     const Outputs& out) const override {
    const Block& b = description.block;
    const WinogradConvolution winograd(convolution.weight, false);
    // An input that lies otherwise is laid out in chunks that stay in cache.
    const int64_t chunk = x.stride(1) == 1 ? b.n : images_per_chunk(b);
    for (int64_t n0 = 0; n0 < b.n; n0 += chunk) {
      const Tensor part = torch::stable::narrow(const_cast<Tensor&>(x), 0, n0, std::min(chunk, b.n - n0));
      if (!winograd.run(b, part, convolution.bias, from_image(b, out, n0))) return false;
    }
    return true;
  }
};

bool suits_winograd(Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 &&
                      weight.scalar_type() == ScalarType::Float && weight.is_cpu(),
                  "suits_winograd: expected a float32 weight (co, c, 3, 3) on the CPU");
  return winograd_suits(weight);
}

}  // namespace

const ConvPlan& winograd_plan() {
  static const WinogradPlan plan;
  return plan;
}

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CPU, m) {
  m.impl("suits_winograd", CNNLSTM_FAST_OP(suits_winograd));
}

}  // namespace cnnlstm_fast
