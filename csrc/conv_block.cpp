// cnnlstm_fast::conv_block and its backward on the CPU: checks, allocation, threads. The schema and
// the meaning of every argument stand in cnnlstm_fast/ops/conv_block.py, the arithmetic in cpu/.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/dispatch.h"
#include "library_limits.h"
#include "limits.h"
#include "memory.h"
#include "op.h"
#include "threads.h"
#include "winograd_conv.h"

namespace cnnlstm_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;

enum Plan : int64_t { kDirect = 1, kChunked = 2, kWinograd = 3, kFFT = 4 };

// Convolution maps of one chunk: what two cores' second-level caches hold beside weights and input.
const int64_t kChunkBytes = limit("CHUNK_BYTES", int64_t{2} << 20, 1);
// And so many times the weights.
const int64_t kChunkWeights = limit("CHUNK_WEIGHTS", 8, 0);
constexpr int64_t kMaxScratchFloats = int64_t{1} << 30;

// ---- Calls of PyTorch's own operators

// Padding that follows the input alone: what padding="same" adds for an even kernel. The library has no words for it.
Tensor pad_after(const Tensor& x, const Ints& conv) {
  if (conv.size() == 7) return x;
  const Ints sides{0, conv[8], 0, conv[7]};
  return torch::stable::pad(x, sides);
}

Ints sizes(const Tensor& t) {
  Ints found(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) found[i] = t.size(i);
  return found;
}

Tensor channels_last(const Tensor& t) {
  return torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

// (n, h, w, c) seen as (n, c, h, w).
Tensor seen_channels_first(const Tensor& raw) {
  return torch::stable::transpose(torch::stable::transpose(const_cast<Tensor&>(raw), 2, 3), 1, 2);
}

// Whether x is dense with its channels fastest, and not contiguous as well.
bool lies_channels_last(const Tensor& x) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  return !x.is_contiguous() && x.stride(1) == 1 && x.stride(3) == c && x.stride(2) == w * c && x.stride(0) == h * w * c;
}

// With its usual strides. The library takes a weight for channels-last whatever the stride of a dimension of size 1,
// and then computes grouped convolutions wrongly and refuses to give gradients.
Tensor canonical_strides(const Tensor& weight) {
  return weight.is_contiguous() || lies_channels_last(weight) ? weight : torch::stable::contiguous(weight);
}

// Contiguous, and with the strides of that where a size of 1 would allow others.
Tensor contiguous_strict(const Tensor& t) {
  return torch::stable::view(torch::stable::contiguous(t), sizes(t));
}

Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// The map, channels-last; most convolutions are fastest on such inputs.
Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Ints& conv,
                   int64_t out_width) {
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
  return channels_last(as_dtype(torch::stable::detail::to<Tensor>(stack[0]), dtype));
}

struct ConvolutionGrads {
  Tensor x, weight, bias;
};

// `map` is the gradient of the map, (n, co, oh, ow).
ConvolutionGrads convolution_backward(const Tensor& map, const Tensor& part, const Tensor& weight, const Ints& conv,
                                      bool need_x, bool need_weight) {
  using torch::stable::detail::from;
  const LibraryLimits limits = library_limits(part, weight, conv, map.size(3));
  const bool as_is = limits.contiguous_grad;
  const ScalarType dtype = part.scalar_type(), inner = limits.as_float ? ScalarType::Float : dtype;
  const Tensor grad = as_dtype(as_is ? contiguous_strict(map) : map, inner);
  const Tensor input = as_dtype(as_is ? contiguous_strict(part) : channels_last(part), inner),
               x = pad_after(input, conv);
  const Tensor w = as_dtype(as_is ? contiguous_strict(weight) : canonical_strides(weight), inner);
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

// The map by Fourier transforms (cnnlstm_fast/ops/conv_fft.py), written into (n, oh, ow, co), contiguous.
void convolution_fft(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Ints& conv,
                     const Tensor& map) {
  using torch::stable::detail::from;
  StableIValue stack[5] = {from(x), from(weight), from(bias), from(conv), from(map)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("cnnlstm_fast::conv_fft", "", stack, TORCH_ABI_VERSION));
}

// The gradients of its input and weight, written where there are tensors for them; `grad` lies as the map.
void convolution_fft_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Ints& conv,
                              const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_weight) {
  using torch::stable::detail::from;
  StableIValue stack[6] = {from(grad), from(x), from(weight), from(conv), from(grad_x), from(grad_weight)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("cnnlstm_fast::conv_fft_backward", "", stack, TORCH_ABI_VERSION));
}

// ---- Description of a call

int64_t out_length(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil) {
  const int64_t span = size + 2 * padding - dilation * (kernel - 1) - 1;
  if (span < 0 && !(ceil && span + stride - 1 >= 0)) return 0;
  int64_t length = (span + (ceil ? stride - 1 : 0)) / stride + 1;
  if (ceil && (length - 1) * stride >= size + padding) --length;
  return length;
}

// Whether every window along one axis meets at least one element. Those that begin inside do, so only the
// first ones and the last are looked at.
bool windows_meet(int64_t size, int64_t windows, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  for (int64_t i = 0; i < windows && i * stride < padding; ++i) {
    const int64_t start = i * stride - padding, skipped = ceil_div(-start, dilation);
    if (skipped >= kernel || start + skipped * dilation >= size) return false;
  }
  return (windows - 1) * stride - padding < size;
}

struct Call {
  Block block;
  Ints conv, order;
  bool keeps_slopes;  // whether a backward of such a block reads slopes of its activation
};

