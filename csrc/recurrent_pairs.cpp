#include "recurrent_pairs.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "memory.h"
#include "op.h"
#include "recurrent_packing.h"
#include "tensors.h"
#include "threads.h"

namespace cnnlstm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const BFloat16Table* low_kernels(ScalarType dtype, bool projected) {
  return dtype == ScalarType::BFloat16 && !projected ? bfloat16_kernels() : nullptr;
}

Tensor as_word_rows(const Tensor& t, const BFloat16Table& low) {
  const int64_t last = t.dim() - 1, size = t.size(last), padded = 2 * row_words(size, low);
  bool words = size == padded && t.stride(last) == 1 && reinterpret_cast<uintptr_t>(t.data_ptr()) % 4 == 0;
  for (int64_t i = 0; i < last; ++i) words &= t.stride(i) % 2 == 0 || t.size(i) <= 1;
  if (words) return t;
  if (size == padded) return torch::stable::clone(torch::stable::contiguous(t));
  Ints shape = sizes(t);
  shape[last] = padded;
  Tensor rows = torch::stable::new_zeros(t, shape);
  Tensor inside = torch::stable::narrow(rows, last, 0, size);
  torch::stable::copy_(inside, t);
  return rows;
}

void use_words(const RecurrentCall& call, const Tensor& out, int64_t direction, const BFloat16Table& low,
               uint32_t* h_pairs, PairLayer& l) {
  l.inputs = row_words(call.inputs, low), l.x_step /= l.x_step == kPacked ? 1 : 2, l.x_sequence /= 2;
  l.out_low = static_cast<uint16_t*>(out.data_ptr()) + direction * call.width;
  l.h_words = row_words(call.width, low);
  l.h_pairs = h_pairs;
}

void pack_gate_words(const Tensor& words, int64_t mode, bool of_inputs, const BFloat16Table& low, float* to) {
  const RecurrentTable& k = low.recurrent;
  const int64_t gates = gates_of(mode), hidden = words.size(0) / gates;
  for_each_item(padded_units(hidden) / k.lanes, [&](int64_t i) {
    k.pack_gates(floats(words), words.stride(0) / 2, hidden, words.size(1) / 2, gates, gate_order(mode, of_inputs), to,
                 i * k.lanes, (i + 1) * k.lanes);
  });
}

namespace {

std::string bfloat16_unit() {
  return bfloat16_kernels() ? bfloat16_kernels()->name : "";
}

// sums (M, N) + a (M, K) @ b (K, N), as the unit makes it; K is even.
Tensor bfloat16_product(Tensor a, Tensor b, Tensor sums) {
  const char* op = "bfloat16_product";
  const BFloat16Table* low = bfloat16_kernels();
  STD_TORCH_CHECK(low, op, ": the processor has no unit for products of bfloat16");
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) % 2 == 0, op, ": expected a (M, K) and b (K, N), K even");
  const int64_t rows = a.size(0), words = a.size(1) / 2, columns = b.size(1), lanes = low->recurrent.lanes;
  check_argument(op, "a", a, sizes(a), ScalarType::BFloat16, Memory::kContiguous);
  check_argument(op, "b", b, {a.size(1), columns}, ScalarType::BFloat16, Memory::kContiguous);
  check_argument(op, "sums", sums, {rows, columns}, ScalarType::Float, Memory::kContiguous);
  Tensor found = torch::stable::clone(sums);
  const uint16_t* from = static_cast<const uint16_t*>(b.data_ptr());
  for (int64_t first = 0; first < columns; first += lanes) {
    const int64_t some = std::min(lanes, columns - first);
    std::vector<uint32_t> panel(words * lanes);
    for (int64_t k = 0; k < words; ++k)
      for (int64_t n = 0; n < some; ++n)
        panel[k * lanes + n] =
            from[2 * k * columns + first + n] | static_cast<uint32_t>(from[(2 * k + 1) * columns + first + n]) << 16;
    AlignedFloats part(rows * lanes);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(floats(sums) + r * columns + first, some, part.data() + r * lanes);
    low->multiply(static_cast<const uint32_t*>(a.data_ptr()), rows, words, panel.data(), part.data());
    for (int64_t r = 0; r < rows; ++r)
      std::copy_n(part.data() + r * lanes, some, mutable_floats(found) + r * columns + first);
  }
  return found;
}

}  // namespace

// The second is for tests: it shows how the kernels' products round.
STABLE_TORCH_LIBRARY_FRAGMENT(cnnlstm_fast, m) {
  m.def("bfloat16_unit() -> str");
  m.def("bfloat16_product(Tensor a, Tensor b, Tensor sums) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CompositeExplicitAutograd, m) {
  m.impl("bfloat16_unit", CNNLSTM_FAST_OP(bfloat16_unit));
}

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CPU, m) {
  m.impl("bfloat16_product", CNNLSTM_FAST_OP(bfloat16_product));
}

}  // namespace cnnlstm_fast
