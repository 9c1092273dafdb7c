#include "packed_pairs.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "limits.h"
#include "memory.h"
#include "recurrent_pairs.h"
#include "tensors.h"
#include "threads.h"

namespace cnnlstm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// Positions of an item, and bytes of their rows: what a second-level cache holds beside a panel of weights.
const int64_t kPairsPositions = limit("PAIRS_POSITIONS", 256, 1);
const int64_t kPairsRowBytes = limit("PAIRS_ROW_BYTES", int64_t{1} << 20, 1);
// Multiply-adds that are worth waking another thread.
const int64_t kPairsWork = limit("PAIRS_WORK", int64_t{1} << 21, 0);

// Numbers that a thread interleaves at a time.
const int64_t kInterleaved = limit("PAIRS_INTERLEAVED", 16384, 1);

const BFloat16Table& unit_for(const Ints& conv, const Tensor& weight) {
  const BFloat16Table* kernels = bfloat16_kernels();
  STD_TORCH_CHECK(kernels, "packed weights in bfloat16: the processor has no unit for their products");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::BFloat16 && weight.numel() > 0 &&
                      conv.size() > 6 && conv[6] == 1,
                  "packed weights in bfloat16: expected a weight of 4 dimensions and one group");
  return *kernels;
}

// Three planes become four, the last of zeros: pixels of 64 bits.
int64_t padded_channels(const Tensor& weight) {
  const int64_t c = weight.size(1);
  return c == 3 && weight.size(2) * weight.size(3) > 1 ? 4 : c;
}

// Items of a call: so many positions, and so many groups of panels.
struct PairsItems {
  int64_t positions, parts, groups;
  // Weights that a second-level cache does not hold are read once for many positions, and threads share them.
  PairsItems(int64_t total, int64_t words, int64_t panels, bool heavy) {
    constexpr int64_t kRows = 16;  // a tile
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t most = std::clamp<int64_t>(kPairsRowBytes / (4 * words), 1, kPairsPositions);
    const int64_t least = ceil_div(total, most);
    const int64_t wanted = heavy ? least : round_up(std::max(least, 2 * threads), threads);
    positions = std::min(most, round_up(ceil_div(total, wanted), kRows));
    parts = ceil_div(total, positions);
    groups = parts < threads || (heavy && parts % threads) ? std::min(panels, 2 * threads) : 1;
  }
};

}  // namespace

PackedPairs::PackedPairs(const Ints& conv, const Tensor& weight, const std::optional<Tensor>& bias)
    : kernels_(unit_for(conv, weight)),
      channels_(weight.size(1)),
      padded_channels_(padded_channels(weight)),
      out_channels_(weight.size(0)),
      words_(row_words(padded_channels_ * weight.size(2) * weight.size(3), kernels_)) {
  const int64_t columns = kernels_.conv_columns, lanes = kernels_.recurrent.lanes, kh = weight.size(2),
                kw = weight.size(3);
  const int64_t width = round_up(out_channels_, lanes);
  panels_ = std::make_unique<const PackedFloats>(words_ * width);
  auto bias_memory = std::make_unique<const PackedFloats>(round_up(width, columns));
  check_argument("packed weights", "bias", bias, {out_channels_}, ScalarType::BFloat16);
  if (bias) {
    const Tensor wide = as_contiguous_floats(*bias);
    std::copy_n(floats(wide), out_channels_, bias_memory->data());
  }
  bias_ = std::move(bias_memory);
  const Tensor dense = torch::stable::contiguous(weight);
  const uint16_t* from = static_cast<const uint16_t*>(dense.data_ptr());
  for_each_item(ceil_div(out_channels_, columns), [&](int64_t p) {
    const int64_t first = p * columns, some = std::min(columns, width - first);
    uint16_t* panel = reinterpret_cast<uint16_t*>(panels_->data() + first * words_);
    for (int64_t n = 0; n < std::min(some, out_channels_ - first); ++n)
      for (int64_t c = 0; c < channels_; ++c)
        for (int64_t tap = 0; tap < kh * kw; ++tap) {
          const int64_t k = tap * padded_channels_ + c;
          panel[(k / 2 * some + n) * 2 + k % 2] = from[((first + n) * channels_ + c) * kh * kw + tap];
        }
  });
}

