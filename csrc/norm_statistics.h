// What every op with a batch norm does per channel: parameters, statistics of a batch, and gradients through them.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/conv_block/block.h"
#include "memory.h"
#include "tensors.h"

namespace cnnlstm_fast {

// Per channel, as floats, up to a whole number of code groups.
class PerChannel {
 public:
  explicit PerChannel(int64_t channels);
  float& operator[](int64_t c) const { return floats_[c]; }
  const float* data() const { return floats_.data(); }

 private:
  AlignedFloats floats_;
};

// Reads a parameter of a norm, or running statistics.
class Parameter {
 public:
  Parameter(const std::optional<torch::stable::Tensor>& given, int64_t channels, double otherwise);
  double operator[](int64_t c) const;

 private:
  std::optional<torch::stable::Tensor> flat_;
  const void* data_ = nullptr;
  int32_t dtype_ = kFloat32;
  double otherwise_;
};

// Mean and biased variance of every channel, part by part: T. Chan, G. Golub and R. LeVeque, Algorithms for computing
// the sample variance (1983).
class Moments {
 public:
  explicit Moments(int64_t channels) : count_(channels), mean_(channels), squares_(channels) {}
  // A part of channel c: its values' number, mean, and sum of squares about that.
  void add(int64_t c, double count, double mean, double squares);
  double mean(int64_t c) const { return mean_[c]; }
  double var(int64_t c) const { return squares_[c] / count_[c]; }

 private:
  std::vector<double> count_, mean_, squares_;
};

// The statistics that a norm uses, and what it makes of them: the rows of `stats`, and floats for the kernels.
class NormForward {
 public:
  NormForward(const torch::stable::Tensor& like, int64_t channels, const std::optional<torch::stable::Tensor>& gamma,
              const std::optional<torch::stable::Tensor>& beta, double eps);
  // The mean without the convolution's bias, and the biased variance.
  void set(int64_t c, double mean, double var);

  const torch::stable::Tensor stats;  // [4, channels] in float64: mean, variance, scale, shift
  const PerChannel scale, shift;

 private:
  const int64_t channels_;
  const double eps_;
  const Parameter gamma_, beta_;
};

// A norm's statistics and gradients, per channel: what NormGrads points to.
class NormBackward {
 public:
  NormBackward(const torch::stable::Tensor& stats, int64_t channels);
  const NormGrads& norm() const { return norm_; }

  // The gradients of gamma and beta [2, C], by the sums of du and du * (z - mean) over `positions` positions of the
  // batch, [2, C]. From here on `norm` has what the gradient of z takes.
  torch::stable::Tensor finish(const torch::stable::Tensor& like, const std::vector<double>& total, int64_t positions,
                               double eps, bool given);

 private:
  const double* stat_;
  const int64_t channels_;
  const PerChannel scale_, shift_, mean_, mean_grad_, slope_;
  NormGrads norm_;
};

}  // namespace cnnlstm_fast