Call describe(const Tensor& x, const Tensor& weight, const Ints& conv, int64_t activation, const Floats& act,
              const Ints& pool, const Ints& order) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, "conv_block: expected a 4-d input and weight, got ", x.dim(),
                  "-d and ", weight.dim(), "-d");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "conv_block: the kernels compute float32 and bfloat16 only");
  STD_TORCH_CHECK(weight.scalar_type() == dtype, "conv_block: input and weight differ in dtype");
  STD_TORCH_CHECK(weight.is_cpu(), "conv_block: input and weight are on different devices");
  elements("an input", x);
  elements("a weight", weight);
  STD_TORCH_CHECK(
      conv.size() == 7 || conv.size() == 9,
      "conv_block: conv must be [stride, padding, dilation (h, w each), groups, more padding after (h, w)]");
  STD_TORCH_CHECK(pool.empty() || pool.size() == 9, "conv_block: pool must be empty or have 9 values, got ",
                  pool.size());
  STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "conv_block: unknown activation ", activation);
  const size_t numbers = activation == kHardtanh ? 2 : activation == kLeakyReLU || activation == kELU ? 1 : 0;
  STD_TORCH_CHECK(act.size() == numbers, "conv_block: activation ", activation, " has ", numbers, " numbers, got ",
                  act.size());
  Ints sorted = order;
  std::sort(sorted.begin(), sorted.end());
  STD_TORCH_CHECK((sorted == Ints{0, 1, 2, 3}), "conv_block: order must be a permutation of 0, 1, 2, 3");

  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  for (size_t i = 0; i < conv.size(); ++i) {
    const int64_t least = i == 2 || i == 3 || i > 6 ? 0 : 1;
    STD_TORCH_CHECK(conv[i] >= least && conv[i] <= kMax, "conv_block: conv[", i, "] = ", conv[i], " is out of range");
  }
  for (size_t i = 0; i < pool.size(); ++i) {
    const int64_t least = i == 4 || i == 5 || i == 8 ? 0 : 1;
    STD_TORCH_CHECK(pool[i] >= least && pool[i] <= kMax, "conv_block: pool[", i, "] = ", pool[i], " is out of range");
  }

  Block b{};
  b.n = x.size(0), b.c = x.size(1), b.h = x.size(2), b.w = x.size(3);
  b.co = weight.size(0), b.kh = weight.size(2), b.kw = weight.size(3);
  b.sh = conv[0], b.sw = conv[1], b.ph = conv[2], b.pw = conv[3], b.dh = conv[4], b.dw = conv[5];
  b.groups = conv[6];
  STD_TORCH_CHECK(b.c >= 1 && b.co >= 1 && b.kh >= 1 && b.kw >= 1 && b.co % b.groups == 0 && b.c % b.groups == 0 &&
                      weight.size(1) == b.c / b.groups,
                  "conv_block: an input of ", b.c, " channels does not fit a weight (", b.co, ", ", weight.size(1),
                  ", ", b.kh, ", ", b.kw, ") with groups=", b.groups);
  const int64_t after_h = conv.size() > 7 ? conv[7] : 0, after_w = conv.size() > 7 ? conv[8] : 0;
  b.oh = out_length(b.h + after_h, b.kh, b.sh, b.ph, b.dh, false);
  b.ow = out_length(b.w + after_w, b.kw, b.sw, b.pw, b.dw, false);
  STD_TORCH_CHECK(b.h >= 1 && b.w >= 1 && b.oh >= 1 && b.ow >= 1, "conv_block: an input of ", b.h, "x", b.w,
                  " is too small for the kernel");
  elements("a map", {b.n, b.co, b.oh, b.ow});
  elements("an input with its padding", {b.c, b.h + 2 * b.ph + after_h, b.w + 2 * b.pw + after_w});
  const Ints p = pool.empty() ? Ints{1, 1, 1, 1, 0, 0, 1, 1, 0} : pool;
  b.pool_kh = p[0], b.pool_kw = p[1], b.pool_sh = p[2], b.pool_sw = p[3], b.pool_ph = p[4], b.pool_pw = p[5];
  b.pool_dh = p[6], b.pool_dw = p[7];
  STD_TORCH_CHECK(b.pool_kh <= kByteWindow && b.pool_kw <= kByteWindow && b.pool_kh * b.pool_kw <= kByteWindow,
                  "conv_block: a pool window of ", b.pool_kh, "x", b.pool_kw, " has more than ", kByteWindow,
                  " elements");
  STD_TORCH_CHECK(b.pool_ph <= b.pool_kh / 2 && b.pool_pw <= b.pool_kw / 2,
                  "conv_block: pool padding is more than half the kernel");
  b.out_h = out_length(b.oh, b.pool_kh, b.pool_sh, b.pool_ph, b.pool_dh, p[8]);
  b.out_w = out_length(b.ow, b.pool_kw, b.pool_sw, b.pool_pw, b.pool_dw, p[8]);
  STD_TORCH_CHECK(b.out_h >= 1 && b.out_w >= 1, "conv_block: a map of ", b.oh, "x", b.ow, " is too small for the pool");
  STD_TORCH_CHECK(windows_meet(b.oh, b.out_h, b.pool_kh, b.pool_sh, b.pool_ph, b.pool_dh) &&
                      windows_meet(b.ow, b.out_w, b.pool_kw, b.pool_sw, b.pool_pw, b.pool_dw),
                  "conv_block: a pool window meets no element of the map");
  b.activation = static_cast<int32_t>(activation);
  for (size_t i = 0; i < numbers; ++i) b.act[i] = static_cast<float>(act[i]);
  b.dtype = dtype == ScalarType::Float ? kFloat32 : kBFloat16;
  for (int i = 0; i < 4; ++i) b.x_stride[i] = x.stride(i);
  b.code_bytes = b.pool_kh * b.pool_kw <= kNibbleWindow ? kCodeGroup / 2 : kCodeGroup;
  b.code_groups = ceil_div(b.co, kCodeGroup);
  b.padded_h = b.h + 2 * b.ph + after_h, b.padded_w = b.w + 2 * b.pw + after_w;
  b.taps = b.c / b.groups * b.kh * b.kw;

  const int64_t size[4] = {b.n, b.co, b.out_h, b.out_w};
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    b.out_stride[order[i]] = stride;
    stride *= size[order[i]];
  }
  const bool curved = activation > kHardtanh;
  b.pooled = !pool.empty();
  b.coded = b.pooled || (activation != kNone && !curved);
  return {b, conv, order, curved};
}

// The convolution alone, its map channels-last.
Call describe_convolution(const Tensor& x, const Tensor& weight, const Ints& conv) {
  return describe(x, weight, conv, kNone, {}, {}, Ints{0, 2, 3, 1});
}

Ints in_order(const Block& b, const Ints& order) {
  const int64_t size[4] = {b.n, b.co, b.out_h, b.out_w};
  return {size[order[0]], size[order[1]], size[order[2]], size[order[3]]};
}

Ints codes_size(const Block& b) {
  return {b.n, b.out_h, b.out_w, b.code_groups, b.code_bytes};
}

// Codes name places, and may not be the forward's (a hook on saved tensors can change them): none may lie
// outside the map, where the direct plan would read and write. Only windows at the edge have such places.
void check_codes(const Block& b, const uint8_t* codes) {
  const int64_t window = b.pool_kh * b.pool_kw, stopped = b.code_bytes == kCodeGroup ? 255 : 15;
  auto inside = [](int64_t at, int64_t size) { return at >= 0 && at < size; };
  for (int64_t row = 0; row < b.out_h; ++row)
    for (int64_t col = 0; col < b.out_w; ++col) {
      const int64_t h0 = row * b.pool_sh - b.pool_ph, w0 = col * b.pool_sw - b.pool_pw;
      if (inside(h0, b.oh) && inside(w0, b.ow) && inside(h0 + (b.pool_kh - 1) * b.pool_dh, b.oh) &&
          inside(w0 + (b.pool_kw - 1) * b.pool_dw, b.ow))
        continue;
      bool allowed[256] = {};
      allowed[stopped] = true;
      for (int64_t e = 0; e < window; ++e)
        allowed[e] = inside(h0 + e / b.pool_kw * b.pool_dh, b.oh) && inside(w0 + e % b.pool_kw * b.pool_dw, b.ow);
      for (int64_t n = 0; n < b.n; ++n) {
        const uint8_t* group = codes + ((n * b.out_h + row) * b.out_w + col) * b.code_groups * b.code_bytes;
        for (int64_t c = 0; c < b.co; ++c) {
          const int64_t lane = c % kCodeGroup, byte = c / kCodeGroup * b.code_bytes + lane % b.code_bytes;
          const int64_t code = b.code_bytes == kCodeGroup ? group[byte]
                               : lane < 8                 ? group[byte] & 15
                                                          : group[byte] >> 4;
          STD_TORCH_CHECK(allowed[code], "conv_block_backward: the code of channel ", c, " at ", row, ", ", col,
                          " of image ", n, " is ", code, ", which names no position of the map");
        }
      }
    }
}

void check_direct(const Block& b) {
  STD_TORCH_CHECK(b.padded_h <= kMaxScratchFloats / b.padded_w &&
                      b.padded_h * b.padded_w <= kMaxScratchFloats / b.c / 2 &&
                      b.oh * b.ow <= kMaxScratchFloats / std::max<int64_t>(b.taps, 64) / 2,
                  "conv_block: one image is too large for the direct plan");
}

// How many groups the direct plan computes as one, with zeros between them: its blocks of channels
// begin at multiples of 16, so groups that end elsewhere are joined until they do.
int64_t joined_groups(const Block& b) {
  for (int64_t joined = 1; joined < b.groups; ++joined)
    if (b.groups % joined == 0 && b.co / b.groups * joined % kCodeGroup == 0) return joined;
  return b.groups;
}

// The block whose groups are joined.
Block join_groups(Block b, int64_t joined) {
  b.groups /= joined;
  b.taps *= joined;
  return b;
}

// Copies weights (co, c / groups, kh, kw) into or out of the joined groups' (co, joined * c / groups, kh, kw).
template <class Copy>
void for_each_joined_row(const Block& b, int64_t joined, const Copy& copy) {
  const int64_t og = b.co / b.groups;
  for (int64_t c = 0; c < b.co; ++c) copy(c * b.taps, (c * joined + c / og % joined) * b.taps);
}

