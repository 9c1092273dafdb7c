#include "block_description.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "memory.h"
#include "threads.h"

namespace cnnlstm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

size_t activation_numbers(int64_t activation) {
  if (activation == kHardtanh || activation == kSoftplus) return 2;
  return activation == kLeakyReLU || activation == kELU ? 1 : 0;
}

int64_t out_length(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil) {
  if (!ceil && kernel - 1 > (size + 2 * padding - 1) / dilation) return 0;  // their product may overflow
  const int64_t span = size + 2 * padding - dilation * (kernel - 1) - 1;
  if (span < 0 && !(ceil && span + stride - 1 >= 0)) return 0;
  int64_t length = (span + (ceil ? stride - 1 : 0)) / stride + 1;
  if (ceil && (length - 1) * stride >= size + padding) --length;
  return length;
}

// Windows that begin inside meet an element, so only the first ones and the last are looked at.
bool windows_meet(int64_t size, int64_t windows, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  for (int64_t i = 0; i < windows && i * stride < padding; ++i) {
    const int64_t start = i * stride - padding, skipped = ceil_div(-start, dilation);
    if (skipped >= kernel || start + skipped * dilation >= size) return false;
  }
  return (windows - 1) * stride - padding < size;
}

namespace {

void check_tensors(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, "conv_block: expected a 4-d input and weight, got ", x.dim(),
                  "-d and ", weight.dim(), "-d");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
                  "conv_block: the kernels compute float32 and bfloat16 only");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "conv_block: input and weight differ in dtype");
  STD_TORCH_CHECK(weight.is_cpu(), "conv_block: input and weight are on different devices");
  elements("an input", x);
  elements("a weight", weight);
}

// Parameters of a convolution or a pool, of which some may be 0: whatever is computed from them fits 64 bits.
template <class MayBeZero>
void check_range(const char* name, const Ints& values, const MayBeZero& may_be_zero) {
  for (size_t i = 0; i < values.size(); ++i)
    STD_TORCH_CHECK(values[i] >= (may_be_zero(i) ? 0 : 1) && values[i] <= std::numeric_limits<int32_t>::max(),
                    "conv_block: ", name, "[", i, "] = ", values[i], " is out of range");
}

void check_parameters(const Ints& conv, const Ints& pool, const Ints& order) {
  STD_TORCH_CHECK(
      conv.size() == 7 || conv.size() == 9,
      "conv_block: conv must be [stride, padding, dilation (h, w each), groups, more padding after (h, w)]");
  STD_TORCH_CHECK(pool.empty() || pool.size() == 9, "conv_block: pool must be empty or have 9 values, got ",
                  pool.size());
  Ints sorted = order;
  std::sort(sorted.begin(), sorted.end());
  STD_TORCH_CHECK((sorted == Ints{0, 1, 2, 3}), "conv_block: order must be a permutation of 0, 1, 2, 3");
  check_range("conv", conv, [](size_t i) { return i == 2 || i == 3 || i > 6; });
  check_range("pool", pool, [](size_t i) { return i == 4 || i == 5 || i == 8; });
}

void set_convolution(Block& b, const Tensor& x, const Tensor& weight, const Ints& conv) {
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
  b.padded_h = b.h + 2 * b.ph + after_h, b.padded_w = b.w + 2 * b.pw + after_w;
  elements("a map", {b.n, b.co, b.oh, b.ow});
  elements("an input with its padding", {b.c, b.padded_h, b.padded_w});
  b.taps = b.c / b.groups * b.kh * b.kw;
  for (int i = 0; i < 4; ++i) b.x_stride[i] = x.stride(i);
  b.dtype = x.scalar_type() == ScalarType::Float ? kFloat32 : kBFloat16;
}

void set_activation(Block& b, int64_t activation, const Floats& act) {
  STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "conv_block: unknown activation ", activation);
  const size_t numbers = activation_numbers(activation);
  STD_TORCH_CHECK(act.size() == numbers, "conv_block: activation ", activation, " has ", numbers, " numbers, got ",
                  act.size());
  b.activation = static_cast<int32_t>(activation);
  for (size_t i = 0; i < numbers; ++i) b.act[i] = static_cast<float>(act[i]);
}

void set_pool(Block& b, const Ints& pool) {
  b.pooled = !pool.empty();
  const Ints p = b.pooled ? pool : Ints{1, 1, 1, 1, 0, 0, 1, 1, 0};
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
}

