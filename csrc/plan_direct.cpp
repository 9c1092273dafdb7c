// The plan `direct`: our own convolution, the whole block in registers and cache.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "block_rows.h"
#include "conv_plan.h"
#include "cpu/dispatch.h"
#include "limits.h"
#include "threads.h"

namespace cnnlstm_fast {
namespace {

using torch::stable::Tensor;

// Sums of all slices of a weight's gradient.
const int64_t kSliceFloats = limit("SLICE_FLOATS", int64_t{4} << 20, 1);
// Multiply-adds that are worth an item.
const int64_t kItemWork = limit("ITEM_WORK", 1 << 16, 1);
// Rows of a depthwise convolution that need more scratch are too long for it.
constexpr int64_t kDepthwiseFloats = 96 * 1024;
// Channels whose positions fit the scratch of an item.
constexpr int64_t kMostPlanes = 1536;

// The block with `factor` groups computed as one, with zeros between them. The kernels' blocks of channels begin at
// multiples of 16, so groups that end elsewhere are merged until they do.
class MergedGroups {
 public:
  explicit MergedGroups(const Block& b) : given_(b), factor_(factor_of(b)) {
    block = b;
    block.groups /= factor_;
    block.taps *= factor_;
    check_offsets(block);
  }

  Block block;

  // From [CO, C / groups, KH, KW] of the groups as given to that of the merged ones, contiguous.
  Tensor merge(const Tensor& weight) const {
    const Tensor from = torch::stable::contiguous(weight);
    if (factor_ == 1) return from;
    const Tensor to = torch::stable::new_zeros(weight, merged_shape());
    const int64_t size = from.element_size();
    const char* source = static_cast<const char*>(from.data_ptr());
    char* target = static_cast<char*>(to.data_ptr());
    for_each_row([&](int64_t given, int64_t merged) {
      std::memcpy(target + merged * size, source + given * size, given_.taps * size);
    });
    return to;
  }

  // A tensor for the merged weight's gradient: `grad` itself, where nothing is merged.
  Tensor new_merged(const Tensor& grad) const {
    return factor_ == 1 ? grad : torch::stable::new_empty(grad, merged_shape());
  }

  // From a merged weight's gradient to that of the weight as given.
  void split(const Tensor& merged_grad, const Tensor& grad) const {
    if (factor_ == 1) return;
    const int64_t size = grad.element_size();
    const char* from = static_cast<const char*>(merged_grad.data_ptr());
    char* to = static_cast<char*>(grad.data_ptr());
    for_each_row([&](int64_t given, int64_t merged) {
      std::memcpy(to + given * size, from + merged * size, given_.taps * size);
    });
  }

 private:
  static int64_t factor_of(const Block& b) {
    for (int64_t factor = 1; factor < b.groups; ++factor)
      if (b.groups % factor == 0 && b.co / b.groups * factor % kCodeGroup == 0) return factor;
    return b.groups;
  }

  Ints merged_shape() const { return {given_.co, block.c / block.groups, given_.kh, given_.kw}; }

  // Where the taps of an output channel begin in the weight as given and in the merged one.
  template <class Visit>
  void for_each_row(const Visit& visit) const {
    const int64_t of_group = given_.co / given_.groups;
    for (int64_t c = 0; c < given_.co; ++c)
      visit(c * given_.taps, (c * factor_ + c / of_group % factor_) * given_.taps);
  }

