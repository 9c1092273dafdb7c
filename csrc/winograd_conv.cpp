#include "winograd_conv.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "limits.h"
#include "tensors.h"
#include "threads.h"

namespace cnnlstm_fast {
namespace {

using torch::stable::Tensor;

// Scratch of one item: what a second-level cache holds.
const int64_t kWinogradItemFloats = limit("WINOGRAD_ITEM_FLOATS", 160 * 1024, 1);
// Every item reads all weights, which are larger than any item's inputs where there are many channels.
const int64_t kLeastTiles = limit("WINOGRAD_TILES", 48, 1);
// Weights that come from memory or nearly: for each item twice the tiles.
const int64_t kLargeWeightFloats = limit("WINOGRAD_LARGE_WEIGHT", 3 * 1024 * 1024, 1);
// Pooled rows of an item where windows overlap: what the next item computes again is little of it.
const int64_t kOverlappingRows = limit("WINOGRAD_OVERLAPPING_ROWS", 8, 1);
// Transformed inputs and gradients of one part of a weight's gradient.
const int64_t kPartFloats = limit("WINOGRAD_PART_FLOATS", 512 * 1024, 1);
// And so many times the sums, which pass through memory once for every part.
const int64_t kPartSums = limit("WINOGRAD_PART_SUMS", 2, 0);
// Groups of channels that share gradients while those are in the first-level cache.
const int64_t kMostGroups = limit("WINOGRAD_GROUPS", 8, 1);

int64_t group_up(int64_t channels) {
  return ceil_div(channels, kCodeGroup) * kCodeGroup;
}

Tensor new_floats(const Tensor& like, int64_t count) {
  return new_temporary(like, std::vector<int64_t>{count}, torch::headeronly::ScalarType::Float);
}

// x with its channels contiguous.
Tensor with_channels_inside(const Tensor& x) {
  return x.stride(1) == 1 ? x : channels_last(x);
}

Winograd describe(const Tensor& x, int64_t co, int64_t oh, int64_t ow, int64_t ph, int64_t pw) {
  return {x.size(0),
          x.size(1),
          x.size(2),
          x.size(3),
          co,
          oh,
          ow,
          ph,
          pw,
          {x.stride(0), x.stride(2), x.stride(3)},
          ceil_div(oh, 2),
          ceil_div(ow, 2)};
}

// Ends of nearly equal parts of `count`, each of at most `most`.
template <class F>
void for_each_part(int64_t count, int64_t most, const F& run) {
  const int64_t parts = ceil_div(count, most);
  for_each_item(parts, [&](int64_t part) { run(part * count / parts, (part + 1) * count / parts); });
}

}  // namespace

bool winograd_suits(const Tensor& weight) {
  const Tensor flat = torch::stable::contiguous(weight);
  return winograd_suits(static_cast<const float*>(flat.data_ptr()), weight.size(0), weight.size(1));
}

bool winograd_suits(const float* weight, int64_t co, int64_t c) {
  constexpr int64_t kSample = 16;
  const WinogradTable& k = winograd_kernels();
  return k.has_all_taps(weight, co, c, kSample) || k.has_all_taps(weight, co, c, std::max(co, c));
}

WinogradItems winograd_items(const Winograd& g, const Block& b) {
  const WinogradTable& k = winograd_kernels();
  const int64_t of_image = g.tiles_h * g.tiles_w, tiles = g.n * of_image;
  const int64_t per_tile = kWinogradPositions * (group_up(g.c) + k.width);
  const int64_t least = kWinogradPositions * group_up(g.co) * g.c > kLargeWeightFloats ? 2 * kLeastTiles : kLeastTiles;
  const int64_t most = std::max(least, std::min(kWinogradItemFloats / per_tile, ceil_div(tiles, wanted_items())));
  int64_t images = 1, rows = b.out_h;
  if (of_image <= most) {
    images = ceil_div(g.n, ceil_div(g.n, std::max<int64_t>(1, (most + of_image / 2) / of_image)));
  } else {
    rows = ceil_div(b.out_h, ceil_div(of_image, most));
    // Tiles are two rows of the map; those that windows share are computed twice.
    rows = std::min(b.out_h, std::max(rows + rows % 2, b.pool_kh > b.pool_sh ? kOverlappingRows : 1));
  }
  const int64_t bands = ceil_div(b.out_h, rows), items = ceil_div(g.n, images) * bands;
  const int64_t panels = ceil_div(g.co, k.width);
  const int64_t parts = std::min(panels, ceil_div(wanted_items(), items));
  const int64_t part_channels = ceil_div(panels, parts) * k.width;
  return {images, rows, bands, parts, part_channels, items * parts, k.forward_scratch(g, b, images, rows)};
}

WinogradItem WinogradItems::at(const Winograd& g, const Block& b, int64_t i) const {
  const int64_t part = i % parts, band = i / parts % bands, image = i / parts / bands * images;
  return {image,
          std::min(images, g.n - image),
          band * rows,
          std::min(b.out_h, (band + 1) * rows),
          part * part_channels,
          std::min(g.co, (part + 1) * part_channels)};
}

WinogradConvolution::WinogradConvolution(const Tensor& weight, bool transposed)
    : c_(weight.size(transposed ? 0 : 1)),
      co_(weight.size(transposed ? 1 : 0)),
      transformed_(new_floats(weight, kWinogradPositions * group_up(co_) * c_)) {
  const WinogradTable& k = winograd_kernels();
  const int64_t outer = weight.size(1) * 9, o_stride = transposed ? 9 : outer, i_stride = transposed ? outer : 9;
  const Tensor flat = torch::stable::contiguous(weight);
  const float* from = static_cast<const float*>(flat.data_ptr());
  float* to = static_cast<float*>(transformed_.data_ptr());
  for_each_item(ceil_div(co_, k.width),
                [&](int64_t panel) { k.transform_weight(from, co_, c_, o_stride, i_stride, transposed, panel, to); });
}

bool WinogradConvolution::run(const Block& b, const Tensor& x, const std::optional<Tensor>& bias,
                              const Outputs& out) const {
  const WinogradTable& k = winograd_kernels();
  const Tensor input = with_channels_inside(x);
  const Winograd g = describe(input, co_, b.oh, b.ow, b.ph, b.pw);
  AlignedFloats added(group_up(co_));
  if (bias) {
    const Tensor flat = torch::stable::contiguous(*bias);
    std::copy_n(static_cast<const float*>(flat.data_ptr()), co_, added.data());
  }
  const WinogradItems items = winograd_items(g, b);
  const float* from = static_cast<const float*>(input.data_ptr());
  const float* weight = static_cast<const float*>(transformed_.data_ptr());
  std::atomic<bool> finite{true};
  for_each_item(items.count, [&](int64_t item) {
    const WinogradItem what = items.at(g, b, item);
    if (what.channel0 < co_ &&
        !k.forward(g, b, from, weight, added.data(), out, what, thread_scratch(items.scratch_floats)))
      finite = false;
  });
  return finite;
}

bool WinogradConvolution::run(const Tensor& x, int64_t ph, int64_t pw, int64_t oh, int64_t ow,
                              const std::optional<Tensor>& bias, float* map) const {
  Block b{};
  b.n = x.size(0), b.co = co_, b.ph = ph, b.pw = pw;
  b.oh = b.out_h = oh, b.ow = b.out_w = ow;
  b.pool_kh = b.pool_kw = b.pool_sh = b.pool_sw = b.pool_dh = b.pool_dw = 1;
  const int64_t strides[4] = {oh * ow * co_, 1, ow * co_, co_};
  std::copy_n(strides, 4, b.out_stride);
  return run(b, x, bias, {map, nullptr, nullptr});
}

WinogradWeightGrad::WinogradWeightGrad(const Tensor& weight)
    : c_(weight.size(1)),
      co_(weight.size(0)),
      sums_(new_floats(weight, kWinogradPositions * group_up(c_) * group_up(co_))) {}

void WinogradWeightGrad::add(const Tensor& x, const Tensor& grad, int64_t ph, int64_t pw) {
  const WinogradTable& k = winograd_kernels();
  const Tensor input = with_channels_inside(x);
  const Winograd g = describe(input, co_, grad.size(1), grad.size(2), ph, pw);
  const int64_t tiles = g.n * g.tiles_h * g.tiles_w, per_tile = kWinogradPositions * (group_up(c_) + group_up(co_));
  const int64_t most =
      std::max<int64_t>(kLeastTiles, std::max<int64_t>(kPartFloats, kPartSums * sums_.numel()) / per_tile);
  const int64_t parts = ceil_div(tiles, most);
  const float* from = static_cast<const float*>(input.data_ptr());
  const float* grads = static_cast<const float*>(grad.data_ptr());
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t start = part * tiles / parts, count = (part + 1) * tiles / parts - start;
    const Tensor inputs = new_floats(x, k.tile_floats(count, c_));
    const Tensor map = new_floats(x, k.tile_floats(count, co_));
    float *to_inputs = static_cast<float*>(inputs.data_ptr()), *to_map = static_cast<float*>(map.data_ptr());
    for_each_part(count, std::max<int64_t>(1, ceil_div(count, wanted_items())), [&](int64_t first, int64_t last) {
      k.transform_input(g, from, start, count, start + first, start + last, to_inputs, thread_scratch(group_up(c_)));
      k.transform_grad(g, grads, start, count, start + first, start + last, to_map);
    });
    const int64_t groups = group_up(c_) / kCodeGroup;
    const int64_t shares =
        std::min(groups, std::max(ceil_div(groups, kMostGroups), wanted_items() / kWinogradPositions));
    float* sums = static_cast<float*>(sums_.data_ptr());
    for_each_item(kWinogradPositions * shares, [&](int64_t item) {
      const int64_t share = item % shares;
      k.add_products(g, to_inputs, to_map, count, item / shares, share * groups / shares, (share + 1) * groups / shares,
                     !empty_, sums);
    });
    empty_ = false;
  }
}

bool WinogradWeightGrad::result(float* to) const {
  if (empty_) {
    std::fill_n(to, co_ * c_ * 9, 0.f);
    return true;
  }
  const WinogradTable& k = winograd_kernels();
  const float* sums = static_cast<const float*>(sums_.data_ptr());
  Winograd g{};
  g.c = c_;
  g.co = co_;
  std::atomic<bool> finite{true};
  for_each_item(group_up(co_) / kCodeGroup, [&](int64_t group) {
    if (!k.weight_grad(g, sums, group, to)) finite = false;
  });
  return finite;
}

}  // namespace cnnlstm_fast
