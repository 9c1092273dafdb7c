// Recurrent layers whose products are of bfloat16 pairs (cpu/bfloat16): when, and their tensors as words.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "cpu/bfloat16/bfloat16.h"
#include "recurrent_description.h"

namespace cnnlstm_fast {

// The kernels of a layer that is bfloat16 and not projected, if the processor has a unit for them; else null.
const BFloat16Table* low_kernels(const RecurrentCall& call);

// A bfloat16 tensor whose rows are whole words: contiguous in the last dimension, which zeros make a multiple of
// `row_words` words.
torch::stable::Tensor as_word_rows(const torch::stable::Tensor& t, int64_t row_words);

// As pack_gate_weight, of as_word_rows of a weight.
void pack_gate_words(const torch::stable::Tensor& words, int64_t mode, bool of_inputs, const BFloat16Table& low,
                     float* to);

}  // namespace cnnlstm_fast