  const Block given_;
  const int64_t factor_;
};

// ---- Forward

bool goes_by_planes(const Block& b, const Outputs& out) {
  const bool pointwise = b.kh * b.kw * b.sh * b.sw * b.groups == 1 && b.padded_h == b.h && b.padded_w == b.w;
  const bool planes =
      b.x_stride[3] == 1 && b.out_stride[3] == 1 && (b.h == 1 || (b.x_stride[2] == b.w && b.out_stride[2] == b.w));
  return pointwise && !b.pooled && planes && b.c <= kMostPlanes && b.dtype == kFloat32 && !out.codes && !out.kept;
}

bool goes_depthwise(const Block& b, const Outputs& out) {
  return b.groups == b.c && b.groups > 1 && !b.pooled && b.x_stride[3] == 1 && b.out_stride[3] == 1 &&
         b.dtype == kFloat32 && !out.codes && !out.kept && b.sw <= b.padded_w &&
         kernels().depthwise_scratch(b, 1) <= kDepthwiseFloats;
}

void forward_depthwise(const Block& b, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const Outputs& out) {
  const KernelTable& k = kernels();
  const Tensor w = torch::stable::contiguous(weight);
  AlignedFloats added(b.co);
  if (bias) {
    const Tensor flat = torch::stable::contiguous(*bias);
    std::copy_n(static_cast<const float*>(flat.data_ptr()), b.co, added.data());
  }
  const int64_t of_row = k.depthwise_scratch(b, 1), more = std::max<int64_t>(1, k.depthwise_scratch(b, 2) - of_row);
  const int64_t most = std::clamp<int64_t>(1 + (kItemFloats - of_row) / more, 1, b.oh), bands = ceil_div(b.oh, most);
  const int64_t rows = ceil_div(b.oh, bands), scratch = k.depthwise_scratch(b, rows);
  const int64_t channels = std::clamp<int64_t>(kItemWork / (rows * b.ow * b.taps), 1, b.co);
  const int64_t groups = ceil_div(b.co, channels);
  const float *from = static_cast<const float*>(x.data_ptr()), *taps = static_cast<const float*>(w.data_ptr());
  for_each_item(b.n * groups * bands, [&](int64_t item) {
    const int64_t image = item / bands / groups, c0 = item / bands % groups * channels, row0 = item % bands * rows;
    if (row0 < b.oh)
      k.depthwise(b, from, taps, added.data(), static_cast<float*>(out.data), image, c0, std::min(b.co, c0 + channels),
                  row0, std::min(b.oh, row0 + rows), thread_scratch(scratch));
  });
}

// Weight and bias as the kernels read them: per group, channels up to a whole number of vectors.
struct PackedWeight {
  AlignedFloats weight, bias;

  PackedWeight(const MergedGroups& groups, const Tensor& given, const std::optional<Tensor>& given_bias)
      : weight(groups.block.groups * padded_channels(groups.block) * groups.block.taps),
        bias(groups.block.groups * padded_channels(groups.block)) {
    const KernelTable& k = kernels();
    const Block& b = groups.block;
    const int64_t of_group = b.co / b.groups, padded = padded_channels(b);
    const Tensor w = groups.merge(given);
    const bool by_width = b.x_stride[3] == 1 || b.x_stride[1] != 1;
    const void* from = w.data_ptr();
    for_each_item(b.groups * ceil_div(padded, k.block_width),
                  [&](int64_t unit) { k.pack_weight(b, from, by_width, weight.data(), unit, unit + 1); });
    if (!given_bias) return;
    const Tensor flat = torch::stable::contiguous(*given_bias);
    for (int64_t c = 0; c < b.co; ++c)
      bias[c / of_group * padded + c % of_group] = k.to_float(flat.data_ptr(), c, b.dtype);
  }

