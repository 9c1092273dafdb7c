// Recurrent layers whose products are of bfloat16 pairs (cpu/bfloat16): when, and their tensors as words.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "cpu/bfloat16/bfloat16.h"
#include "recurrent_description.h"
#include "threads.h"

namespace cnnlstm_fast {

// The kernels of a layer that is bfloat16 and not projected, if the processor has a unit for them; else null.
const BFloat16Table* low_kernels(torch::headeronly::ScalarType dtype, bool projected);
inline const BFloat16Table* low_kernels(const RecurrentCall& call) {
  return low_kernels(call.dtype, call.directions[0].w_hr.has_value());
}

// Words of a row of so many numbers, with the zeros behind it.
inline int64_t row_words(int64_t size, const BFloat16Table& low) {
  return ceil_div(size, 2 * low.row_words) * low.row_words;
}

// A bfloat16 tensor whose rows are whole words: contiguous in the last dimension, which is as long as row_words says.
torch::stable::Tensor as_word_rows(const torch::stable::Tensor& t, const BFloat16Table& low);

// Makes a described layer one of words: of its input, its state and its output. `h_pairs` are words of the state before
// and after a step, cleared.
void use_words(const RecurrentCall& call, const torch::stable::Tensor& out, int64_t direction, const BFloat16Table& low,
               uint32_t* h_pairs, PairLayer& layer);

// As pack_gate_weight, of as_word_rows of a weight.
void pack_gate_words(const torch::stable::Tensor& words, int64_t mode, bool of_inputs, const BFloat16Table& low,
                     float* to);

}  // namespace cnnlstm_fast
