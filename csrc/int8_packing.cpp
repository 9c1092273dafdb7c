#include "int8_packing.h"

#include <cstring>
#include <string>
#include <vector>

#include "op.h"
#include "recurrent_packing.h"
#include "tensors.h"

namespace cnnlstm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// Rows of a weight: scale, -128 times the sum, words. Rows of zeros fill up to `padded` rows.
std::vector<float> quantized_rows(const Tensor& weight, int64_t padded) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == ScalarType::Float && weight.is_contiguous() &&
                      weight.size(1) <= kMostInt8Inputs,
                  "weights in int8: expected contiguous float32 of 2 dimensions, at most ", kMostInt8Inputs,
                  " numbers in a row");
  const int64_t inputs = weight.size(1), words = int8_row(inputs), row = kInt8Heads + words;
  std::vector<float> found(padded * row);
  for_each_item(weight.size(0), [&](int64_t i) {
    float* to = found.data() + i * row;
    std::vector<uint32_t> quantized(words);
    to[0] = int8_kernels().quantize_row(floats(weight) + i * inputs, inputs, words, {1, 0}, quantized.data());
    std::memcpy(to + kInt8Heads, quantized.data(), words * sizeof(float));
    int32_t sum = 0;
    const int8_t* numbers = reinterpret_cast<const int8_t*>(to + kInt8Heads);
    for (int64_t k = 0; k < 4 * words; ++k) sum += numbers[k];
    sum *= -128;
    std::memcpy(to + 1, &sum, sizeof(sum));
  });
  return found;
}

constexpr int32_t kInOrder[4] = {0, 1, 2, 3};

}  // namespace

int64_t int8_gate_floats(int64_t mode, int64_t hidden, int64_t inputs) {
  return gate_floats(mode, hidden, kInt8Heads + int8_row(inputs));
}

void pack_int8_gates(const Tensor& weight, int64_t mode, bool of_inputs, float* to) {
  const RecurrentTable& k = recurrent_kernels();
  const int64_t gates = gates_of(mode), hidden = weight.size(0) / gates, row = kInt8Heads + int8_row(weight.size(1));
  const std::vector<float> rows = quantized_rows(weight, weight.size(0));
  for_each_item(padded_units(hidden) / k.lanes, [&](int64_t i) {
    k.pack_gates(rows.data(), row, hidden, row, gates, gate_order(mode, of_inputs), to, i * k.lanes, (i + 1) * k.lanes);
  });
}

int64_t int8_linear_floats(int64_t outs, int64_t inputs) {
  return round_up(outs, recurrent_kernels().lanes) * (kInt8Heads + int8_row(inputs));
}

void pack_int8_linear(const Tensor& weight, float* to) {
  const RecurrentTable& k = recurrent_kernels();
  const int64_t outs = round_up(weight.size(0), k.lanes), row = kInt8Heads + int8_row(weight.size(1));
  const std::vector<float> rows = quantized_rows(weight, outs);
  for_each_item(ceil_div(outs, k.panel), [&](int64_t i) {
    const int64_t first = i * k.panel, vectors = std::min(k.panel, outs - first) / k.lanes;
    k.pack_gates(rows.data() + first * row, row, k.lanes, row, vectors, kInOrder, to + first * row, 0, k.lanes);
  });
}

namespace {

std::string name_of_int8_unit() {
  return int8_unit().name;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cnnlstm_fast, m) {
  m.def("int8_unit() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CompositeExplicitAutograd, m) {
  m.impl("int8_unit", CNNLSTM_FAST_OP(name_of_int8_unit));
}

}  // namespace cnnlstm_fast