  static int64_t padded_channels(const Block& b) { return kernels().packed_channels(b.co / b.groups); }
};

void forward_direct(const Block& given, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                    const Outputs& out) {
  check_offsets(given);
  if (goes_depthwise(given, out)) return forward_depthwise(given, x, weight, bias, out);
  const KernelTable& k = kernels();
  MergedGroups groups(given);
  groups.block.by_planes = goes_by_planes(groups.block, out);
  const Block& b = groups.block;
  const PackedWeight packed(groups, weight, bias);
  auto scratch_of = [&](int64_t rows) { return k.forward_scratch(b, 1, rows); };
  const int64_t rows = rows_per_item(b, scratch_of(1), scratch_of(2)), bands = ceil_div(b.out_h, rows);
  // Small images share a pass over the weights.
  const int64_t spare = kItemFloats / std::max<int64_t>(1, k.forward_scratch(b, 2, rows) - scratch_of(rows));
  const int64_t images = bands > 1 ? 1 : std::clamp<int64_t>(std::min(spare, b.n / wanted_items()), 1, 64);
  const int64_t scratch = k.forward_scratch(b, images, rows);
  const void* data = x.data_ptr();
  for_each_item(ceil_div(b.n, images) * bands, [&](int64_t item) {
    const int64_t n = item / bands * images, row0 = item % bands * rows;
    k.forward(b, data, packed.weight.data(), packed.bias.data(), out, n, std::min(images, b.n - n), row0,
              std::min(b.out_h, row0 + rows), thread_scratch(scratch));
  });
}

// ---- Backward

// Owns what a Patch points to.
struct PatchStorage {
  std::vector<int32_t> offset, tap;
  Patch patch;
};

// Taps in memory order are (kh, kw, c): runs of taps that lie side by side become whole vectors; the
// last vector of a run is moved back over the one before, and lanes it repeats are marked.
PatchStorage make_patch(const Block& b, int64_t lanes, bool may_gather) {
  PatchStorage s;
  const int64_t cg = b.c / b.groups, row = b.padded_w * b.c;
  const bool adjacent = b.dw == 1 && b.groups == 1;  // kw and c lie side by side
  const int64_t run = adjacent ? b.kw * cg : cg, runs = adjacent ? b.kh : b.kh * b.kw;
  const bool gathered = may_gather && adjacent && run % lanes != 0 && b.taps < 8 * lanes;
  const int64_t vectors_of_run = ceil_div(gathered ? b.taps : run, lanes);
  const int64_t count = gathered ? vectors_of_run : vectors_of_run * runs;
  s.tap.assign(count * lanes, -1);
  auto tap_of = [&](int64_t i) {  // position in (kh, kw, c) to position in the weight's (c, kh, kw)
    const int64_t c = i % cg, kw = i / cg % b.kw, kh = i / cg / b.kw;
    return static_cast<int32_t>((c * b.kh + kh) * b.kw + kw);
  };
  for (int64_t r = 0; r < (gathered ? 1 : runs); ++r)
    for (int64_t v = 0; v < vectors_of_run; ++v) {
      const int64_t length = gathered ? b.taps : run;
      const int64_t at = gathered || length < lanes ? v * lanes : std::min(v * lanes, length - lanes);
      const int64_t base = gathered ? 0 : adjacent ? r * b.dh * row : r / b.kw * b.dh * row + r % b.kw * b.dw * b.c;
      for (int64_t lane = v * lanes - at; lane < lanes && at + lane < length; ++lane)
        s.tap[(r * vectors_of_run + v) * lanes + lane] = tap_of(r * length + at + lane);
      s.offset.push_back(static_cast<int32_t>(base + at));
    }
  const int64_t patch = count * lanes;
  s.patch = {
      count,   s.offset.data(), s.tap.data(), gathered ? b.ow * patch : b.sh * row, gathered ? patch : b.sw * b.c,
      gathered};
  return s;
}

// Adds up the gradients of weight and bias, where there are tensors for them. Returns whether all images are finite:
// otherwise the weight's is not what sums over all positions give, where 0 * inf is NaN.
bool sum_weight(const Block& b, const PatchStorage& s, const ResultGrad& result, const Tensor& x,
                const std::optional<Tensor>& grad_weight, const std::optional<Tensor>& grad_bias) {
  const KernelTable& k = kernels();
  const int64_t patch = s.patch.vectors * k.vector, scratch = k.backward_weight_scratch(b, s.patch);
  // A fixed number of slices, each summed on its own and then added up in order: the same bits with
  // any number of threads.
  const int64_t per_slice = grad_weight ? b.co * patch : 0;
  const int64_t slices =
      std::min<int64_t>(b.n, std::clamp<int64_t>(kSliceFloats / std::max<int64_t>(per_slice, 1), 4, 32));
  AlignedFloats sums(slices * per_slice);
  std::vector<double> bias_sums(grad_bias ? slices * b.co : 0);
  std::atomic<bool> finite{true};
  for_each_item(slices, [&](int64_t slice) {
    float* sum = sums.data() + slice * per_slice;
    for (int64_t n = slice * b.n / slices; n < (slice + 1) * b.n / slices; ++n)
      if (!k.backward_weight(b, s.patch, x.data_ptr(), result.grad.data_ptr(), result.stride.data(),
                             codes_pointer(result.codes), n, grad_weight ? sum : nullptr,
                             grad_bias ? bias_sums.data() + slice * b.co : nullptr, thread_scratch(scratch)))
        finite = false;
  });
  for_each_item(b.co, [&](int64_t c) {
    auto put_total = [&](const auto& from, int64_t step, int64_t at, void* to, int64_t index) {
      double total = 0;
      for (int64_t slice = 0; slice < slices; ++slice) total += from[slice * step + at];
      k.from_float(static_cast<float>(total), to, index, b.dtype);
    };
    if (grad_bias) put_total(bias_sums, b.co, c, grad_bias->data_ptr(), c);
    if (!grad_weight) return;
    void* to = grad_weight->data_ptr();
    for (int64_t i = 0; i < patch; ++i)
      if (s.tap[i] >= 0) put_total(sums, per_slice, c * patch + i, to, c * b.taps + s.tap[i]);
  });
  return finite;
}

// Writes the gradient of the input. False, and nothing is written, where the weight is not finite: 0 * inf is NaN also
// where no gradient arrived.
bool put_grad_x(const MergedGroups& groups, const ResultGrad& result, const Tensor& weight, const Tensor& grad_x) {
  const KernelTable& k = kernels();
  const Block& b = groups.block;
  const PatchStorage s = make_patch(b, k.vector, false);
  const int64_t patch = s.patch.vectors * k.vector, scratch = k.backward_input_scratch(b, s.patch);
  const Tensor w = groups.merge(weight);
  AlignedFloats rows(b.co * patch);  // [tile][CO][taps of the tile]
  const int64_t tile = k.input_tile(b) * k.vector;
  for (int64_t t = 0; t < patch; t += tile) {
    const int64_t width = std::min(tile, patch - t);
    for (int64_t c = 0; c < b.co; ++c)
      for (int64_t i = 0; i < width; ++i)
        if (s.tap[t + i] >= 0)
          rows[t * b.co + c * width + i] = k.to_float(w.data_ptr(), c * b.taps + s.tap[t + i], b.dtype);
  }
  if (!k.all_finite(rows.data(), b.co * patch)) return false;
  const int64_t stride[4] = {grad_x.stride(0), grad_x.stride(1), grad_x.stride(2), grad_x.stride(3)};
  for_each_item(b.n, [&](int64_t n) {
    k.backward_input(b, s.patch, rows.data(), result.grad.data_ptr(), result.stride.data(), codes_pointer(result.codes),
                     n, grad_x.data_ptr(), stride, thread_scratch(scratch));
  });
  return true;
}

// Writes the gradients for which there are tensors.
void backward_direct(const BlockDescription& description, const ResultGrad& result, const Tensor& x,
                     const Tensor& weight, const std::optional<Tensor>& grad_x,
                     const std::optional<Tensor>& grad_weight, const std::optional<Tensor>& grad_bias) {
  auto by_library = [&](Needs need) { return *chunked_plan().block_backward(description, result, x, weight, need); };
  const MergedGroups groups(description.block);
  if (grad_weight || grad_bias) {
    const PatchStorage s = make_patch(groups.block, kernels().vector, true);
    std::optional<Tensor> merged;
    if (grad_weight) merged = groups.new_merged(*grad_weight);
    const bool finite = sum_weight(groups.block, s, result, x, merged, grad_bias);
    if (grad_weight && finite) groups.split(*merged, *grad_weight);
    if (grad_weight && !finite) {
      Tensor to = *grad_weight;
      torch::stable::copy_(to, by_library({false, true, false}).weight);
    }
  }
  if (grad_x && !put_grad_x(groups, result, weight, *grad_x)) {
    Tensor to = *grad_x;
    torch::stable::copy_(to, by_library({true, false, false}).x);
  }
}

// ---- The plan

class DirectForward : public ConvForward {
 public:
  DirectForward(const Convolution& convolution, NewTensor new_map) : convolution_(convolution), new_map_(new_map) {}