void PackedPairs::compute(const Block& b, const Tensor& x, const Tensor* added, const Tensor& out) const {
  const int64_t total = b.n * b.oh * b.ow, panels = ceil_div(out_channels_, kernels_.conv_columns);
  if (total == 0) return;
  PairsConv call{words_,
                 reinterpret_cast<const uint32_t*>(panels_->data()),
                 bias_->data(),
                 static_cast<const uint16_t*>(x.data_ptr()),
                 nullptr,
                 0,
                 added ? static_cast<const uint16_t*>(added->data_ptr()) : nullptr,
                 static_cast<uint16_t*>(out.data_ptr())};
  const double work = static_cast<double>(total) * static_cast<double>(words_ * out_channels_);
  const bool alone = torch::stable::get_num_threads() == 1 || work < static_cast<double>(kPairsWork);
  auto for_items = [&](int64_t count, const auto& run) {
    if (!alone) return for_each_item(count, run);
    const FlushDenormals flush;
    for (int64_t i = 0; i < count; ++i) run(i);
  };
  PairsItems items(total, words_, panels, 4 * words_ * out_channels_ > kPairsRowBytes);
  if (alone) items.groups = 1;
  auto positions_of = [&](int64_t part) { return std::min(items.positions, total - part * items.positions); };
  // Positions of a pointwise convolution are rows as they lie, if these are words.
  const int64_t step = b.ow > 1 ? b.x_stride[3] : b.oh > 1 ? b.x_stride[2] : b.n > 1 ? b.x_stride[0] : b.c;
  const bool dense = b.sh == 1 && b.sw == 1 && (b.oh == 1 || b.x_stride[2] == b.ow * step) &&
                     (b.n == 1 || b.x_stride[0] == b.oh * b.ow * step);
  std::optional<Tensor> gathered;
  if (b.kh * b.kw == 1 && b.ph == 0 && b.pw == 0 && dense && 2 * words_ == b.c && step % 2 == 0 &&
      reinterpret_cast<uintptr_t>(x.data_ptr()) % 4 == 0) {
    call.rows = static_cast<const uint32_t*>(x.data_ptr()), call.row_stride = step / 2;
  } else if (items.groups > 1) {
    gathered = new_temporary(x, {total * words_}, ScalarType::Float);
    uint32_t* rows = reinterpret_cast<uint32_t*>(mutable_floats(*gathered));
    for_items(ceil_div(total, 8), [&](int64_t i) {
      kernels_.gather_rows(b, call.x, words_, 8 * i, std::min<int64_t>(8, total - 8 * i), rows + 8 * i * words_);
    });
    call.rows = rows, call.row_stride = words_;
  }
  for_items(items.parts * items.groups, [&](int64_t i) {
    const int64_t part = i / items.groups, group = i % items.groups, count = positions_of(part);
    kernels_.conv(b, call, part * items.positions, count, group * panels / items.groups,
                  (group + 1) * panels / items.groups, thread_scratch(kernels_.conv_scratch(call, count)));
  });
}

