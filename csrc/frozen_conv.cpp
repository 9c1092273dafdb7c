#include "frozen_conv.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "block_description.h"
#include "cpu/dispatch.h"
#include "limits.h"
#include "memory.h"
#include "threads.h"
#include "winograd_conv.h"

namespace cnnlstm_fast {

void check_activation(int64_t activation, const Floats& act) {
  STD_TORCH_CHECK(activation >= 0 && activation < kActivations && act.size() == activation_numbers(activation),
                  "frozen_conv: no such activation");
}

namespace {

// Inputs and sums of one item: what a second-level cache holds beside a panel of weights.
const int64_t kFrozenItemFloats = limit("FROZEN_ITEM_FLOATS", 96 * 1024, 1);
// Multiply-adds that one thread does sooner than another is woken.
const int64_t kFrozenItemWork = limit("FROZEN_ITEM_WORK", int64_t{1} << 19, 1);
// Taps of a panel that pass at a time, of convolutions and of products: weights stay in the second-level cache, and
// sums are not too long.
const int64_t kDepth = limit("FROZEN_DEPTH", 2048, 1);
const int64_t kProductDepth = limit("FROZEN_PRODUCT_DEPTH", 512, 1);
// Channels up to which planes stay planes.
constexpr int64_t kFewPlanes = 8;
// Positions of a part of a row, at least, if it is not to be short of full tiles.
constexpr int64_t kLeastColumns = 56;

void check_description(const FrozenConvDescription& d) {
  auto in_range = [](const Ints& values, auto may_be_zero) {
    for (size_t i = 0; i < values.size(); ++i)
      if (values[i] < (may_be_zero(i) ? 0 : 1) || values[i] > std::numeric_limits<int32_t>::max()) return false;
    return true;
  };
  STD_TORCH_CHECK(
      (d.conv.size() == 7 || d.conv.size() == 9) &&
          in_range(d.conv, [](size_t i) { return i == 2 || i == 3 || i > 6; }),
      "frozen_conv: conv must be [stride, padding, dilation (h, w each), groups, more padding after (h, w)]");
  STD_TORCH_CHECK(
      (d.pool.empty() || d.pool.size() == 9) && in_range(d.pool, [](size_t i) { return i == 4 || i == 5 || i == 8; }),
      "frozen_conv: pool must be empty or have 9 values");
  STD_TORCH_CHECK(in_range({d.channels, d.out_channels, d.kernel_h, d.kernel_w}, [](size_t) { return false; }) &&
                      d.channels % d.conv[6] == 0 && d.out_channels % d.conv[6] == 0,
                  "frozen_conv: no convolution of ", d.channels, " to ", d.out_channels,
                  " channels with groups=", d.conv[6]);
  elements("a weight", {d.out_channels, d.channels / d.conv[6], d.kernel_h, d.kernel_w});
  check_activation(d.activation, d.act);
  for (const Ints* order : {&d.in_order, &d.out_order}) {
    Ints sorted = *order;
    std::sort(sorted.begin(), sorted.end());
    STD_TORCH_CHECK((sorted == Ints{0, 1, 2, 3}), "frozen_conv: an order must be a permutation of 0, 1, 2, 3");
  }
  if (d.pool.empty()) return;
  STD_TORCH_CHECK(d.pool[0] <= kByteWindow && d.pool[1] <= kByteWindow && d.pool[0] * d.pool[1] <= kByteWindow,
                  "frozen_conv: a pool window has more than ", kByteWindow, " elements");
  STD_TORCH_CHECK(d.pool[4] <= d.pool[0] / 2 && d.pool[5] <= d.pool[1] / 2,
                  "frozen_conv: pool padding is more than half the kernel");
}

Block block_of(const FrozenConvDescription& d) {
  check_description(d);
  Block b{};
  b.c = d.channels, b.co = d.out_channels, b.kh = d.kernel_h, b.kw = d.kernel_w;
  b.sh = d.conv[0], b.sw = d.conv[1], b.ph = d.conv[2], b.pw = d.conv[3], b.dh = d.conv[4], b.dw = d.conv[5];
  b.groups = d.conv[6];
  b.taps = b.c / b.groups * b.kh * b.kw;
  b.activation = static_cast<int32_t>(d.activation);
  for (size_t i = 0; i < d.act.size(); ++i) b.act[i] = static_cast<float>(d.act[i]);
  b.dtype = kFloat32;
  b.pooled = !d.pool.empty();
  const int64_t none[9] = {1, 1, 1, 1, 0, 0, 1, 1, 0}, *p = b.pooled ? d.pool.data() : none;
  b.pool_kh = p[0], b.pool_kw = p[1], b.pool_sh = p[2], b.pool_sw = p[3], b.pool_ph = p[4], b.pool_pw = p[5];
  b.pool_dh = p[6], b.pool_dw = p[7];
  return b;
}

// Everything that depends on the size of the input.
void set_size(const FrozenConvDescription& d, int64_t n, int64_t h, int64_t w, Block& b) {
  const int64_t after_h = d.conv.size() > 7 ? d.conv[7] : 0, after_w = d.conv.size() > 7 ? d.conv[8] : 0;
  const bool ceil = b.pooled && d.pool[8];
  STD_TORCH_CHECK(n >= 0 && h >= 1 && w >= 1, "frozen_conv: no input of ", n, " images of ", h, "x", w);
  b.n = n, b.h = h, b.w = w;
  elements("an input", {n, b.c, h, w});
  b.padded_h = h + 2 * b.ph + after_h, b.padded_w = w + 2 * b.pw + after_w;
  b.oh = out_length(h + after_h, b.kh, b.sh, b.ph, b.dh, false);
  b.ow = out_length(w + after_w, b.kw, b.sw, b.pw, b.dw, false);
  STD_TORCH_CHECK(b.oh >= 1 && b.ow >= 1, "frozen_conv: an input of ", h, "x", w, " is too small for the kernel");
  elements("a map", {n, b.co, b.oh, b.ow});
  elements("an input with its padding", {b.c, b.padded_h, b.padded_w});
  b.out_h = b.oh, b.out_w = b.ow;
  if (!b.pooled) return;
  b.out_h = out_length(b.oh, b.pool_kh, b.pool_sh, b.pool_ph, b.pool_dh, ceil);
  b.out_w = out_length(b.ow, b.pool_kw, b.pool_sw, b.pool_pw, b.pool_dw, ceil);
  STD_TORCH_CHECK(b.out_h >= 1 && b.out_w >= 1 &&
                      windows_meet(b.oh, b.out_h, b.pool_kh, b.pool_sh, b.pool_ph, b.pool_dh) &&
                      windows_meet(b.ow, b.out_w, b.pool_kw, b.pool_sw, b.pool_pw, b.pool_dw),
                  "frozen_conv: a map of ", b.oh, "x", b.ow, " is too small for the pool");
}

void dense(const Ints& order, int64_t n, int64_t c, int64_t h, int64_t w, int64_t* strides) {
  const int64_t size[4] = {n, c, h, w};
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    strides[order[i]] = stride;
    stride *= size[order[i]];
  }
}

bool is_depthwise(const Block& b) {
  return b.groups > 1 && b.groups == b.c && b.co == b.c;
}

// Channels of the packed bias, and of a tap of all groups.
int64_t packed_channels(const Block& b) {
  const int64_t lanes = frozen_kernels().lanes;
  return is_depthwise(b) ? round_up(b.co, lanes) : b.groups * round_up(b.co / b.groups, lanes);
}

int64_t panels_of(const Block& b) {
  const FrozenTable& k = frozen_kernels();
  return is_depthwise(b) ? ceil_div(b.co, k.lanes) : b.groups * ceil_div(b.co / b.groups, k.panel);
}

// Whether the taps are ordered for planes: by the description alone, since they are packed before any input is seen.
bool packs_planes(const FrozenConvDescription& d) {
  return d.in_order[3] == 3 && d.conv[6] == 1 && d.channels > 1 && d.channels <= kFewPlanes;
}

// Whether weights are packed for Winograd's method too, if their taps suit it.
bool may_winograd(const FrozenConvDescription& d, const Block& b) {
  constexpr int64_t kFew = 8;
  return d.winograd && b.kh == 3 && b.kw == 3 && b.sh * b.sw * b.dh * b.dw * b.groups == 1 && b.c >= kFew &&
         b.co >= kFew && d.in_order[3] == 1;
}

// Where the parts of packed weights lie, in floats. The first float is 1 where Winograd's method serves.
struct Packed {
  int64_t bias = kMaxVector, taps, winograd, end;
  Packed(const FrozenConvDescription& d, const Block& b) {
    taps = bias + round_up(packed_channels(b), kMaxVector);
    winograd = taps + round_up(packed_channels(b) * b.taps, kMaxVector);
    end = winograd + (may_winograd(d, b) ? kWinogradPositions * b.c * round_up(b.co, kCodeGroup) : 0);
  }
};

// Whether channels lie side by side and positions evenly behind each other, `step` floats apart.
bool is_matrix(const int64_t* s, int64_t n, int64_t h, int64_t w) {
  return s[1] == 1 && (h == 1 || s[2] == w * s[3]) && (n == 1 || s[0] == h * w * s[3]);
}

}  // namespace

