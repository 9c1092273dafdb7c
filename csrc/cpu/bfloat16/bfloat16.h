// Kernels whose products are of bfloat16, with sums in float32. They are compiled apart from all others: for units that
// multiply pairs of bfloat16 (AVX512_BF16) or tiles of pairs (AMX), and in plain C++ that rounds as either does.
//
// A word is two bfloat16 that lie side by side, the first in its lower half. Rows of an odd length end with a zero.
#pragma once
#include "../conv_block/block.h"
#include "../recurrent/recurrent.h"

namespace cnnlstm_fast {

// One direction of a layer, not projected. State, gates and sums are float32 as in RecurrentLayer; `x`, `packed_x` and
// `packed_h` point to words, and `inputs`, `x_step` and `x_sequence` count words. `out` is not written.
struct PairLayer : RecurrentLayer {
  int64_t h_words;    // of a row of the state: as many as packed_h has, a multiple of row_words
  uint32_t* h_pairs;  // [2][B][h_words]: `h` rounded to bfloat16
  uint16_t* out_low;  // as `out`, with its strides
};

// Of the backward, whose layer is all float32. Beside `gates` their bfloat16 in the same places; multiply_rows takes
// these for gates. columns_h are words.
struct PairBackward : RecurrentBackward {
  uint16_t* gates_low;
};

// What a convolution of packed weights reads and writes, one group. A row is what the taps of a position (n, oh, ow) of
// the map read, in the order (kh, kw, c). The map and what is added to it are [position][co].
struct PairsConv {
  int64_t words;           // of a row of inputs, a multiple of row_words
  const uint32_t* panels;  // of conv_columns columns, [words][columns] each, the last one of as few vectors as it needs
  const float* bias;       // whole panels
  const uint16_t* x;       // channels side by side, Block::x_stride apart otherwise
  const uint32_t* rows;    // of all positions, row_stride words apart; null: they are gathered from x
  int64_t row_stride;
  const uint16_t* added;  // may be null
  uint16_t* out;
};

struct BFloat16Table {
  const char* name;
  int64_t row_words;  // rows of inputs, of states and of their packed weights are zeros up to a multiple of so many
  // As the other sets' tables. Layers are PairLayers, or of the backward PairBackwards, and all weights are packed;
  // pack_gates packs words, and pack_columns a bfloat16 matrix. Projected layers are not taken.
  RecurrentTable recurrent;
  // Rounds to bfloat16.
  void (*narrow_row)(const float* from, int64_t count, uint16_t* to);
  // c[r][n] += sum over k of a[r][k] * panel[k][n], words of `rows` rows and a panel of as many columns as lanes: what
  // every product here is made of.
  void (*multiply)(const uint32_t* a, int64_t rows, int64_t words, const uint32_t* panel, float* c);
  int64_t conv_columns;  // of a panel
  // Rows [first, first + count) of images (n, h) of float32 or bfloat16 planes with strides by (N, C, H, W), rounded to
  // [row][w][padded]: as many as `c`, or four of three. `scratch` has as many floats as a row numbers.
  void (*interleave)(const void* x, bool wide, const int64_t* stride, int64_t c, int64_t padded, int64_t h, int64_t w,
                     int64_t first, int64_t count, uint16_t* to, float* scratch);
  // Whether conv multiplies what the taps of positions read where it lies, and gathers nothing.
  bool (*reads_in_place)(const Block&, const uint16_t* x);
  // Rows of positions [first, first + count), `words` words each.
  void (*gather_rows)(const Block&, const uint16_t* x, int64_t words, int64_t first, int64_t count, uint32_t* to);
  // The activation of the sums, for positions [first, first + count) and panels [begin, end); floats of scratch.
  void (*conv)(const Block&, const PairsConv&, int64_t first, int64_t count, int64_t begin, int64_t end,
               float* scratch);
  int64_t (*conv_scratch)(const PairsConv&, int64_t count);
  // Multiplies pairs at full rate; returns the number of operations, two for a product.
  double (*product_burst)(int64_t rounds);
};

// One per file; null where the compiler's target has no such unit.
const BFloat16Table* avx512_bf16_kernels();
const BFloat16Table* amx_kernels();
const BFloat16Table* emulated_kernels();
const BFloat16Table* emulated_amx_kernels();

// The kernels that this process uses, chosen at the first call; null if the processor has no unit for them.
// CNNLSTM_FAST_BFLOAT16 chooses others by their names: avx512_bf16 where it would be amx, emulated and emulated_amx in
// plain C++, which are slow. A forced CNNLSTM_FAST_ISA chooses none of the processor's.
const BFloat16Table* bfloat16_kernels();

}  // namespace cnnlstm_fast