Tensor join_weight(const Block& b, const Tensor& weight, int64_t joined) {
  const Tensor from = torch::stable::contiguous(weight);
  if (joined == 1) return from;
  const Tensor to = torch::stable::new_zeros(weight, Ints{b.co, joined * b.c / b.groups, b.kh, b.kw});
  const int64_t size = from.element_size();
  const char* source = static_cast<const char*>(from.data_ptr());
  char* target = static_cast<char*>(to.data_ptr());
  for_each_joined_row(b, joined, [&](int64_t apart, int64_t together) {
    std::memcpy(target + together * size, source + apart * size, b.taps * size);
  });
  return to;
}

// A gradient of the input: channels-last where that is how the input lies, as the library has it, else contiguous.
Tensor new_like_input(const Tensor& x) {
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  if (!lies_channels_last(x)) return new_output(x, Ints{n, c, h, w}, x.scalar_type());
  const Tensor raw = new_output(x, Ints{n, h, w, c}, x.scalar_type());
  return seen_channels_first(raw);
}

// Scratch of one item: what a second-level cache holds beside the weights.
const int64_t kItemFloats = limit("ITEM_FLOATS", 96 * 1024, 1);
// Rows of a depthwise convolution that need more are too long for it.
constexpr int64_t kDepthwiseFloats = 96 * 1024;

// Pooled rows per item: enough items for every thread, scratch that stays in cache.
int64_t rows_per_item(const Block& b, int64_t scratch_of_row, int64_t scratch_of_two) {
  const int64_t per_row = std::max<int64_t>(1, scratch_of_two - scratch_of_row);
  int64_t rows = std::max<int64_t>(1, 1 + (kItemFloats - scratch_of_row) / per_row);
  const int64_t wanted = wanted_items();
  if (b.n < wanted) rows = std::min(rows, ceil_div(b.out_h, ceil_div(wanted, b.n)));
  rows = std::min(rows, b.out_h);
  return ceil_div(b.out_h, ceil_div(b.out_h, rows));
}

uint8_t* codes_pointer(const Tensor& codes) {
  return codes.numel() ? static_cast<uint8_t*>(codes.data_ptr()) : nullptr;
}

// ---- Forward

// Channels whose places fit the scratch of an item.
constexpr int64_t kMostPlanes = 1536;

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

// Multiply-adds that are worth an item.
const int64_t kItemWork = limit("ITEM_WORK", 1 << 16, 1);

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

void forward_direct(const Call& call, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                    const Outputs& out) {
  check_direct(call.block);
  if (goes_depthwise(call.block, out)) return forward_depthwise(call.block, x, weight, bias, out);
  const int64_t joined = joined_groups(call.block);
  Block b = join_groups(call.block, joined);
  check_direct(b);
  b.by_planes = goes_by_planes(b, out);
  const KernelTable& k = kernels();
  const int64_t og = b.co / b.groups, padded = k.packed_channels(og);
  AlignedFloats packed(b.groups * padded * b.taps), packed_bias(b.groups * padded);
  const Tensor w = join_weight(call.block, weight, joined);
  const bool by_width = b.x_stride[3] == 1 || b.x_stride[1] != 1;
  const void* weight_data = w.data_ptr();
  for_each_item(b.groups * ceil_div(padded, k.block_width),
                [&](int64_t unit) { k.pack_weight(b, weight_data, by_width, packed.data(), unit, unit + 1); });
  if (bias) {
    const Tensor flat = torch::stable::contiguous(*bias);
    for (int64_t c = 0; c < b.co; ++c) packed_bias[c / og * padded + c % og] = k.to_float(flat.data_ptr(), c, b.dtype);
  }
  auto scratch_of = [&](int64_t rows) { return k.forward_scratch(b, 1, rows); };
  const int64_t rows = rows_per_item(b, scratch_of(1), scratch_of(2)), bands = ceil_div(b.out_h, rows);
  // Small images share a pass over the weights.
  const int64_t spare = kItemFloats / std::max<int64_t>(1, k.forward_scratch(b, 2, rows) - scratch_of(rows));
  const int64_t images = bands > 1 ? 1 : std::clamp<int64_t>(std::min(spare, b.n / wanted_items()), 1, 64);
  const int64_t scratch = k.forward_scratch(b, images, rows);
  const void* data = x.data_ptr();
  for_each_item(ceil_div(b.n, images) * bands, [&](int64_t item) {
    const int64_t n = item / bands * images, row0 = item % bands * rows;
    k.forward(b, data, packed.data(), packed_bias.data(), out, n, std::min(images, b.n - n), row0,
              std::min(b.out_h, row0 + rows), thread_scratch(scratch));
  });
}

// Large weights want large chunks: every chunk reads them, and its backward writes them. Fourier transforms cut
// their work themselves.
int64_t images_per_chunk(const Block& b, int64_t plan) {
  if (plan == kFFT) return b.n;
  const int64_t size = b.dtype == kFloat32 ? 4 : 2;
  const int64_t bytes = std::max(kChunkBytes, kChunkWeights * b.co * b.taps * size);
  return std::clamp<int64_t>(bytes / (b.oh * b.ow * b.co * size), 1, b.n);
}

// Maps of a convolution for some images after others, (images, oh, ow, co) contiguous.
class ConvForward {
 public:
  // `make` is new_output for maps that an op returns.
  ConvForward(const Ints& conv, int64_t plan, const Tensor& weight, const std::optional<Tensor>& bias,
              decltype(&new_temporary) make = new_temporary)
      : conv_(conv), plan_(plan), weight_(weight), bias_(bias), make_(make) {
    if (plan == kWinograd) winograd_.emplace(weight, false);
  }

  Tensor of(const Tensor& x) const {
    const Call call = describe_convolution(x, weight_, conv_);
    const Block& b = call.block;
    if (plan_ != kChunked) {
      const Tensor map = make_(x, in_order(b, call.order), x.scalar_type());
      if (plan_ == kDirect) {
        forward_direct(call, x, weight_, bias_, {map.data_ptr(), nullptr, nullptr});
        return map;
      }
      if (plan_ == kFFT) {
        convolution_fft(x, weight_, bias_, conv_, map);
        return map;
      }
      if (winograd_->run(x, b.ph, b.pw, b.oh, b.ow, bias_, static_cast<float*>(map.data_ptr()))) return map;
    }
    const Tensor map = convolution(x, weight_, bias_, conv_, b.ow);
    return torch::stable::transpose(torch::stable::transpose(map, 1, 2), 2, 3);
  }

 private:
  const Ints& conv_;
  const int64_t plan_;
  const Tensor weight_;
  const std::optional<Tensor> bias_;
  decltype(&new_temporary) make_;
  std::optional<WinogradConvolution> winograd_;
};

// Where the results of the images from n0 on go.
Outputs from_image(const Block& b, const Outputs& out, int64_t n0) {
  const int64_t floats = n0 * b.out_stride[0], codes = n0 * b.out_h * b.out_w * b.code_groups * b.code_bytes;
  return {static_cast<float*>(out.data) + floats, out.codes ? out.codes + codes : nullptr,
          out.kept ? static_cast<float*>(out.kept) + floats : nullptr};
}

// Whether all of it is finite; otherwise it is not what the block gives.
bool forward_winograd(const Call& call, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      const Outputs& out) {
  const Block& b = call.block;
  const WinogradConvolution convolution(weight, false);
  // An input that lies otherwise is laid out in chunks that stay in cache.
  const int64_t chunk = x.stride(1) == 1 ? b.n : images_per_chunk(b, kWinograd);
  for (int64_t n0 = 0; n0 < b.n; n0 += chunk) {
    const Tensor part = torch::stable::narrow(const_cast<Tensor&>(x), 0, n0, std::min(chunk, b.n - n0));
    if (!convolution.run(b, part, bias, from_image(b, out, n0))) return false;
  }
  return true;
}