// Where the result and its codes lie.
void set_result(Block& b, const Ints& order) {
  b.code_bytes = b.pool_kh * b.pool_kw <= kNibbleWindow ? kCodeGroup / 2 : kCodeGroup;
  b.code_groups = ceil_div(b.co, kCodeGroup);
  const int64_t size[4] = {b.n, b.co, b.out_h, b.out_w};
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    b.out_stride[order[i]] = stride;
    stride *= size[order[i]];
  }
}

bool is_inside(int64_t at, int64_t size) {
  return at >= 0 && at < size;
}

// Whether all elements of the pool window at this pooled position lie in the map.
bool is_window_inside(const Block& b, int64_t row, int64_t col) {
  const int64_t h0 = row * b.pool_sh - b.pool_ph, w0 = col * b.pool_sw - b.pool_pw;
  return is_inside(h0, b.oh) && is_inside(w0, b.ow) && is_inside(h0 + (b.pool_kh - 1) * b.pool_dh, b.oh) &&
         is_inside(w0 + (b.pool_kw - 1) * b.pool_dw, b.ow);
}

// The codes that such a window may have: of its elements in the map, and the one that names none.
struct AllowedCodes {
  bool allowed[256] = {};
  AllowedCodes(const Block& b, int64_t row, int64_t col) {
    const int64_t h0 = row * b.pool_sh - b.pool_ph, w0 = col * b.pool_sw - b.pool_pw;
    allowed[b.code_bytes == kCodeGroup ? 255 : 15] = true;
    for (int64_t e = 0; e < b.pool_kh * b.pool_kw; ++e)
      allowed[e] = is_inside(h0 + e / b.pool_kw * b.pool_dh, b.oh) && is_inside(w0 + e % b.pool_kw * b.pool_dw, b.ow);
  }
};

}  // namespace

BlockDescription describe_block(const Tensor& x, const Tensor& weight, const Ints& conv, int64_t activation,
                                const Floats& act, const Ints& pool, const Ints& order) {
  check_tensors(x, weight);
  check_parameters(conv, pool, order);
  Block b{};
  set_activation(b, activation, act);
  set_convolution(b, x, weight, conv);
  set_pool(b, pool);
  set_result(b, order);
  const bool curved = activation > kHardtanh;
  b.coded = b.pooled || (activation != kNone && !curved);
  return {b, conv, order, curved};
}

BlockDescription describe_convolution(const Tensor& x, const Tensor& weight, const Ints& conv) {
  return describe_block(x, weight, conv, kNone, {}, {}, Ints{0, 2, 3, 1});
}

Ints result_shape(const BlockDescription& description) {
  const Block& b = description.block;
  const Ints& order = description.order;
  const int64_t size[4] = {b.n, b.co, b.out_h, b.out_w};
  return {size[order[0]], size[order[1]], size[order[2]], size[order[3]]};
}

Ints codes_shape(const Block& b) {
  return {b.n, b.out_h, b.out_w, b.code_groups, b.code_bytes};
}

Ints map_shape(const Block& b, int64_t images) {
  return {images, b.oh, b.ow, b.co};
}

uint8_t* codes_pointer(const Tensor& codes) {
  return codes.numel() ? static_cast<uint8_t*>(codes.data_ptr()) : nullptr;
}

void check_offsets(const Block& b) {
  constexpr int64_t kMostFloats = int64_t{1} << 30;
  STD_TORCH_CHECK(b.padded_h <= kMostFloats / b.padded_w && b.padded_h * b.padded_w <= kMostFloats / b.c / 2 &&
                      b.oh * b.ow <= kMostFloats / std::max<int64_t>(b.taps, 64) / 2,
                  "conv_block: one image is too large for the direct plan");
}

void check_code_positions(const Block& b, const uint8_t* codes) {
  for (int64_t row = 0; row < b.out_h; ++row)
    for (int64_t col = 0; col < b.out_w; ++col) {
      if (is_window_inside(b, row, col)) continue;
      const AllowedCodes here(b, row, col);
      for (int64_t n = 0; n < b.n; ++n) {
        const uint8_t* group = codes + ((n * b.out_h + row) * b.out_w + col) * b.code_groups * b.code_bytes;
        for (int64_t c = 0; c < b.co; ++c) {
          const int64_t lane = c % kCodeGroup, byte = c / kCodeGroup * b.code_bytes + lane % b.code_bytes;
          const int64_t code = b.code_bytes == kCodeGroup ? group[byte]
                               : lane < 8                 ? group[byte] & 15
                                                          : group[byte] >> 4;
          STD_TORCH_CHECK(here.allowed[code], "conv_block_backward: the code of channel ", c, " at ", row, ", ", col,
                          " of image ", n, " is ", code, ", which names no position of the map");
        }
      }
    }
}

}  // namespace cnnlstm_fast
