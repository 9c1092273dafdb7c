// Products of rows and weights in int8, whose sums are exact in int32. What surrounds them is float32: scales, biases,
// gates and states.
//
// A row is words of four int8 side by side, with zeros up to a multiple of Int8Unit::row_words. Its scale is its
// largest size / 127: NaN where it holds a NaN or an infinity, and 0, as all its numbers are then, where that size is
// below kLeastInt8Size. Weights are panels of columns, a word of each column at a time: first the scales of the
// columns, then -128 times their sums, then their words.
#pragma once
#include "../recurrent/recurrent.h"

namespace cnnlstm_fast {

constexpr int64_t kInt8Heads = 2;             // rows of a panel before its words
constexpr int64_t kMostInt8Inputs = 1 << 17;  // of a row: so many products of 127 * 127 fit an int32
constexpr float kLeastInt8Size = 0x1p-100f;   // 127 over it is finite

// How a unit reads rows.
struct Int8Format {
  int64_t parts;  // 1: words of four int8. 2: words of two int16, first numbers 0 and 2 of all fours, then 1 and 3
  uint32_t flip;  // words of four are xored with it: 0x80808080 adds 128 to each number, which is unsigned then
};

// What multiplies. All give the same sums.
struct Int8Unit {
  const char* name;
  int64_t row_words;
  Int8Format format;
  // sums[r][n] = rows[r] * column n of a panel of `vectors` vectors. Rows of `words` words, or of twice as many, lie
  // side by side; rows of sums are four vectors.
  void (*multiply)(const uint32_t* rows, int64_t count, int64_t words, const uint32_t* panel, int64_t vectors,
                   int32_t* sums);
};

// activation(x @ weight.T + bias). Panels are of four vectors, the last one of as few as it needs.
struct Int8Linear {
  const Int8Unit* unit;
  int64_t outs, words;
  const uint32_t* panels;
  const float* bias;  // padded to whole vectors
  int32_t activation;
  float act[2];
};

struct Int8Table {
  // Of layers whose `unit` is set and whose packed weights are panels, one for the gates of `lanes` units; forward
  // only, not projected.
  RecurrentTable recurrent;
  // Quantizes what step `t` of sequences [b0, b0 + n) reads, n <= kMaxRows, into `rows_of_step`: once for all units.
  void (*quantize_step)(const RecurrentLayer&, int64_t t, int64_t b0, int64_t n);
  int64_t (*step_rows_floats)(const RecurrentLayer&);
  Int8Unit plain;  // in C++ for any processor of the set
  // Quantizes a row to `words` words, or twice as many; returns its scale.
  float (*quantize_row)(const float* from, int64_t count, int64_t words, Int8Format format, uint32_t* to);
  // Panels [begin, end) of the results of `count` quantized rows; those of `to` are `outs` apart.
  void (*linear)(const Int8Linear&, const uint32_t* rows, const float* scales, int64_t count, int64_t begin,
                 int64_t end, float* to);
};

// The processor's units; null where the compiler's target has none.
const Int8Unit* avx512_vnni_unit();
const Int8Unit* amx_int8_unit();

// What this process multiplies by, chosen at the first call: the processor's unit, or plain C++ of its instruction set.
// CNNLSTM_FAST_INT8=emulated chooses plain C++ everywhere, as a forced CNNLSTM_FAST_ISA does; avx512_vnni where it
// would be amx.
const Int8Unit& int8_unit();

}  // namespace cnnlstm_fast
