// The plan `chunked`: PyTorch's own convolution for as many images as stay in cache, then one pass over their map.
#include <torch/csrc/stable/ops.h>

#include "conv_plan.h"

namespace cnnlstm_fast {
namespace {

using torch::stable::Tensor;

class ChunkedForward : public ConvForward {
 public:
  explicit ChunkedForward(const Convolution& convolution) : convolution_(convolution) {}

  Tensor map_of(const Tensor& x) const override {
    const auto& [conv, weight, bias] = convolution_;
    return library_convolution(x, weight, bias, conv, describe_convolution(x, weight, conv).block.ow);
  }

 private:
  const Convolution convolution_;
};

class ChunkedBackward : public ConvBackward {
 public:
  using ConvBackward::ConvBackward;

 private:
  void add_images(const Tensor& x, const Tensor& grad_map, int64_t n0) override {
    const bool all = x.size(0) == x_.size(0);
    const ConvolutionGrads found =
        library_convolution_backward(view_channels_first(grad_map), x, weight_, conv_, need_.x, need_.weight);
    if (need_.x && all) {
      grad_x_ = lies_channels_last(x_) ? channels_last(found.x) : torch::stable::contiguous(found.x);
    } else if (need_.x) {
      Tensor to = grad_x(n0, x.size(0));
      torch::stable::copy_(to, found.x);
    }
    if (need_.weight) weight_sum_.add(found.weight);
  }
};

class ChunkedPlan : public ConvPlan {
 public:
  const char* name() const override { return "chunked"; }

  std::unique_ptr<ConvForward> conv_forward(const Convolution& convolution, NewTensor) const override {
    return std::make_unique<ChunkedForward>(convolution);
  }

  std::unique_ptr<ConvBackward> conv_backward(const Ints& conv, const Tensor& x, const Tensor& weight,
                                              Needs need) const override {
    return std::make_unique<ChunkedBackward>(conv, x, weight, need);
  }
};

}  // namespace

const ConvPlan& chunked_plan() {
  static const ChunkedPlan plan;
  return plan;
}

}  // namespace cnnlstm_fast