// Maps by the library or by Fourier transforms, and what finishes them.
void forward_chunked(const Call& call, int64_t plan, const Tensor& x, const Tensor& weight,
                     const std::optional<Tensor>& bias, const Outputs& out) {
  const Block& b = call.block;
  const KernelTable& k = kernels();
  const ConvForward maps(call.conv, plan, weight, bias);
  const int64_t chunk = images_per_chunk(b, plan);
  for (int64_t n0 = 0; n0 < b.n; n0 += chunk) {
    const int64_t count = std::min(chunk, b.n - n0);
    const Tensor map = maps.of(torch::stable::narrow(const_cast<Tensor&>(x), 0, n0, count));
    const int64_t rows = rows_per_item(b, k.epilogue_scratch(b, 1), k.epilogue_scratch(b, 2));
    const int64_t bands = ceil_div(b.out_h, rows), scratch = k.epilogue_scratch(b, rows);
    const char* data = static_cast<const char*>(map.data_ptr());
    for_each_item(count * bands, [&](int64_t item) {
      const int64_t i = item / bands, row0 = item % bands * rows;
      const int64_t image_bytes = b.oh * b.ow * b.co * map.element_size();
      k.epilogue(b, {data + i * image_bytes, b.ow * b.co, b.co, b.dtype, nullptr, nullptr}, out, n0 + i, row0,
                 std::min(b.out_h, row0 + rows), thread_scratch(scratch));
    });
  }
}

// The plan for these values of the weight; may be called for those that `plan` takes.
int64_t plan_for(int64_t plan, const Tensor& weight) {
  return plan == kWinograd && !winograd_suits(weight) ? kChunked : plan;
}

void check_plan(int64_t plan, const Block& b) {
  STD_TORCH_CHECK(plan >= kDirect && plan <= kFFT, "conv_block: unknown plan ", plan);
  STD_TORCH_CHECK(plan != kWinograd || (b.dtype == kFloat32 && b.kh == 3 && b.kw == 3 && b.sh == 1 && b.sw == 1 &&
                                        b.dh == 1 && b.dw == 1 && b.groups == 1),
                  "conv_block: the plan winograd takes float32 and 3x3 taps with stride 1 only");
  STD_TORCH_CHECK(plan != kFFT || (b.dtype == kFloat32 && b.dh == 1 && b.dw == 1 && b.groups == 1),
                  "conv_block: the plan fft takes float32 without dilation and groups only");
}

std::tuple<Tensor, Tensor, Tensor> conv_block(Tensor x, Tensor weight, std::optional<Tensor> bias, Ints conv,
                                              int64_t activation, Floats act, Ints pool, Ints order, int64_t plan,
                                              bool keep) {
  const Call call = describe(x, weight, conv, activation, act, pool, order);
  const Block& b = call.block;
  if (bias)
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == b.co && bias->scalar_type() == x.scalar_type() && bias->is_cpu(),
        "conv_block: expected a bias of shape (", b.co, ",) in the input's dtype, on its device");
  check_plan(plan, b);
  plan = plan_for(plan, weight);
  const Tensor out = new_output(x, in_order(b, order), x.scalar_type());
  const Tensor codes = new_output(x, keep && b.coded ? codes_size(b) : Ints{0}, ScalarType::Byte);
  const Tensor slopes = new_output(x, keep && call.keeps_slopes ? in_order(b, order) : Ints{0}, x.scalar_type());
  if (b.n > 0) {
    const Outputs outputs{out.data_ptr(), codes_pointer(codes), slopes.numel() ? slopes.data_ptr() : nullptr};
    if (plan == kDirect)
      forward_direct(call, x, weight, bias, outputs);
    else if (plan != kWinograd)
      forward_chunked(call, plan, x, weight, bias, outputs);
    else if (!forward_winograd(call, x, weight, bias, outputs))
      forward_chunked(call, kChunked, x, weight, bias, outputs);
  }
  return {out, codes, slopes};
}

// ---- Backward

// Sums of all slices of a weight's gradient.
const int64_t kSliceFloats = limit("SLICE_FLOATS", int64_t{4} << 20, 1);
const int64_t kPositionsPerSum = limit("POSITIONS_PER_SUM", 2048, 1);

// Pooled rows [row0, row1) of each of `images` images, whose gradients go to rows of the map of their own: bands for
// every thread where windows of two rows never meet.
template <class Visit>
void for_each_band(const Block& b, int64_t images, const Visit& visit) {
  const bool apart = (b.pool_kh - 1) * b.pool_dh < b.pool_sh;
  const int64_t bands = apart ? std::clamp<int64_t>(ceil_div(wanted_items(), images), 1, b.out_h) : 1;
  for_each_item(images * bands, [&](int64_t item) {
    const int64_t band = item % bands;
    visit(item / bands, band * b.out_h / bands, (band + 1) * b.out_h / bands);
  });
}

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
  const bool joined = b.dw == 1 && b.groups == 1;  // kw and c lie side by side
  const int64_t run = joined ? b.kw * cg : cg, runs = joined ? b.kh : b.kh * b.kw;
  const bool gathered = may_gather && joined && run % lanes != 0 && b.taps < 8 * lanes;
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
      const int64_t base = gathered ? 0 : joined ? r * b.dh * row : r / b.kw * b.dh * row + r % b.kw * b.dw * b.c;
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

void backward_direct(const Call& call, const Tensor& grad, const Ints& grad_stride, const Tensor& x,
                     const Tensor& weight, const Tensor& codes, const std::optional<Tensor>& grad_x,
                     const std::optional<Tensor>& grad_weight, const std::optional<Tensor>& grad_bias);

// The gradients of a convolution from those of its map, which come for some images after others.
class ConvBackward {
 public:
  ConvBackward(const Ints& conv, int64_t plan, const Tensor& x, const Tensor& weight, bool need_x, bool need_weight,
               bool need_bias)
      : conv_(conv), plan_(plan), x_(x), weight_(weight), need_{need_x, need_weight, need_bias} {
    if (plan != kWinograd) return;
    if (need_x) winograd_x_.emplace(weight, true);
    if (need_weight) winograd_weight_.emplace(weight);
  }

  // The map's gradient (images, oh, ow, co), contiguous, of the images from n0 on.
  void add(const Tensor& raw, int64_t n0) {
    const int64_t count = raw.size(0);
    const bool all = count == x_.size(0);
    const Tensor part = torch::stable::narrow(const_cast<Tensor&>(x_), 0, n0, count);
    if (need_[0] && !grad_x_ && (!all || plan_ != kChunked)) grad_x_ = new_like_input(x_);
    if (need_[2]) add_bias(raw);
    if (plan_ == kWinograd) return add_winograd(part, raw, n0);
    if (plan_ == kFFT) return add_fft(part, raw, n0);
    if (plan_ == kDirect) {
      std::optional<Tensor> to_x, to_weight;
      if (need_[0]) to_x = torch::stable::narrow(*grad_x_, 0, n0, count);
      if (need_[1]) to_weight = torch::stable::new_empty(weight_, sizes(weight_));
      backward_direct(describe_convolution(part, weight_, conv_), raw,
                      Ints{raw.stride(0), 1, raw.stride(1), raw.stride(2)}, part, weight_,
                      torch::stable::new_empty(x_, Ints{0}), to_x, to_weight, std::nullopt);
      if (need_[1]) weight_sum_.add(*to_weight);
      return;
    }
    const ConvolutionGrads found =
        convolution_backward(seen_channels_first(raw), part, weight_, conv_, need_[0], need_[1]);
    if (need_[0] && all) {
      grad_x_ = lies_channels_last(x_) ? channels_last(found.x) : torch::stable::contiguous(found.x);
    } else if (need_[0]) {
      Tensor to = torch::stable::narrow(*grad_x_, 0, n0, count);
      torch::stable::copy_(to, found.x);
    }
    if (need_[1]) weight_sum_.add(found.weight);
  }

  // No element where none was asked for. None at all if sums by Winograd are not finite, and the library is to say
  // where.
  std::optional<ConvolutionGrads> result() {
    if (winograd_weight_) {
      const Tensor to = torch::stable::new_empty(weight_, sizes(weight_));
      if (!winograd_weight_->result(static_cast<float*>(to.data_ptr()))) finite_ = false;
      weight_sum_.add(to);
    }
    if (!finite_) return std::nullopt;
    auto nothing = [&] { return torch::stable::new_empty(x_, Ints{0}); };
    const Tensor bias = need_[2] ? torch::stable::new_empty(weight_, Ints{weight_.size(0)}) : nothing();
    const int32_t dtype = bias.scalar_type() == ScalarType::Float ? kFloat32 : kBFloat16;
    for (size_t c = 0; c < bias_sum_.size(); ++c)
      kernels().from_float(static_cast<float>(bias_sum_[c]), bias.data_ptr(), c, dtype);
    return ConvolutionGrads{need_[0] ? *grad_x_ : nothing(), need_[1] ? weight_sum_.result() : nothing(), bias};
  }