Tensor PackedPairs::interleaved(const Tensor& x) const {
  const bool wide = x.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(wide || x.scalar_type() == ScalarType::BFloat16,
                  "a frozen block: its packed weights take bfloat16 or float32");
  const int64_t n = x.size(0), c = channels_, padded = padded_channels_, h = x.size(2), w = x.size(3), rows = n * h;
  if (!wide && c == padded && (c == 1 || x.stride(1) == 1)) return x;
  constexpr int64_t kFewPlanes = 16;  // more are transposed by tiles
  if (c > kFewPlanes && x.stride(1) != 1) return channels_last(as_dtype(x, ScalarType::BFloat16));
  const Tensor found = new_temporary(x, {n, h, w, padded}, ScalarType::BFloat16);
  const int64_t stride[4] = {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  const int64_t together = std::max<int64_t>(1, kInterleaved / (w * padded)), items = ceil_div(rows, together);
  for_each_item(items, [&](int64_t i) {
    const int64_t first = i * together;
    kernels_.interleave(x.data_ptr(), wide, stride, c, padded, h, w, first, std::min(together, rows - first),
                        static_cast<uint16_t*>(found.data_ptr()) + first * w * padded, thread_scratch(w * c));
  });
  return view_channels_first(found);
}

Tensor PackedPairs::padded(const Tensor& x, Block& b) const {
  Block around = b;
  around.h = b.padded_h, around.w = b.padded_w, around.ph = around.pw = 0;
  const int64_t row = b.padded_w * b.c, strides[4] = {b.padded_h * row, 1, row, b.c};
  std::copy_n(strides, 4, around.x_stride);
  const bool lies = b.w == 1 || b.x_stride[3] == b.c;  // a row of the input
  if ((b.padded_h == b.h && b.padded_w == b.w) || !lies || !kernels_.reads_in_place(around, nullptr)) return x;
  const Tensor found = new_temporary(x, {b.n, b.padded_h, row}, ScalarType::BFloat16);
  const uint16_t* from = static_cast<const uint16_t*>(x.data_ptr());
  uint16_t* to = static_cast<uint16_t*>(found.data_ptr());
  const int64_t rows = b.n * b.padded_h, together = std::max<int64_t>(1, kInterleaved / row);
  for_each_item(ceil_div(rows, together), [&](int64_t item) {
    for (int64_t i = item * together; i < std::min(rows, (item + 1) * together); ++i) {
      uint16_t* begin = to + i * row;
      const int64_t h = i % b.padded_h - b.ph;
      if (h < 0 || h >= b.h) {
        std::fill_n(begin, row, uint16_t{0});
        continue;
      }
      std::fill_n(begin, b.pw * b.c, uint16_t{0});
      std::copy_n(from + i / b.padded_h * b.x_stride[0] + h * b.x_stride[2], b.w * b.c, begin + b.pw * b.c);
      std::fill_n(begin + (b.pw + b.w) * b.c, row - (b.pw + b.w) * b.c, uint16_t{0});
    }
  });
  b = around;
  return found;
}

Tensor PackedPairs::map_of(const Block& b, const Tensor& given, const std::optional<Tensor>& added,
                           bool activated) const {
  Tensor x = interleaved(given);
  Block block = b;
  block.n = x.size(0), block.c = padded_channels_, block.taps = padded_channels_ * b.kh * b.kw;
  if (!activated) block.activation = kNone;
  for (int i = 0; i < 4; ++i) block.x_stride[i] = x.stride(i);
  x = padded(x, block);
  const Tensor out = new_output(x, {block.n, b.oh, b.ow, b.co}, ScalarType::BFloat16);
  const std::optional<Tensor> addend = added ? std::optional<Tensor>(channels_last(*added)) : std::nullopt;
  compute(block, x, addend ? &*addend : nullptr, out);
  return out;
}

void PackedPairs::multiply(Block b, const Tensor& x, int64_t rows, const Tensor& out) const {
  b.n = b.h = b.oh = 1, b.w = b.ow = rows, b.c = b.taps = channels_, b.co = out_channels_;
  b.kh = b.kw = b.sh = b.sw = b.dh = b.dw = b.groups = 1, b.ph = b.pw = 0;
  const int64_t strides[4] = {rows * channels_, 1, rows * channels_, channels_};
  std::copy_n(strides, 4, b.x_stride);
  compute(b, x, nullptr, out);
}

}  // namespace cnnlstm_fast