// How one call is divided.
struct FrozenConv::Plan {
  Block b;  // of a product: one row of all positions
  FrozenCall call;
  int64_t added_stride[4];
  bool depthwise, product;
  int64_t depth;                          // of a chunk of the sum
  int64_t images, rows, columns, panels;  // of an item
  int64_t image_parts, bands, column_parts, panel_parts;
  int64_t runs, shared_floats, item_floats, workers;

  bool by_winograd;
  Winograd winograd;
  WinogradItems winograd_items;
  const float* winograd_weight;
  int64_t winograd_workers, winograd_floats;

  int64_t items() const { return image_parts * bands * column_parts * panel_parts; }
  // Also by Winograd's method the direct one may have to follow.
  int64_t floats() const { return std::max(shared_floats + workers * item_floats, winograd_workers * winograd_floats); }
  bool promises_winograd() const;
  void set_call();
  void divide();
  int64_t floats_of(int64_t some_rows, int64_t some_columns) const;
  int64_t map_columns(int64_t pooled) const;
  int64_t input_columns(int64_t pooled) const { return (map_columns(pooled) - 1) * b.sw + (b.kw - 1) * b.dw + 1; }
  Block part(int64_t col0, int64_t col1, FrozenItem& item) const;
  void put_runs(FrozenRun* to, int64_t* chunk_ends) const;
};