 private:
  void add_winograd(const Tensor& part, const Tensor& raw, int64_t n0) {
    const int64_t n = part.size(0), c = part.size(1), h = part.size(2), w = part.size(3);
    if (need_[0]) {
      const bool in_place = lies_channels_last(*grad_x_);
      const Tensor to = in_place ? *grad_x_ : new_temporary(x_, Ints{n, h, w, c}, x_.scalar_type());
      float* data = static_cast<float*>(to.data_ptr()) + (in_place ? n0 * h * w * c : 0);
      if (!winograd_x_->run(seen_channels_first(raw), 2 - conv_[2], 2 - conv_[3], h, w, std::nullopt, data))
        finite_ = false;
      if (!in_place) {
        Tensor rows = torch::stable::narrow(*grad_x_, 0, n0, n);
        torch::stable::copy_(rows, seen_channels_first(to));
      }
    }
    if (need_[1]) winograd_weight_->add(part, raw, conv_[2], conv_[3]);
  }

  void add_fft(const Tensor& part, const Tensor& raw, int64_t n0) {
    std::optional<Tensor> to_x, to_weight;
    if (need_[0]) to_x = torch::stable::narrow(*grad_x_, 0, n0, part.size(0));
    if (need_[1]) to_weight = torch::stable::new_empty(weight_, sizes(weight_));
    if (need_[0] || need_[1]) convolution_fft_backward(seen_channels_first(raw), part, weight_, conv_, to_x, to_weight);
    if (need_[1]) weight_sum_.add(*to_weight);
  }

  // The sum of a map's gradient (images, oh, ow, co).
  void add_bias(const Tensor& raw) {
    const KernelTable& k = kernels();
    const int64_t co = raw.size(3), positions = raw.numel() / co, items = ceil_div(positions, kPositionsPerSum);
    const int32_t dtype = raw.scalar_type() == ScalarType::Float ? kFloat32 : kBFloat16;
    std::vector<double> sums(items * co);
    const char* data = static_cast<const char*>(raw.data_ptr());
    const int64_t item_bytes = kPositionsPerSum * co * raw.element_size();
    for_each_item(items, [&](int64_t i) {
      k.sum_rows(data + i * item_bytes, std::min(kPositionsPerSum, positions - i * kPositionsPerSum), co, dtype,
                 sums.data() + i * co);
    });
    bias_sum_.resize(co);
    for (int64_t i = 0; i < items * co; ++i) bias_sum_[i % co] += sums[i];
  }

  // A sum in single precision of tensors that may be bfloat16.
  class Sum {
   public:
    void add(const Tensor& found) {
      const Tensor flat = torch::stable::contiguous(found);
      if (!first_) {
        first_ = flat;
        return;
      }
      const int64_t count = flat.numel();
      if (!sum_) {
        sum_.emplace(count);
        accumulate(*first_);
      }
      accumulate(flat);
    }
    Tensor result() const {
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

   private:
    void accumulate(const Tensor& flat) {
      const void* data = flat.data_ptr();
      const int64_t count = flat.numel();
      if (flat.scalar_type() == ScalarType::Float)
        for (int64_t i = 0; i < count; ++i) (*sum_)[i] += static_cast<const float*>(data)[i];
      else
        for (int64_t i = 0; i < count; ++i) (*sum_)[i] += kernels().to_float(data, i, kBFloat16);
    }
    std::optional<Tensor> first_;
    std::optional<AlignedFloats> sum_;
  };

  const Ints& conv_;
  const int64_t plan_;
  const Tensor x_, weight_;
  const bool need_[3];
  std::optional<Tensor> grad_x_;
  Sum weight_sum_;
  std::vector<double> bias_sum_;
  std::optional<WinogradConvolution> winograd_x_;
  std::optional<WinogradWeightGrad> winograd_weight_;
  bool finite_ = true;
};

ConvolutionGrads backward_chunked(const Call& call, int64_t plan, const Tensor& grad, const Ints& grad_stride,
                                  const Tensor& x, const Tensor& weight, const Tensor& codes, bool need_x,
                                  bool need_weight, bool need_bias) {
  const Block& b = call.block;
  const KernelTable& k = kernels();
  const int64_t chunk = images_per_chunk(b, plan), image = b.oh * b.ow * b.co;
  ConvBackward grads(call.conv, plan, x, weight, need_x, need_weight, need_bias);
  const void* grad_data = grad.data_ptr();
  const uint8_t* code_data = codes_pointer(codes);
  for (int64_t n0 = 0; n0 < b.n; n0 += chunk) {
    const int64_t count = std::min(chunk, b.n - n0);
    const Tensor raw = new_temporary(x, Ints{count, b.oh, b.ow, b.co}, x.scalar_type());
    char* data = static_cast<char*>(raw.data_ptr());
    const int64_t size = raw.element_size();
    for_each_band(b, count, [&](int64_t i, int64_t row0, int64_t row1) {
      k.max_unpool(b, grad_data, grad_stride.data(), code_data, n0 + i, row0, row1, data + i * image * size,
                   thread_scratch(k.max_unpool_scratch(b)));
    });
    grads.add(raw, n0);
  }
  const std::optional<ConvolutionGrads> found = grads.result();
  if (found) return *found;
  return backward_chunked(call, kChunked, grad, grad_stride, x, weight, codes, need_x, need_weight, need_bias);
}

void backward_direct(const Call& call, const Tensor& grad, const Ints& grad_stride, const Tensor& x,
                     const Tensor& weight, const Tensor& codes, const std::optional<Tensor>& grad_x,
                     const std::optional<Tensor>& grad_weight, const std::optional<Tensor>& grad_bias) {
  const int64_t joined = joined_groups(call.block);
  const Block b = join_groups(call.block, joined);
  check_direct(b);
  const KernelTable& k = kernels();
  const int64_t lanes = k.vector;
  if (grad_weight || grad_bias) {
    const PatchStorage s = make_patch(b, lanes, true);
    const int64_t patch = s.patch.vectors * lanes, scratch = k.backward_weight_scratch(b, s.patch);
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
        if (!k.backward_weight(b, s.patch, x.data_ptr(), grad.data_ptr(), grad_stride.data(), codes_pointer(codes), n,
                               grad_weight ? sum : nullptr, grad_bias ? bias_sums.data() + slice * b.co : nullptr,
                               thread_scratch(scratch)))
          finite = false;
    });
    std::optional<Tensor> joined_grad = grad_weight;
    if (grad_weight && joined > 1)
      joined_grad = torch::stable::new_empty(weight, Ints{b.co, b.c / b.groups, b.kh, b.kw});
    for_each_item(b.co, [&](int64_t c) {
      auto put_total = [&](const auto& from, int64_t step, int64_t at, void* to, int64_t index) {
        double total = 0;
        for (int64_t slice = 0; slice < slices; ++slice) total += from[slice * step + at];
        k.from_float(static_cast<float>(total), to, index, b.dtype);
      };
      if (grad_bias) put_total(bias_sums, b.co, c, grad_bias->data_ptr(), c);
      if (!grad_weight) return;
      void* to = joined_grad->data_ptr();
      for (int64_t i = 0; i < patch; ++i)
        if (s.tap[i] >= 0) put_total(sums, per_slice, c * patch + i, to, c * b.taps + s.tap[i]);
    });
    if (grad_weight && joined > 1) {
      const int64_t size = weight.element_size();
      const char* from = static_cast<const char*>(joined_grad->data_ptr());
      char* to = static_cast<char*>(grad_weight->data_ptr());
      for_each_joined_row(call.block, joined, [&](int64_t apart, int64_t together) {
        std::memcpy(to + apart * size, from + together * size, call.block.taps * size);
      });
    }
    if (grad_weight && !finite) {
      Tensor to = *grad_weight;
      torch::stable::copy_(
          to, backward_chunked(call, kChunked, grad, grad_stride, x, weight, codes, false, true, false).weight);
    }
  }
  if (grad_x) {
    const PatchStorage s = make_patch(b, lanes, false);
    const int64_t patch = s.patch.vectors * lanes, scratch = k.backward_input_scratch(b, s.patch);
    const Tensor w = join_weight(call.block, weight, joined);
    AlignedFloats rows(b.co * patch);
    const int64_t tile = k.input_tile(b) * lanes;
    for (int64_t t = 0; t < patch; t += tile) {
      const int64_t width = std::min(tile, patch - t);
      for (int64_t c = 0; c < b.co; ++c)
        for (int64_t i = 0; i < width; ++i)
          if (s.tap[t + i] >= 0)
            rows[t * b.co + c * width + i] = k.to_float(w.data_ptr(), c * b.taps + s.tap[t + i], b.dtype);
    }
    if (!k.all_finite(rows.data(), b.co * patch)) {  // 0 * inf is NaN also where no gradient arrived
      Tensor to = *grad_x;
      torch::stable::copy_(to,
                           backward_chunked(call, kChunked, grad, grad_stride, x, weight, codes, true, false, false).x);
      return;
    }
    const int64_t stride[4] = {grad_x->stride(0), grad_x->stride(1), grad_x->stride(2), grad_x->stride(3)};
    for_each_item(b.n, [&](int64_t n) {
      k.backward_input(b, s.patch, rows.data(), grad.data_ptr(), grad_stride.data(), codes_pointer(codes), n,
                       grad_x->data_ptr(), stride, thread_scratch(scratch));
    });
  }
}

