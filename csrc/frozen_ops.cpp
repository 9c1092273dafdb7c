// Ops over FrozenConv, for tests, benchmarks and Python programs. Schema and terms: cnnlstm_fast/ops/frozen_conv.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "frozen_conv.h"
#include "memory.h"
#include "op.h"

namespace cnnlstm_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

FrozenConvDescription describe(const Ints& size, const Ints& conv, int64_t activation, const Floats& act, bool adds,
                               const Ints& pool, const Ints& in_order, const Ints& out_order) {
  STD_TORCH_CHECK(size.size() == 4, "frozen_conv: size must be [co, c / groups, kh, kw]");
  STD_TORCH_CHECK(conv.size() > 6 && conv[6] >= 1 && size[1] >= 1 && size[1] <= (int64_t{1} << 31) / conv[6],
                  "frozen_conv: no such groups");
  return {size[1] * conv[6], size[0], size[2], size[3], conv, activation, act, adds, pool, in_order, out_order};
}

Tensor frozen_conv_pack(Tensor weight, std::optional<Tensor> bias, Ints conv, Ints pool, Ints in_order,
                        Ints out_order) {
  STD_TORCH_CHECK(weight.dim() == 4, "frozen_conv: expected a 4-d weight, got ", weight.dim(), "-d");
  const FrozenConvDescription d = describe(sizes(weight), conv, kNone, {}, false, pool, in_order, out_order);
  check_argument("frozen_conv", "weight", weight, sizes(weight), ScalarType::Float);
  check_argument("frozen_conv", "bias", bias, {d.out_channels}, ScalarType::Float);
  const Tensor w = torch::stable::contiguous(weight);
  std::optional<Tensor> added;
  if (bias) added = torch::stable::contiguous(*bias);
  const Tensor packed = torch::stable::new_empty(w, Ints{FrozenConv::packed_floats(d)});
  FrozenConv::pack_into(d, floats(w), added ? floats(*added) : nullptr, mutable_floats(packed));
  return packed;
}

MapStrides map_strides(const Tensor& t) {
  return {{t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

Tensor frozen_conv(Tensor x, Tensor packed, std::optional<Tensor> added, Ints size, Ints conv, int64_t activation,
                   Floats act, Ints pool, Ints in_order, Ints out_order, int64_t method) {
  STD_TORCH_CHECK(method >= 0 && method <= 2, "frozen_conv: method must be 0, 1 or 2");
  STD_TORCH_CHECK(x.dim() == 4, "frozen_conv: expected a 4-d input, got ", x.dim(), "-d");
  const FrozenConvDescription d = describe(size, conv, activation, act, added.has_value(), pool, in_order, out_order);
  const int64_t n = x.size(0), h = x.size(2), w = x.size(3);
  check_argument("frozen_conv", "x", x, {n, d.channels, h, w}, ScalarType::Float);
  check_argument("frozen_conv", "packed", packed, {FrozenConv::packed_floats(d)}, ScalarType::Float,
                 Memory::kContiguous);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(packed.data_ptr()) % 64 == 0,
                  "frozen_conv: packed must begin at a multiple of 64 bytes: clone it");
  const FrozenConv kernel(d, floats(packed));
  const std::vector<int64_t> out_size = kernel.out_size(h, w);
  const int64_t shape[4] = {n, d.out_channels, out_size[0], out_size[1]};
  Ints ordered;
  for (int64_t axis : out_order) ordered.push_back(shape[axis]);
  const Tensor out = new_output(x, ordered, ScalarType::Float);
  if (n == 0) return out;
  FrozenConvCall call{n, h, w, floats(x), mutable_floats(out)};
  call.x_strides = map_strides(x);
  call.method = static_cast<FrozenMethod>(method);
  if (added) {
    FrozenConvDescription map = d;
    map.pool = {};
    const std::vector<int64_t> map_size = FrozenConv(map, floats(packed)).out_size(h, w);
    check_argument("frozen_conv", "added", added, {n, d.out_channels, map_size[0], map_size[1]}, ScalarType::Float);
    call.added = floats(*added);
    call.added_strides = map_strides(*added);
  }
  const int64_t bytes = kernel.scratch_bytes(call);
  kernel.run(call, thread_scratch(bytes / static_cast<int64_t>(sizeof(float))), bytes);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CPU, m) {
  m.impl("frozen_conv_pack", CNNLSTM_FAST_OP(frozen_conv_pack));
  m.impl("frozen_conv", CNNLSTM_FAST_OP(frozen_conv));
}

}  // namespace cnnlstm_fast
