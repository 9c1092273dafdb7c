// Kernels whose products are of bfloat16, with sums in float32. They are compiled apart from all others, for units that
// multiply pairs of bfloat16 (AVX512_BF16) and in plain C++ that rounds as these do.
//
// A word is two bfloat16 that lie side by side, the first in its lower half. Rows of an odd length end with a zero.
#pragma once
#include "../recurrent/recurrent.h"

namespace cnnlstm_fast {

// One direction of a layer, not projected. State, gates and sums are float32 as in RecurrentLayer; `x`, `packed_x` and
// `packed_h` point to words, and `inputs`, `x_step` and `x_sequence` count words. `out` is not written.
struct PairLayer : RecurrentLayer {
  uint32_t* h_pairs;  // [2][B][padded P / 2]: `h` rounded to bfloat16
  uint16_t* out_low;  // as `out`, with its strides
};

// Of the backward, whose layer is all float32. Beside `gates` their bfloat16 in the same places; multiply_rows takes
// these for gates. columns_h are words.
struct PairBackward : RecurrentBackward {
  uint16_t* gates_low;
};

struct BFloat16Table {
  const char* name;
  // As the other sets' tables. Layers are PairLayers, or of the backward PairBackwards, and all weights are packed;
  // pack_gates packs words, and pack_columns a bfloat16 matrix. Projected layers are not taken.
  RecurrentTable recurrent;
  // Rounds to bfloat16.
  void (*narrow_row)(const float* from, int64_t count, uint16_t* to);
  // sums[i] += the products of pairs i of a and b, for `count` pairs: what every product here is made of.
  void (*dot_pairs)(const uint32_t* a, const uint32_t* b, int64_t count, float* sums);
  // Multiplies pairs at full rate; returns the number of operations, two for a product.
  double (*dot_burst)(int64_t rounds);
};

// One per file; null where the compiler's target has no such unit.
const BFloat16Table* avx512_bf16_kernels();
const BFloat16Table* emulated_bf16_kernels();

// The kernels that this process uses, chosen at the first call; null if the processor has no unit for them.
// CNNLSTM_FAST_BFLOAT16=emulated chooses those in plain C++, which are slow; a forced CNNLSTM_FAST_ISA chooses none.
const BFloat16Table* bfloat16_kernels();

}  // namespace cnnlstm_fast