std::tuple<Tensor, Tensor, Tensor> conv_block_backward(Tensor grad, Tensor x, Tensor weight, Tensor codes, Ints conv,
                                                       int64_t activation, Floats act, Ints pool, Ints order,
                                                       int64_t plan, bool need_x, bool need_weight, bool need_bias) {
  const Call call = describe(x, weight, conv, activation, act, pool, order);
  const Block& b = call.block;
  const Ints expected = in_order(b, order);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.is_cpu() && grad.scalar_type() == x.scalar_type(),
                  "conv_block_backward: expected a 4-d gradient in the input's dtype, on its device");
  Ints grad_stride(4);
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(grad.size(i) == expected[i], "conv_block_backward: the gradient has size ", grad.size(i), " at ", i,
                    ", expected ", expected[i]);
    grad_stride[order[i]] = grad.stride(i);
  }
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.is_cpu() && codes.is_contiguous(),
                  "conv_block_backward: codes must be contiguous uint8 on the CPU");
  if (b.coded) {
    const Ints size = codes_size(b);
    STD_TORCH_CHECK(codes.dim() == 5, "conv_block_backward: expected 5-d codes, got ", codes.dim(), "-d");
    for (int i = 0; i < 5; ++i)
      STD_TORCH_CHECK(codes.size(i) == size[i], "conv_block_backward: codes have size ", codes.size(i), " at ", i,
                      ", expected ", size[i]);
    if (plan == kDirect) check_codes(b, codes_pointer(codes));
  } else {
    STD_TORCH_CHECK(codes.numel() == 0, "conv_block_backward: this block has no codes");
  }
  check_plan(plan, b);
  plan = plan_for(plan, weight);

  if (b.n > 0 && plan != kDirect) {
    const ConvolutionGrads found =
        backward_chunked(call, plan, grad, grad_stride, x, weight, codes, need_x, need_weight, need_bias);
    return {found.x, found.weight, found.bias};
  }
  std::optional<Tensor> grad_x, grad_weight, grad_bias;
  auto nothing = [&] { return torch::stable::new_empty(x, Ints{0}); };
  if (need_x) grad_x = new_like_input(x);
  if (need_weight) grad_weight = torch::stable::new_empty(x, Ints{b.co, b.c / b.groups, b.kh, b.kw});
  if (need_bias) grad_bias = torch::stable::new_empty(x, Ints{b.co});
  if (b.n > 0)
    backward_direct(call, grad, grad_stride, x, weight, codes, grad_x, grad_weight, grad_bias);
  else
    for (std::optional<Tensor>* sum : {&grad_weight, &grad_bias})
      if (*sum) torch::stable::zero_(**sum);
  return {grad_x ? *grad_x : nothing(), grad_weight ? *grad_weight : nothing(), grad_bias ? *grad_bias : nothing()};
}

// ---- Batch norm

// Per channel, as floats, up to a whole number of code groups.
class PerChannel {
 public:
  explicit PerChannel(int64_t channels) : floats_(ceil_div(channels, kMaxVector) * kMaxVector) {}
  float& operator[](int64_t c) const { return floats_[c]; }
  const float* data() const { return floats_.data(); }

 private:
  AlignedFloats floats_;
};

// Reads a parameter of a norm, or running statistics.
class Parameter {
 public:
  Parameter(const std::optional<Tensor>& given, int64_t channels, double otherwise) : otherwise_(otherwise) {
    if (!given) return;
    STD_TORCH_CHECK(given->is_cpu() && given->dim() == 1 && given->size(0) == channels &&
                        (given->scalar_type() == ScalarType::Float || given->scalar_type() == ScalarType::BFloat16),
                    "conv_norm_block: expected a norm's parameters of shape (", channels, ",) in float32 or bfloat16");
    flat_ = torch::stable::contiguous(*given);
    data_ = flat_->data_ptr();
    dtype_ = given->scalar_type() == ScalarType::Float ? kFloat32 : kBFloat16;
  }
  double operator[](int64_t c) const { return data_ ? kernels().to_float(data_, c, dtype_) : otherwise_; }

 private:
  std::optional<Tensor> flat_;
  const void* data_ = nullptr;
  int32_t dtype_ = kFloat32;
  double otherwise_;
};

// Mean and biased variance of every channel, part by part: T. Chan, G. Golub and R. LeVeque, Algorithms for computing
// the sample variance (1983).
class Moments {
 public:
  explicit Moments(int64_t channels) : channels_(channels), mean_(channels), squares_(channels) {}

  // Copies rows of channels, and adds them.
  void copy_and_add(const char* from, char* to, int64_t positions, int32_t dtype) {
    const int64_t parts = ceil_div(positions, kPositionsPerSum);
    const int64_t part_bytes = kPositionsPerSum * channels_ * (dtype == kFloat32 ? 4 : 2);
    std::vector<double> found(parts * 2 * channels_);
    auto size_of = [&](int64_t i) { return std::min(kPositionsPerSum, positions - i * kPositionsPerSum); };
    for_each_item(parts, [&](int64_t i) {
      double* means = found.data() + i * 2 * channels_;
      kernels().copy_and_measure(from + i * part_bytes, to + i * part_bytes, size_of(i), channels_, dtype, means,
                                 means + channels_);
    });
    for (int64_t i = 0; i < parts; ++i) {
      const double *means = found.data() + i * 2 * channels_, *squares = means + channels_;
      const double count = static_cast<double>(size_of(i)), share = count / (count_ + count);
      for (int64_t c = 0; c < channels_; ++c) {
        const double apart = means[c] - mean_[c];
        squares_[c] += squares[c] + apart * apart * count_ * share;
        // An infinity stays one, as in a sum.
        mean_[c] = std::isfinite(apart) ? mean_[c] + apart * share : mean_[c] + means[c];
      }
      count_ += count;
    }
  }
  double mean(int64_t c) const { return mean_[c]; }
  double var(int64_t c) const { return squares_[c] / count_; }

 private:
  const int64_t channels_;
  double count_ = 0;
  std::vector<double> mean_, squares_;
};

Tensor new_doubles(const Tensor& like, const Ints& size) {
  return torch::stable::new_empty(like, size, ScalarType::Double);
}

const int64_t kWeightsPerItem = limit("WEIGHTS_PER_ITEM", 32 * 1024, 1);