  Tensor map_of(const Tensor& x) const override {
    const auto& [conv, weight, bias] = convolution_;
    const Block b = describe_convolution(x, weight, conv).block;
    const Tensor map = new_map_(x, map_shape(b, b.n), x.scalar_type());
    forward_direct(b, x, weight, bias, {map.data_ptr(), nullptr, nullptr});
    return map;
  }

 private:
  const Convolution convolution_;
  const NewTensor new_map_;
};

class DirectBackward : public ConvBackward {
 public:
  using ConvBackward::ConvBackward;

 private:
  void add_images(const Tensor& x, const Tensor& grad_map, int64_t n0) override {
    std::optional<Tensor> to_x, to_weight;
    if (need_.x) to_x = grad_x(n0, x.size(0));
    if (need_.weight) to_weight = new_grad_weight();
    const BlockDescription description = describe_convolution(x, weight_, conv_);
    const Tensor codes = no_elements(x_);
    backward_direct(description, {grad_map, strides_by_axis(grad_map, description.order), codes}, x, weight_, to_x,
                    to_weight, std::nullopt);
    if (need_.weight) weight_sum_.add(*to_weight);
  }
};

class DirectPlan : public ConvPlan {
 public:
  const char* name() const override { return "direct"; }

  std::unique_ptr<ConvForward> conv_forward(const Convolution& convolution, NewTensor new_map) const override {
    return std::make_unique<DirectForward>(convolution, new_map);
  }

