#include "packed_map.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "block_rows.h"
#include "conv_plan.h"
#include "memory.h"

namespace cnnlstm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor PackedMap::run(const BlockDescription& description, const Ints& order, const Tensor& x,
                      const std::optional<Tensor>& added) const {
  const Block& b = description.block;
  const bool activates = b.activation != kNone;
  if (!b.pooled && order == Ints{0, 2, 3, 1} && (!activates || can_activate())) return map_of(b, x, added, activates);
  const ScalarType dtype = b.dtype == kBFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  const Tensor out = new_output(x, result_shape(description), dtype);
  const Outputs outputs{out.data_ptr(), nullptr, nullptr};
  const int64_t chunk = chunked_plan().images_per_chunk(b);
  auto images = [](const Tensor& t, int64_t n0, int64_t count) {
    return torch::stable::narrow(const_cast<Tensor&>(t), 0, n0, count);
  };
  for (int64_t n0 = 0; n0 < b.n; n0 += chunk) {
    const int64_t count = std::min(chunk, b.n - n0);
    const Tensor map = map_of(b, images(x, n0, count), added ? images(*added, n0, count) : added, false);
    run_epilogue(b, map.data_ptr(), n0, count, nullptr, nullptr, outputs);
  }
  return out;
}

}  // namespace cnnlstm_fast
