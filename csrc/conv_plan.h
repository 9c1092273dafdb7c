// The plans: ways to compute a block's convolution and its gradients. Each is a class in a file of its own, plan_*.cpp,
// and an entry of the table in conv_plan.cpp; nothing else knows which there are.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <vector>

#include "block_description.h"
#include "library_calls.h"
#include "memory.h"

namespace cnnlstm_fast {

// How a map is made: by new_output, where an op returns it, or by new_temporary.
using NewTensor = torch::stable::Tensor (*)(const torch::stable::Tensor& like, const Ints& size,
                                            torch::headeronly::ScalarType dtype);

// A convolution's parameters, of which the bias may be missing.
struct Convolution {
  const Ints& conv;  // as in the schema of conv_block
  const torch::stable::Tensor weight;
  const std::optional<torch::stable::Tensor> bias;
};

// Maps of a convolution for some images after others.
class ConvForward {
 public:
  virtual ~ConvForward() = default;
  // The map [N, OH, OW, CO], contiguous, of x [N, C, H, W].
  virtual torch::stable::Tensor map_of(const torch::stable::Tensor& x) const = 0;
};

struct Needs {
  bool x, weight, bias;
};

// Sums up gradients of a weight in single precision, which may be bfloat16 themselves.
class WeightSum {
 public:
  void add(const torch::stable::Tensor& found);
  torch::stable::Tensor result() const;

 private:
  void accumulate(const torch::stable::Tensor& flat);
  std::optional<torch::stable::Tensor> first_;
  std::optional<AlignedFloats> sum_;
};

// The gradients of a convolution from those of its map, which come for some images after others.
class ConvBackward {
 public:
  ConvBackward(const Ints& conv, const torch::stable::Tensor& x, const torch::stable::Tensor& weight, Needs need)
      : conv_(conv), x_(x), weight_(weight), need_(need) {}
  virtual ~ConvBackward() = default;

  // `grad_map` [images, OH, OW, CO], contiguous, is that of the images from n0 on.
  void add(const torch::stable::Tensor& grad_map, int64_t n0);

  // Nothing, if sums are not finite: then NaN and infinity are not where they belong, and `chunked` finds out where.
  std::optional<ConvolutionGrads> result();

 protected:
  // Adds the gradients of the input and the weight of x [images, C, H, W], which begins with image n0.
  virtual void add_images(const torch::stable::Tensor& x, const torch::stable::Tensor& grad_map, int64_t n0) = 0;
  // Ends the sums. Returns whether everything is finite.
  virtual bool finish() { return true; }

  // The gradient of all of the input, unwritten at first; and of `count` images from n0 on.
  torch::stable::Tensor& grad_x();
  torch::stable::Tensor grad_x(int64_t n0, int64_t count);
  torch::stable::Tensor new_grad_weight() const;

  const Ints& conv_;
  const torch::stable::Tensor x_, weight_;
  const Needs need_;
  std::optional<torch::stable::Tensor> grad_x_;
  WeightSum weight_sum_;

 private:
  void add_bias(const torch::stable::Tensor& grad_map);
  std::vector<double> bias_sum_;
};

// The gradient of a block's result, and what its forward kept.
struct ResultGrad {
  const torch::stable::Tensor& grad;
  const Ints stride;  // by (N, C, H, W)
  const torch::stable::Tensor& codes;
};

class ConvPlan {
 public:
  virtual ~ConvPlan() = default;
  virtual const char* name() const = 0;
  // Which blocks it takes, where this is none of them; null where it is one.
  virtual const char* why_not(const Block&) const { return nullptr; }
  // Whether it takes these values of the weight; `chunked` stands in where it does not.
  virtual bool suits(const torch::stable::Tensor& weight) const { return true; }
  // Large weights want large chunks: every chunk reads them, and its backward writes them.
  virtual int64_t images_per_chunk(const Block& b) const;

  virtual std::unique_ptr<ConvForward> conv_forward(const Convolution& convolution, NewTensor new_map) const = 0;
  virtual std::unique_ptr<ConvBackward> conv_backward(const Ints& conv, const torch::stable::Tensor& x,
                                                      const torch::stable::Tensor& weight, Needs need) const = 0;

  // The whole block of at least one image, and its gradients: chunk by chunk by the two above, where a plan knows
  // nothing better. False, or nothing, if values are not finite and `chunked` is to find out where.
  virtual bool block_forward(const BlockDescription& description, const torch::stable::Tensor& x,
                             const Convolution& convolution, const Outputs& out) const;
  virtual std::optional<ConvolutionGrads> block_backward(const BlockDescription& description, const ResultGrad& result,
                                                         const torch::stable::Tensor& x,
                                                         const torch::stable::Tensor& weight, Needs need) const;
};

const ConvPlan& direct_plan();
const ConvPlan& chunked_plan();
const ConvPlan& winograd_plan();
const ConvPlan& fft_plan();

// The plan of this number, or `chunked` where the weight's values do not suit it. Raises where there is none, or it
// does not take such a block.
const ConvPlan& conv_plan(int64_t number, const Block& b, const torch::stable::Tensor& weight);

}  // namespace cnnlstm_fast