int64_t FrozenConv::Plan::map_columns(int64_t pooled) const {
  return std::min(b.ow, (pooled - 1) * b.pool_sw + (b.pool_kw - 1) * b.pool_dw + 1);
}

// Floats that an item of one image works on.
int64_t FrozenConv::Plan::floats_of(int64_t some_rows, int64_t some_columns) const {
  const int64_t map_rows = std::min(b.oh, (some_rows - 1) * b.pool_sh + (b.pool_kh - 1) * b.pool_dh + 1);
  const int64_t in_rows = (map_rows - 1) * b.sh + (b.kh - 1) * b.dh + 1;
  const int64_t input = in_rows * input_columns(some_columns) * std::min(b.c, product ? depth : b.c);
  return input + map_rows * map_columns(some_columns) * frozen_kernels().panel;
}

// How the kernels read the input.
void FrozenConv::Plan::set_call() {
  constexpr int64_t kPage = 1024;  // floats: lines so far apart share a set of the first-level cache
  const bool padded = b.padded_h != b.h || b.padded_w != b.w;
  const bool inside = call.planes ? b.x_stride[3] == 1 : b.x_stride[1] == 1;
  call.by_chunk = product && (b.taps > depth || b.sw * b.x_stride[3] % kPage == 0);
  call.copied = call.by_chunk || padded || !inside || (!call.planes && b.sw * b.x_stride[3] % kPage == 0);
  call.direct = !b.pooled && b.activation <= kHardtanh && b.out_stride[1] == 1 && added_stride[1] == 1;
  call.chunks = depthwise ? 1 : ceil_div(b.taps, depth);
}

