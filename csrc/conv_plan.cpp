#include "conv_plan.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>

#include "block_rows.h"
#include "cpu/dispatch.h"
#include "limits.h"
#include "op.h"
#include "threads.h"

namespace cnnlstm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// Convolution maps of one chunk: what two cores' second-level caches hold beside weights and input.
const int64_t kChunkBytes = limit("CHUNK_BYTES", int64_t{2} << 20, 1);
// And so many times the weights.
const int64_t kChunkWeights = limit("CHUNK_WEIGHTS", 8, 0);

// All plans. The number of one is its place from 1 on: PLANS of cnnlstm_fast/ops/conv_block.py has the same.
const std::vector<const ConvPlan*>& plans() {
  static const std::vector<const ConvPlan*> all{&direct_plan(), &chunked_plan(), &winograd_plan(), &fft_plan()};
  return all;
}

}  // namespace

// ---- A weight's gradient

void WeightSum::add(const Tensor& found) {
  const Tensor flat = torch::stable::contiguous(found);
  if (!first_) {
    first_ = flat;
    return;
  }
  if (!sum_) {
    sum_.emplace(flat.numel());
    accumulate(*first_);
  }
  accumulate(flat);
}

Tensor WeightSum::result() const {
  if (!sum_) return *first_;
  const Tensor to = torch::stable::new_empty(*first_, sizes(*first_));
  void* data = to.data_ptr();
  const int64_t count = to.numel();
  if (to.scalar_type() == ScalarType::Float)
    std::copy_n(sum_->data(), count, static_cast<float*>(data));
  else
    for (int64_t i = 0; i < count; ++i) kernels().from_float((*sum_)[i], data, i, kBFloat16);
  return to;
}

void WeightSum::accumulate(const Tensor& flat) {
  const void* data = flat.data_ptr();
  const int64_t count = flat.numel();
  if (flat.scalar_type() == ScalarType::Float)
    for (int64_t i = 0; i < count; ++i) (*sum_)[i] += static_cast<const float*>(data)[i];
  else
    for (int64_t i = 0; i < count; ++i) (*sum_)[i] += kernels().to_float(data, i, kBFloat16);
}

// ---- Gradients of a convolution

void ConvBackward::add(const Tensor& grad_map, int64_t n0) {
  if (need_.bias) add_bias(grad_map);
  if (!need_.x && !need_.weight) return;
  add_images(torch::stable::narrow(const_cast<Tensor&>(x_), 0, n0, grad_map.size(0)), grad_map, n0);
}

std::optional<ConvolutionGrads> ConvBackward::result() {
  if (!finish()) return std::nullopt;
  const Tensor bias = need_.bias ? torch::stable::new_empty(weight_, Ints{weight_.size(0)}) : no_elements(x_);
  const int32_t dtype = bias.scalar_type() == ScalarType::Float ? kFloat32 : kBFloat16;
  for (size_t c = 0; c < bias_sum_.size(); ++c)
    kernels().from_float(static_cast<float>(bias_sum_[c]), bias.data_ptr(), c, dtype);
  return ConvolutionGrads{need_.x ? *grad_x_ : no_elements(x_), need_.weight ? weight_sum_.result() : no_elements(x_),
                          bias};
}

Tensor& ConvBackward::grad_x() {
  if (!grad_x_) grad_x_ = new_like_input(x_);
  return *grad_x_;
}

Tensor ConvBackward::grad_x(int64_t n0, int64_t count) {
  return torch::stable::narrow(grad_x(), 0, n0, count);
}

Tensor ConvBackward::new_grad_weight() const {
  return torch::stable::new_empty(weight_, sizes(weight_));
}

