#include "recurrent_pairs.h"

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <string>

#include "op.h"
#include "recurrent_packing.h"
#include "tensors.h"
#include "threads.h"

namespace cnnlstm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const BFloat16Table* low_kernels(const RecurrentCall& call) {
  const bool suits = call.dtype == ScalarType::BFloat16 && !call.directions[0].w_hr;
  return suits ? bfloat16_kernels() : nullptr;
}

Tensor as_word_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1, size = t.size(last);
  bool words = size % 2 == 0 && t.stride(last) == 1 && reinterpret_cast<uintptr_t>(t.data_ptr()) % 4 == 0;
  for (int64_t i = 0; i < last; ++i) words &= t.stride(i) % 2 == 0 || t.size(i) <= 1;
  if (words) return t;
  if (size % 2 == 0) return torch::stable::clone(torch::stable::contiguous(t));
  Ints shape = sizes(t);
  ++shape[last];
  Tensor padded = torch::stable::new_zeros(t, shape);
  Tensor inside = torch::stable::narrow(padded, last, 0, size);
  torch::stable::copy_(inside, t);
  return padded;
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

// What the unit makes of rows of words, added to `sums`.
Tensor bfloat16_dot(Tensor a, Tensor b, Tensor sums) {
  STD_TORCH_CHECK(bfloat16_kernels(), "bfloat16_dot: the processor has no unit for products of bfloat16");
  const Ints pairs{sums.numel() * 2};
  check_argument("bfloat16_dot", "a", a, pairs, ScalarType::BFloat16, Memory::kContiguous);
  check_argument("bfloat16_dot", "b", b, pairs, ScalarType::BFloat16, Memory::kContiguous);
  check_argument("bfloat16_dot", "sums", sums, {sums.numel()}, ScalarType::Float, Memory::kContiguous);
  Tensor found = torch::stable::clone(sums);
  bfloat16_kernels()->dot_pairs(static_cast<const uint32_t*>(a.data_ptr()), static_cast<const uint32_t*>(b.data_ptr()),
                                sums.numel(), mutable_floats(found));
  return found;
}

}  // namespace

// The second is for tests: it shows how the kernels' products round.
STABLE_TORCH_LIBRARY_FRAGMENT(cnnlstm_fast, m) {
  m.def("bfloat16_unit() -> str");
  m.def("bfloat16_dot(Tensor a, Tensor b, Tensor sums) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CompositeExplicitAutograd, m) {
  m.impl("bfloat16_unit", CNNLSTM_FAST_OP(bfloat16_unit));
}

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CPU, m) {
  m.impl("bfloat16_dot", CNNLSTM_FAST_OP(bfloat16_dot));
}

}  // namespace cnnlstm_fast