std::tuple<Tensor, Tensor> fold_norm(Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> gamma,
                                     std::optional<Tensor> beta, Tensor mean, Tensor var, double eps) {
  const ScalarType dtype = weight.scalar_type();
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(0) >= 1 && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
      "fold_norm: expected a 4-d weight in float32 or bfloat16");
  elements("a weight", weight);
  const int64_t co = weight.size(0), taps = weight.numel() / co;
  const int32_t type = dtype == ScalarType::Float ? kFloat32 : kBFloat16;
  const Parameter b(bias, co, 0), g(gamma, co, 1), shift(beta, co, 0), m(mean, co, 0), v(var, co, 1);
  const Tensor from = torch::stable::contiguous(weight);
  const Tensor to = torch::stable::new_empty(weight, sizes(weight));
  const Tensor to_bias = torch::stable::new_empty(weight, Ints{co});
  const KernelTable& k = kernels();
  const void* source = from.data_ptr();
  void *target = to.data_ptr(), *target_bias = to_bias.data_ptr();
  auto fold = [&](int64_t c) {
    const double scale = g[c] / std::sqrt(v[c] + eps);
    k.scale(source, scale, target, c * taps, (c + 1) * taps, type);
    k.from_float(static_cast<float>(shift[c] + (b[c] - m[c]) * scale), target_bias, c, type);
  };
  const int64_t part = std::max<int64_t>(1, kWeightsPerItem / std::max<int64_t>(1, taps));
  for_each_item(ceil_div(co, part), [&](int64_t item) {
    for (int64_t c = item * part; c < std::min(co, (item + 1) * part); ++c) fold(c);
  });
  return {to, to_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_norm_block(
    Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> gamma, std::optional<Tensor> beta,
    std::optional<Tensor> given_mean, std::optional<Tensor> given_var, double eps, Ints conv, int64_t activation,
    Floats act, Ints pool, Ints order, int64_t plan, bool keep, bool keep_map) {
  const Call call = describe(x, weight, conv, activation, act, pool, order);
  const Block& b = call.block;
  const KernelTable& k = kernels();
  check_plan(plan, b);
  plan = plan_for(plan, weight);
  STD_TORCH_CHECK(given_mean.has_value() == given_var.has_value(),
                  "conv_norm_block: expected a mean and a variance, or neither");
  const bool given = given_mean.has_value();
  const int64_t image = b.oh * b.ow * b.co, positions = b.n * b.oh * b.ow, size = x.element_size();
  STD_TORCH_CHECK(given || positions > 1, "conv_norm_block: expected more than 1 value per channel");
  const Parameter added(bias, b.co, 0), g(gamma, b.co, 1), shift_by(beta, b.co, 0);
  const Parameter known_mean(given_mean, b.co, 0), known_var(given_var, b.co, 1);

  const Tensor out = new_output(x, in_order(b, order), x.scalar_type());
  const Tensor codes = new_output(x, keep && b.pooled ? codes_size(b) : Ints{0}, ScalarType::Byte);
  const Tensor kept = new_output(x, keep && b.pooled ? in_order(b, order) : Ints{0}, x.scalar_type());
  // The map, where it is read again: to normalise it, or by the backward.
  const bool stored = !given || (keep && !b.pooled);
  const int64_t chunk = images_per_chunk(b, plan);
  const bool in_parts = chunk < b.n || b.n == 0;
  const bool returned = keep && (!b.pooled || (keep_map && !given));
  const auto make_map = returned ? new_output : new_temporary;
  Tensor map = make_map(x, stored && in_parts ? Ints{b.n, b.oh, b.ow, b.co} : Ints{0}, x.scalar_type());

  // Rows: mean without the bias, biased variance, scale, shift.
  const Tensor stats = new_doubles(x, Ints{4, b.co});
  double* stat = static_cast<double*>(stats.data_ptr());
  PerChannel scale(b.co), shift(b.co);
  auto set_statistics = [&](int64_t c, double mean, double var) {
    const double factor = g[c] / std::sqrt(var + eps);
    scale[c] = static_cast<float>(factor);
    shift[c] = static_cast<float>(shift_by[c] - mean * factor);
    stat[c] = mean;
    stat[b.co + c] = var;
    stat[2 * b.co + c] = scale[c];
    stat[3 * b.co + c] = shift[c];
  };
  if (given)
    for (int64_t c = 0; c < b.co; ++c) set_statistics(c, known_mean[c] - added[c], known_var[c]);
  if (b.n == 0) return {out, codes, kept, map, stats};
  const int64_t rows = rows_per_item(b, k.epilogue_scratch(b, 1), k.epilogue_scratch(b, 2));
  const int64_t bands = ceil_div(b.out_h, rows), scratch = k.epilogue_scratch(b, rows);
  const Outputs outputs{out.data_ptr(), codes_pointer(codes), kept.numel() ? kept.data_ptr() : nullptr};
  auto normalise = [&](const char* data, int64_t n0, int64_t count) {
    for_each_item(count * bands, [&](int64_t item) {
      const int64_t i = item / bands, row0 = item % bands * rows;
      k.epilogue(b, {data + i * image * size, b.ow * b.co, b.co, b.dtype, scale.data(), shift.data()}, outputs, n0 + i,
                 row0, std::min(b.out_h, row0 + rows), thread_scratch(scratch));
    });
  };

  Moments moments(b.co);
  const ConvForward maps(conv, plan, weight, std::nullopt, make_map);
  for (int64_t n0 = 0; n0 < b.n; n0 += chunk) {
    const int64_t count = std::min(chunk, b.n - n0);
    const Tensor found = maps.of(torch::stable::narrow(x, 0, n0, count));
    const char* data = static_cast<const char*>(found.data_ptr());
    if (given) normalise(data, n0, count);
    if (!stored) continue;
    if (!in_parts) map = contiguous_strict(found);
    moments.copy_and_add(data, static_cast<char*>(map.data_ptr()) + n0 * image * size, count * b.oh * b.ow, b.dtype);
  }
  if (!given) {
    for (int64_t c = 0; c < b.co; ++c) set_statistics(c, moments.mean(c), moments.var(c));
    normalise(static_cast<const char*>(map.data_ptr()), 0, b.n);
  }
  return {out, codes, kept, returned ? map : torch::stable::new_empty(x, Ints{0}), stats};
}

std::tuple<Tensor, Tensor, Tensor> conv_norm_block_backward(Tensor grad, Tensor x, Tensor weight, Tensor stats,
                                                            Tensor codes, Tensor kept, Tensor map, double eps,
                                                            Ints conv, int64_t activation, Floats act, Ints pool,
                                                            Ints order, int64_t plan, bool given, bool need_x,
                                                            bool need_weight) {
  const Call call = describe(x, weight, conv, activation, act, pool, order);
  const Block& b = call.block;
  const KernelTable& k = kernels();
  check_plan(plan, b);
  plan = plan_for(plan, weight);
  const Ints expected = in_order(b, order), map_size{b.n, b.oh, b.ow, b.co};
  auto has_size = [](const Tensor& t, const Ints& size) {
    if (t.dim() != static_cast<int64_t>(size.size())) return false;
    for (size_t i = 0; i < size.size(); ++i)
      if (t.size(i) != size[i]) return false;
    return true;
  };
  STD_TORCH_CHECK(has_size(grad, expected) && grad.is_cpu() && grad.scalar_type() == x.scalar_type(),
                  "conv_norm_block_backward: expected a gradient of the result's size, in its dtype");
  auto is_kept = [&](const Tensor& t, const Ints& size) {
    return has_size(t, size) && t.is_cpu() && t.is_contiguous() && t.scalar_type() == x.scalar_type();
  };
  STD_TORCH_CHECK((!b.pooled || is_kept(kept, expected)) && ((b.pooled && map.numel() == 0) || is_kept(map, map_size)),
                  "conv_norm_block_backward: what was kept has another size");
  const Tensor& argmax_values = b.pooled ? kept : map;
  STD_TORCH_CHECK(!b.pooled || (has_size(codes, codes_size(b)) && codes.is_cpu() && codes.is_contiguous() &&
                                codes.scalar_type() == ScalarType::Byte),
                  "conv_norm_block_backward: codes have another size");
  STD_TORCH_CHECK(has_size(stats, Ints{4, b.co}) && stats.is_cpu() && stats.is_contiguous() &&
                      stats.scalar_type() == ScalarType::Double,
                  "conv_norm_block_backward: expected statistics of shape (4, ", b.co, ") in float64");
  Ints grad_stride(4), argmax_stride(4);
  for (int i = 0; i < 4; ++i) {
    grad_stride[order[i]] = grad.stride(i);
    const int nchw[4] = {0, 2, 3, 1};
    argmax_stride[b.pooled ? order[i] : nchw[i]] = argmax_values.stride(i);
  }

  const double* stat = static_cast<const double*>(stats.data_ptr());
  PerChannel scale(b.co), shift(b.co), mean(b.co), constant(b.co), slope(b.co);
  for (int64_t c = 0; c < b.co; ++c) {
    mean[c] = static_cast<float>(stat[c]);
    scale[c] = static_cast<float>(stat[2 * b.co + c]);
    shift[c] = static_cast<float>(stat[3 * b.co + c]);
  }
  NormGrads norm{scale.data(), shift.data(), mean.data(), nullptr, nullptr};
  const int64_t positions = b.n * b.oh * b.ow, rows = std::max<int64_t>(1, kPositionsPerSum / b.out_w);
  const int64_t bands = ceil_div(b.out_h, rows), scratch = k.norm_scratch(b);
  std::vector<double> part(b.n * bands * 2 * b.co), total(2 * b.co);
  for_each_item(b.n * bands, [&](int64_t item) {
    const int64_t row0 = item % bands * rows;
    k.norm_sums(b, norm, grad.data_ptr(), grad_stride.data(), argmax_values.data_ptr(), argmax_stride.data(),
                item / bands, row0, std::min(b.out_h, row0 + rows), part.data() + item * 2 * b.co,
                thread_scratch(scratch));
  });
  for (size_t i = 0; i < part.size(); ++i) total[i % (2 * b.co)] += part[i];

  // Rows: the gradients of gamma and beta.
  const Tensor grads = new_doubles(x, Ints{2, b.co});
  double* found = static_cast<double*>(grads.data_ptr());
  for (int64_t c = 0; c < b.co; ++c) {
    const double inverse = 1 / std::sqrt(stat[b.co + c] + eps), sum = total[c];
    // The kernels took the mean as a float; an infinite sum has nothing to mend.
    const double off = mean[c] - stat[c];
    found[c] = inverse * (total[b.co + c] + (std::isfinite(sum) ? sum * off : 0));
    found[b.co + c] = sum;
    if (given) continue;  // the statistics don't depend on z
    const double by_z = -scale[c] * inverse * found[c] / positions;
    slope[c] = static_cast<float>(by_z);
    constant[c] = static_cast<float>(-scale[c] * sum / positions + (std::isfinite(by_z) ? by_z * off : 0));
  }
  norm.constant = constant.data();
  norm.slope = slope.data();

  if (b.n == 0 || (!need_x && !need_weight)) {
    const Tensor dx = need_x ? new_like_input(x) : torch::stable::new_empty(x, Ints{0});
    return {dx, torch::stable::new_zeros(weight, need_weight ? sizes(weight) : Ints{0}), grads};
  }
  const int64_t image = b.oh * b.ow * b.co, size = x.element_size();
  auto gradients = [&](int64_t by) {
    const int64_t chunk = images_per_chunk(b, by);
    const ConvForward maps(conv, by, weight, std::nullopt);
    ConvBackward sums(conv, by, x, weight, need_x, need_weight, false);
    for (int64_t n0 = 0; n0 < b.n; n0 += chunk) {
      const int64_t count = std::min(chunk, b.n - n0);
      std::optional<Tensor> again;
      const char* from = nullptr;
      if (!given && map.numel()) {
        from = static_cast<const char*>(map.data_ptr()) + n0 * image * size;
      } else if (!given) {
        again = maps.of(torch::stable::narrow(x, 0, n0, count));
        from = static_cast<const char*>(again->data_ptr());
      }
      const Tensor raw = new_temporary(x, Ints{count, b.oh, b.ow, b.co}, x.scalar_type());
      char* to = static_cast<char*>(raw.data_ptr());
      for_each_band(b, count, [&](int64_t i, int64_t row0, int64_t row1) {
        k.norm_unpool(b, norm, grad.data_ptr(), grad_stride.data(), codes_pointer(codes), argmax_values.data_ptr(),
                      argmax_stride.data(), n0 + i, row0, row1, from ? from + i * image * size : nullptr,
                      to + i * image * size, thread_scratch(scratch));
      });
      sums.add(raw, n0);
    }
    return sums.result();
  };
  std::optional<ConvolutionGrads> result = gradients(plan);
  if (!result) result = gradients(kChunked);
  return {result->x, result->weight, grads};
}

Tensor patch_moments(Tensor x, Tensor weight, Ints conv) {
  const Call call = describe_convolution(x, weight, conv);
  const Block& b = call.block;
  STD_TORCH_CHECK(b.groups == 1 && b.n >= 1, "patch_moments: expected groups=1 and at least one image");
  check_direct(b);
  const KernelTable& k = kernels();
  const int64_t taps = b.taps, width = k.patch_width(taps), lines = b.n * b.oh;
  elements("the products of all pairs of taps", {32, taps + 1, width});
  const int64_t slices = std::min<int64_t>(lines, 32), per_slice = (taps + 1) * width;
  std::vector<double> sums(slices * per_slice), pivots(slices * taps);
  for_each_item(slices, [&](int64_t slice) {
    const int64_t end = (slice + 1) * lines / slices;
    for (int64_t line = slice * lines / slices; line < end;) {
      const int64_t n = line / b.oh, row0 = line % b.oh, row1 = std::min(b.oh, row0 + end - line);
      k.patch_products(b, x.data_ptr(), n, row0, row1, pivots.data() + slice * taps, sums.data() + slice * per_slice,
                       thread_scratch(k.patch_scratch(b)));
      line += row1 - row0;
    }
  });
  // Slices are merged as Moments merges parts.
  const Tensor moments = torch::stable::new_zeros(x, Ints{taps + 1, taps}, ScalarType::Double);
  double *products = static_cast<double*>(moments.data_ptr()), *mean = products + taps * taps;
  double count = 0;
  std::vector<double> off(taps), apart(taps);
  for (int64_t slice = 0; slice < slices; ++slice) {
    const double* sum = sums.data() + slice * per_slice;
    const double here = sum[taps * width + taps], share = here / (count + here);
    for (int64_t i = 0; i < taps; ++i) {
      off[i] = sum[i * width + taps] / here;
      apart[i] = pivots[slice * taps + i] + off[i] - mean[i];
    }
    for (int64_t i = 0; i < taps; ++i)
      for (int64_t j = 0; j < taps; ++j)
        products[i * taps + j] +=
            sum[std::min(i, j) * width + std::max(i, j)] - here * off[i] * off[j] + apart[i] * apart[j] * count * share;
    for (int64_t i = 0; i < taps; ++i)
      mean[i] = std::isfinite(apart[i]) ? mean[i] + apart[i] * share : mean[i] + pivots[slice * taps + i] + off[i];
    count += here;
  }
  for (int64_t i = 0; i < taps * taps; ++i) products[i] /= count;
  return moments;
}

bool suits_winograd(Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 &&
                      weight.scalar_type() == ScalarType::Float && weight.is_cpu(),
                  "suits_winograd: expected a float32 weight (co, c, 3, 3) on the CPU");
  return winograd_suits(weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CPU, m) {
  m.impl("conv_block", CNNLSTM_FAST_OP(conv_block));
  m.impl("conv_block_backward", CNNLSTM_FAST_OP(conv_block_backward));
  m.impl("fold_norm", CNNLSTM_FAST_OP(fold_norm));
  m.impl("conv_norm_block", CNNLSTM_FAST_OP(conv_norm_block));
  m.impl("conv_norm_block_backward", CNNLSTM_FAST_OP(conv_norm_block_backward));
  m.impl("patch_moments", CNNLSTM_FAST_OP(patch_moments));
  m.impl("suits_winograd", CNNLSTM_FAST_OP(suits_winograd));
}

}  // namespace cnnlstm_fast
