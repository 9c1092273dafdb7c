#include "norm_statistics.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "cpu/dispatch.h"
#include "threads.h"

namespace cnnlstm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

Tensor new_doubles(const Tensor& like, const Ints& size) {
  return torch::stable::new_empty(like, size, ScalarType::Double);
}

}  // namespace

PerChannel::PerChannel(int64_t channels) : floats_(ceil_div(channels, kMaxVector) * kMaxVector) {}

Parameter::Parameter(const std::optional<Tensor>& given, int64_t channels, double otherwise) : otherwise_(otherwise) {
  if (!given) return;
  STD_TORCH_CHECK(given->is_cpu() && given->dim() == 1 && given->size(0) == channels &&
                      (given->scalar_type() == ScalarType::Float || given->scalar_type() == ScalarType::BFloat16),
                  "expected a norm's parameters of shape (", channels, ",) in float32 or bfloat16");
  flat_ = torch::stable::contiguous(*given);
  data_ = flat_->data_ptr();
  dtype_ = given->scalar_type() == ScalarType::Float ? kFloat32 : kBFloat16;
}

double Parameter::operator[](int64_t c) const {
  return data_ ? kernels().to_float(data_, c, dtype_) : otherwise_;
}

void Moments::add(int64_t c, double count, double mean, double squares) {
  const double share = count / (count_[c] + count), delta = mean - mean_[c];
  squares_[c] += squares + delta * delta * count_[c] * share;
  // An infinity stays one, as in a sum.
  mean_[c] = std::isfinite(delta) ? mean_[c] + delta * share : mean_[c] + mean;
  count_[c] += count;
}

NormForward::NormForward(const Tensor& like, int64_t channels, const std::optional<Tensor>& gamma,
                         const std::optional<Tensor>& beta, double eps)
    : stats(new_doubles(like, Ints{4, channels})),
      scale(channels),
      shift(channels),
      channels_(channels),
      eps_(eps),
      gamma_(gamma, channels, 1),
      beta_(beta, channels, 0) {}

void NormForward::set(int64_t c, double mean, double var) {
  double* stat = static_cast<double*>(stats.data_ptr());
  const double factor = gamma_[c] / std::sqrt(var + eps_);
  scale[c] = static_cast<float>(factor);
  shift[c] = static_cast<float>(beta_[c] - mean * factor);
  stat[c] = mean;
  stat[channels_ + c] = var;
  stat[2 * channels_ + c] = scale[c];
  stat[3 * channels_ + c] = shift[c];
}

NormBackward::NormBackward(const Tensor& stats, int64_t channels)
    : stat_(static_cast<const double*>(stats.data_ptr())),
      channels_(channels),
      scale_(channels),
      shift_(channels),
      mean_(channels),
      mean_grad_(channels),
      slope_(channels) {
  for (int64_t c = 0; c < channels; ++c) {
    mean_[c] = static_cast<float>(stat_[c]);
    scale_[c] = static_cast<float>(stat_[2 * channels + c]);
    shift_[c] = static_cast<float>(stat_[3 * channels + c]);
  }
  norm_ = {scale_.data(), shift_.data(), mean_.data(), nullptr, nullptr};
}

Tensor NormBackward::finish(const Tensor& like, const std::vector<double>& total, int64_t positions, double eps,
                            bool given) {
  const Tensor grads = new_doubles(like, Ints{2, channels_});
  double* found = static_cast<double*>(grads.data_ptr());
  for (int64_t c = 0; c < channels_; ++c) {
    const double inverse = 1 / std::sqrt(stat_[channels_ + c] + eps), sum = total[c];
    // The kernels took the mean as a float; an infinite sum has nothing to mend.
    const double off = mean_[c] - stat_[c];
    found[c] = inverse * (total[channels_ + c] + (std::isfinite(sum) ? sum * off : 0));
    found[channels_ + c] = sum;
    if (given) continue;  // the statistics don't depend on z
    const double from_z = inverse * found[c] / positions;
    slope_[c] = static_cast<float>(from_z);
    mean_grad_[c] = static_cast<float>(sum / positions + (std::isfinite(from_z) ? from_z * off : 0));
  }
  norm_.mean_grad = mean_grad_.data();
  norm_.slope = slope_.data();
  return grads;
}

}  // namespace cnnlstm_fast