void FrozenConv::Plan::divide() {
  const int64_t all_panels = panels_of(b), threads = torch::stable::get_num_threads();
  const int64_t work = b.n * b.oh * b.ow * b.co * b.taps;
  const int64_t most = std::max<int64_t>(1, work / kFrozenItemWork),
                wanted = threads > 1 ? std::min(4 * threads, most) : 1;
  images = 1, rows = b.out_h, columns = b.out_w;
  while (columns > kLeastColumns && floats_of(1, columns) > kFrozenItemFloats) columns = ceil_div(columns, 2);
  for (int64_t parts = 1; rows > 1 && floats_of(rows, columns) > kFrozenItemFloats; ++parts)
    rows = ceil_div(b.out_h, parts);
  if (rows == b.out_h && columns == b.out_w)
    images = std::clamp<int64_t>(std::min(kFrozenItemFloats / floats_of(rows, columns), b.n / wanted), 1, b.n);
  auto count = [&] { return ceil_div(b.n, images) * ceil_div(b.out_h, rows) * ceil_div(b.out_w, columns); };
  const int64_t parts = std::min(all_panels, ceil_div(wanted, count()));
  panels = ceil_div(all_panels, parts);
  const int64_t overlap = b.pool_kh > b.pool_sh ? 4 : 1;
  if (count() * parts < wanted && b.out_h > overlap)
    rows = std::max(overlap, std::min(rows, ceil_div(b.out_h, ceil_div(wanted, ceil_div(b.n, images) * parts))));
  if (count() * parts < wanted && columns > kLeastColumns)
    columns = std::max(kLeastColumns, ceil_div(columns, ceil_div(wanted, count() * parts)));
  image_parts = ceil_div(b.n, images), bands = ceil_div(b.out_h, rows), column_parts = ceil_div(b.out_w, columns);
  panel_parts = ceil_div(all_panels, panels);
  workers = std::clamp<int64_t>(std::min(threads, most), 1, items());

  call.line = input_columns(columns);
  const int64_t pixel = b.sw * b.c % 512 ? b.c : b.c + kMaxVector;
  if (call.by_chunk) {
    call.col_step = depth + kMaxVector, call.row_step = 0, call.channel_step = 1;
  } else if (!call.copied) {
    call.row_step = b.x_stride[2], call.col_step = b.x_stride[3], call.channel_step = b.x_stride[1];
  } else if (call.planes) {
    call.row_step = b.c * call.line, call.col_step = 1, call.channel_step = call.line;
  } else {
    call.row_step = call.line * pixel, call.col_step = pixel, call.channel_step = 1;
  }
  const int64_t windows = b.kh * b.kw * (call.planes ? b.c : 1);
  runs = windows + call.chunks;
  shared_floats = round_up((runs * sizeof(FrozenRun) + call.chunks * sizeof(int64_t)) / sizeof(float), kMaxVector);
  Block widest = b;  // the first part of a padded pool has fewer columns of the map
  widest.ow = map_columns(columns), widest.out_w = columns;
  item_floats = round_up(frozen_kernels().item_scratch(widest, call, images, rows, panels), 1024);
}

// Pooled columns [col0, col1) as an image of their own, without the columns that no tap reads.
Block FrozenConv::Plan::part(int64_t col0, int64_t col1, FrozenItem& item) const {
  Block p = b;
  p.out_w = std::min(col1, b.out_w) - col0;
  const int64_t start = col0 * b.pool_sw - b.pool_pw, map0 = std::max<int64_t>(0, start);
  const int64_t map1 = std::min(b.ow, start + (p.out_w - 1) * b.pool_sw + (b.pool_kw - 1) * b.pool_dw + 1);
  p.pool_pw = map0 - start;
  p.ow = map1 - map0;
  p.padded_w = (p.ow - 1) * b.sw + (b.kw - 1) * b.dw + 1;
  const int64_t at = map0 * b.sw - b.pw, in0 = std::clamp<int64_t>(at, 0, b.w);
  p.pw = std::min(in0 - at, p.padded_w);
  if (at >= b.w) p.pw = 0;
  p.w = std::max<int64_t>(0, std::min(b.w, at + p.padded_w) - in0);
  item.x += in0 * b.x_stride[3];
  item.out += col0 * b.out_stride[3];
  if (item.added) item.added += map0 * added_stride[3];
  return p;
}