void ConvBackward::add_bias(const Tensor& grad_map) {
  const KernelTable& k = kernels();
  const int64_t co = grad_map.size(3), positions = grad_map.numel() / co, parts = ceil_div(positions, kPositionsPerSum);
  const int32_t dtype = grad_map.scalar_type() == ScalarType::Float ? kFloat32 : kBFloat16;
  std::vector<double> sums(parts * co);
  const char* data = static_cast<const char*>(grad_map.data_ptr());
  const int64_t part_bytes = kPositionsPerSum * co * grad_map.element_size();
  for_each_item(parts, [&](int64_t i) {
    k.sum_rows(data + i * part_bytes, std::min(kPositionsPerSum, positions - i * kPositionsPerSum), co, dtype,
               sums.data() + i * co);
  });
  bias_sum_.resize(co);
  for (int64_t i = 0; i < parts * co; ++i) bias_sum_[i % co] += sums[i];
}

// ---- A block, chunk by chunk

int64_t ConvPlan::images_per_chunk(const Block& b) const {
  const int64_t size = b.dtype == kFloat32 ? 4 : 2;
  const int64_t bytes = std::max(kChunkBytes, kChunkWeights * b.co * b.taps * size);
  return std::clamp<int64_t>(bytes / (b.oh * b.ow * b.co * size), 1, b.n);
}

bool ConvPlan::block_forward(const BlockDescription& description, const Tensor& x, const Convolution& convolution,
                             const Outputs& out) const {
  const Block& b = description.block;
  const std::unique_ptr<ConvForward> forward = conv_forward(convolution, new_temporary);
  const int64_t chunk = images_per_chunk(b);
  for (int64_t n0 = 0; n0 < b.n; n0 += chunk) {
    const int64_t count = std::min(chunk, b.n - n0);
    const Tensor map = forward->map_of(torch::stable::narrow(const_cast<Tensor&>(x), 0, n0, count));
    run_epilogue(b, map.data_ptr(), n0, count, nullptr, nullptr, out);
  }
  return true;
}

std::optional<ConvolutionGrads> ConvPlan::block_backward(const BlockDescription& description, const ResultGrad& result,
                                                         const Tensor& x, const Tensor& weight, Needs need) const {
  const Block& b = description.block;
  const KernelTable& k = kernels();
  const int64_t chunk = images_per_chunk(b), image = b.oh * b.ow * b.co;
  const std::unique_ptr<ConvBackward> grads = conv_backward(description.conv, x, weight, need);
  const void* grad = result.grad.data_ptr();
  const uint8_t* codes = codes_pointer(result.codes);
  for (int64_t n0 = 0; n0 < b.n; n0 += chunk) {
    const int64_t count = std::min(chunk, b.n - n0);
    const Tensor grad_map = new_temporary(x, map_shape(b, count), x.scalar_type());
    char* data = static_cast<char*>(grad_map.data_ptr());
    const int64_t size = grad_map.element_size();
    for_each_band(b, count, [&](int64_t i, int64_t row0, int64_t row1) {
      k.max_unpool(b, grad, result.stride.data(), codes, n0 + i, row0, row1, data + i * image * size,
                   thread_scratch(k.max_unpool_scratch(b)));
    });
    grads->add(grad_map, n0);
  }
  return grads->result();
}

const ConvPlan& conv_plan(int64_t number, const Block& b, const Tensor& weight) {
  const int64_t count = static_cast<int64_t>(plans().size());
  STD_TORCH_CHECK(number >= 1 && number <= count, "conv_block: unknown plan ", number);
  const ConvPlan& plan = *plans()[number - 1];
  const char* why_not = plan.why_not(b);
  STD_TORCH_CHECK(!why_not, "conv_block: the plan ", plan.name(), " takes ", why_not, " only");
  return plan.suits(weight) ? plan : chunked_plan();
}

namespace {

std::vector<std::string> conv_plans() {
  std::vector<std::string> names;
  for (const ConvPlan* plan : plans()) names.emplace_back(plan->name());
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cnnlstm_fast, m) {
  m.def("conv_plans() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CompositeExplicitAutograd, m) {
  m.impl("conv_plans", CNNLSTM_FAST_OP(conv_plans));
}

}  // namespace cnnlstm_fast