  std::unique_ptr<ConvBackward> conv_backward(const Ints& conv, const Tensor& x, const Tensor& weight,
                                              Needs need) const override {
    return std::make_unique<DirectBackward>(conv, x, weight, need);
  }

  bool block_forward(const BlockDescription& description, const Tensor& x, const Convolution& convolution,
                     const Outputs& out) const override {
    forward_direct(description.block, x, convolution.weight, convolution.bias, out);
    return true;
  }

  std::optional<ConvolutionGrads> block_backward(const BlockDescription& description, const ResultGrad& result,
                                                 const Tensor& x, const Tensor& weight, Needs need) const override {
    const Block& b = description.block;
    if (b.coded) check_code_positions(b, codes_pointer(result.codes));  // the kernels read and write there
    std::optional<Tensor> grad_x, grad_weight, grad_bias;
    if (need.x) grad_x = new_like_input(x);
    if (need.weight) grad_weight = torch::stable::new_empty(x, sizes(weight));
    if (need.bias) grad_bias = torch::stable::new_empty(x, Ints{b.co});
    backward_direct(description, result, x, weight, grad_x, grad_weight, grad_bias);
    auto or_nothing = [&](const std::optional<Tensor>& t) { return t ? *t : no_elements(x); };
    return ConvolutionGrads{or_nothing(grad_x), or_nothing(grad_weight), or_nothing(grad_bias)};
  }
};

}  // namespace

const ConvPlan& direct_plan() {
  static const DirectPlan plan;
  return plan;
}

}  // namespace cnnlstm_fast