// The runs of all taps, cut where a chunk ends.
void FrozenConv::Plan::put_runs(FrozenRun* to, int64_t* chunk_ends) const {
  const FrozenRun* const begin = to;
  int64_t done = 0, chunk = 0, i = 0;
  auto put = [&](int64_t offset, int64_t length) {
    while (length > 0) {
      const int64_t end = (chunk + 1) * b.taps / call.chunks, now = std::min(length, end - done);
      *to++ = {offset, now, i};
      offset += now, done += now, length -= now;
      if (done == end) chunk_ends[chunk++] = to - begin;
    }
  };
  const int64_t cg = b.c / b.groups;
  for (; i < b.kh; ++i) {
    const int64_t row = i * b.dh * call.row_step;
    if (call.planes) {
      for (int64_t c = 0; c < b.c; ++c)
        for (int64_t j = 0; j < b.kw; j += b.dw == 1 ? b.kw : 1)
          put(row + c * call.channel_step + j * b.dw * call.col_step, b.dw == 1 ? b.kw : 1);
    } else if (b.dw == 1 && b.groups == 1 && call.col_step == b.c && !call.by_chunk) {
      put(row, b.kw * b.c);
    } else {
      for (int64_t j = 0; j < b.kw; ++j) put(row + j * b.dw * call.col_step, cg);
    }
  }
}

FrozenConv::FrozenConv(const FrozenConvDescription& description, const float* weight, const float* bias)
    : description_(description),
      block_(block_of(description)),
      own_(std::in_place, packed_floats(description)),
      packed_(own_->data()) {
  pack_into(description, weight, bias, own_->data());
}

FrozenConv::FrozenConv(const FrozenConvDescription& description, const float* packed)
    : description_(description), block_(block_of(description)), packed_(packed) {}

int64_t FrozenConv::packed_floats(const FrozenConvDescription& description) {
  return Packed(description, block_of(description)).end;
}

void FrozenConv::pack_into(const FrozenConvDescription& description, const float* weight, const float* bias,
                           float* to) {
  const Block b = block_of(description);
  const Packed places(description, b);
  const FrozenTable& k = frozen_kernels();
  std::memset(to, 0, places.end * sizeof(float));
  const int64_t of_group = b.co / b.groups, padded = packed_channels(b) / (is_depthwise(b) ? 1 : b.groups);
  for (int64_t c = 0; bias && c < b.co; ++c)
    to[places.bias + (is_depthwise(b) ? c : c / of_group * padded + c % of_group)] = bias[c];
  if (is_depthwise(b)) {
    for (int64_t c = 0; c < b.co; ++c)
      for (int64_t t = 0; t < b.taps; ++t) to[places.taps + t * padded + c] = weight[c * b.taps + t];
    return;
  }
  for_each_item(panels_of(b),
                [&](int64_t panel) { k.pack(b, weight, packs_planes(description), panel, to + places.taps); });
  if (!may_winograd(description, b) || !winograd_suits(weight, b.co, b.c)) return;
  to[0] = 1.f;
  const WinogradTable& w = winograd_kernels();
  for_each_item(ceil_div(b.co, w.width), [&](int64_t panel) {
    w.transform_weight(weight, b.co, b.c, b.taps, 9, false, panel, to + places.winograd);
  });
}

bool FrozenConv::has_winograd() const {
  return packed_[0] != 0.f;
}

std::vector<int64_t> FrozenConv::out_size(int64_t h, int64_t w) const {
  Block b = block_;
  set_size(description_, 1, h, w, b);
  return {b.out_h, b.out_w};
}

FrozenConv::Plan FrozenConv::plan_of(const FrozenConvCall& call) const {
  Plan p{};
  Block& b = p.b;
  b = block_;
  set_size(description_, call.n, call.h, call.w, b);
  auto put = [&](const std::optional<MapStrides>& given, const Ints& order, int64_t c, int64_t h, int64_t w,
                 int64_t* to) {
    if (given)
      std::copy_n(given->of, 4, to);
    else
      dense(order, b.n, c, h, w, to);
  };
  put(call.x_strides, description_.in_order, b.c, b.h, b.w, b.x_stride);
  put(call.out_strides, description_.out_order, b.co, b.out_h, b.out_w, b.out_stride);
  if (description_.adds)
    put(call.added_strides, description_.out_order, b.co, b.oh, b.ow, p.added_stride);
  else
    p.added_stride[1] = 1;
  if (b.c == 1) b.x_stride[1] = 1;  // of a single channel any stride will do
  if (b.co == 1) b.out_stride[1] = p.added_stride[1] = 1;
  p.depthwise = is_depthwise(b);
  p.product = b.kh * b.kw * b.sh * b.sw * b.groups == 1 && b.padded_h == b.h && b.padded_w == b.w && !b.pooled &&
              is_matrix(b.x_stride, b.n, b.h, b.w) && is_matrix(b.out_stride, b.n, b.h, b.w) &&
              (!description_.adds || is_matrix(p.added_stride, b.n, b.h, b.w));
  if (p.product) {
    b.w = b.padded_w = b.ow = b.out_w = b.n * b.h * b.w;
    b.n = b.h = b.padded_h = b.oh = b.out_h = 1;
  }
  p.depth = p.product ? kProductDepth : kDepth;
  p.call.planes = packs_planes(description_);
  const Packed places(description_, b);
  p.call.weight = packed_ + places.taps;
  p.call.bias = packed_ + places.bias;
  p.winograd_weight = packed_ + places.winograd;
  p.set_call();
  if (b.n == 0) return p;
  p.divide();
  const bool serves = has_winograd() && b.x_stride[1] == 1 && call.method != FrozenMethod::kDirect;
  if (!serves) return p;
  p.winograd = {b.n,
                b.c,
                b.h,
                b.w,
                b.co,
                b.oh,
                b.ow,
                b.ph,
                b.pw,
                {b.x_stride[0], b.x_stride[2], b.x_stride[3]},
                ceil_div(b.oh, 2),
                ceil_div(b.ow, 2)};
  p.by_winograd = call.method == FrozenMethod::kWinograd || p.promises_winograd();
  if (!p.by_winograd) return p;
  p.winograd_items = cnnlstm_fast::winograd_items(p.winograd, b);
  p.winograd_workers = std::clamp<int64_t>(torch::stable::get_num_threads(), 1, p.winograd_items.count);
  p.winograd_floats = round_up(p.winograd_items.scratch_floats, 1024);
  return p;
}

// Estimates in cycles that a processor with a vector's multiply-add a cycle takes.
bool FrozenConv::Plan::promises_winograd() const {
  constexpr double kTransforms = 60, kProduct = 1.1, kLine = 1.5;  // of a vector at all positions; a line of weights
  const double lanes = frozen_kernels().lanes, tiles = static_cast<double>(b.n * winograd.tiles_h * winograd.tiles_w);
  const double c = static_cast<double>(b.c), co = static_cast<double>(round_up(b.co, kCodeGroup));
  const double direct = static_cast<double>(b.n * b.oh * b.ow) * 9 * c * co / lanes + kLine * 9 * c * co / 16;
  const double products = 16 * tiles * c * co / lanes * kProduct + kLine * 16 * c * co / 16;
  return products + kTransforms * tiles * (c + co) / lanes < direct;
}

int64_t FrozenConv::scratch_bytes(const FrozenConvCall& call) const {
  return plan_of(call).floats() * static_cast<int64_t>(sizeof(float));
}

void FrozenConv::run(const FrozenConvCall& call, void* scratch, int64_t scratch_bytes) const {
  Plan plan = plan_of(call);
  if (plan.b.n == 0) return;
  STD_TORCH_CHECK(!description_.adds || call.added, "frozen_conv: the tensor to add is missing");
  const int64_t room = scratch_bytes / static_cast<int64_t>(sizeof(float));
  STD_TORCH_CHECK(room >= std::max(plan.shared_floats + plan.item_floats, plan.winograd_floats),
                  "frozen_conv: scratch of ", scratch_bytes, " bytes is too small: ask scratch_bytes");
  float* memory = static_cast<float*>(scratch);
  if (!plan.by_winograd || !run_winograd(plan, call, memory, room)) run_direct(plan, call, memory, room);
}

namespace {

// Runs items on `workers` threads, each with a part of `memory`.
template <class F>
void share_items(int64_t items, int64_t workers, float* memory, int64_t floats, const F& run) {
  if (workers == 1) {
    const FlushDenormals flush;
    for (int64_t i = 0; i < items; ++i) run(i, memory);
    return;
  }
  std::atomic<int64_t> next{0};
  in_parallel(0, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t i = next++; i < items; i = next++) run(i, memory + worker * floats);
  });
}

}  // namespace

void FrozenConv::run_direct(Plan& plan, const FrozenConvCall& given, float* scratch, int64_t floats) const {
  FrozenRun* runs = reinterpret_cast<FrozenRun*>(scratch);
  int64_t* chunk_ends = reinterpret_cast<int64_t*>(runs + plan.runs);
  plan.put_runs(runs, chunk_ends);
  plan.call.runs = runs;
  plan.call.chunk_ends = chunk_ends;
  const int64_t workers = std::min(plan.workers, (floats - plan.shared_floats) / plan.item_floats);
  const FrozenTable& k = frozen_kernels();
  const auto run_item = plan.depthwise ? k.depthwise : k.run;
  const int64_t all_panels = panels_of(plan.b);
  share_items(plan.items(), workers, scratch + plan.shared_floats, plan.item_floats, [&](int64_t item, float* own) {
    const int64_t panel = item % plan.panel_parts, column = item / plan.panel_parts % plan.column_parts;
    const int64_t band = item / plan.panel_parts / plan.column_parts % plan.bands;
    const int64_t image = item / plan.panel_parts / plan.column_parts / plan.bands * plan.images;
    FrozenItem what{given.x, given.out, description_.adds ? given.added : nullptr, plan.added_stride};
    what.image = image, what.images = std::min(plan.images, plan.b.n - image);
    what.row0 = band * plan.rows, what.row1 = std::min(plan.b.out_h, (band + 1) * plan.rows);
    what.panel0 = panel * plan.panels, what.panel1 = std::min(all_panels, (panel + 1) * plan.panels);
    const Block part = plan.part(column * plan.columns, (column + 1) * plan.columns, what);
    run_item(part, plan.call, what, own);
  });
}

bool FrozenConv::run_winograd(const Plan& plan, const FrozenConvCall& given, float* scratch, int64_t floats) const {
  const WinogradTable& k = winograd_kernels();
  const Outputs out = {given.out, nullptr, nullptr, description_.adds ? given.added : nullptr, plan.added_stride};
  std::atomic<bool> finite{true};
  const int64_t workers = std::min(plan.winograd_workers, floats / plan.winograd_floats);
  share_items(plan.winograd_items.count, workers, scratch, plan.winograd_floats, [&](int64_t item, float* own) {
    const WinogradItem what = plan.winograd_items.at(plan.winograd, plan.b, item);
    if (what.channel0 >= plan.b.co || !finite) return;
    if (!k.forward(plan.winograd, plan.b, given.x, plan.winograd_weight, plan.call.bias, out, what, own))
      finite = false;
  });
  return finite;
}

}  // namespace cnnlstm_fast
