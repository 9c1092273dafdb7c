// What the host code of recurrent layers hands to their kernels. As in conv_block/block.h, no library code may be
// inlined into these.
#pragma once
#include <cstdint>

namespace cnnlstm_fast {

struct Int8Unit;

enum RecurrentMode : int32_t { kLSTM = 0, kGRU = 1 };

constexpr int64_t kUnitGroup = 16;  // hidden units are padded to a multiple of this
constexpr int64_t kMaxRows = 64;    // most sequences that one call of a step works on
constexpr int64_t kPacked = -1;     // as a step's stride: steps begin where `starts` says

// One direction of one layer, everything float32. Strides in elements; T steps, B sequences, I inputs, H
// hidden units, P outputs per step (H, or fewer when projected). "Padded" is rounded up to kUnitGroup.
//
// Kernels number sequences from the longest to the shortest, so that the first ones take part in a step. What
// belongs to step t of sequence q lies at t * step + order[q] * sequence, or at (starts[t] + q) * sequence where
// the step's stride is kPacked.
//
// The pre-activations of a unit are four columns: i, f, g, o of an LSTM; n (of the input), r, z, n (of the
// state) of a GRU. A GRU's inputs have the first three, its state the last three.
struct RecurrentLayer {
  int32_t mode;
  bool reversed, projected;
  int64_t steps, batch, inputs, hidden, width, padded_hidden, padded_width;

  const float* x;  // features contiguous
  int64_t x_step, x_sequence;
  const bool* reset;  // null: none
  int64_t reset_step, reset_sequence;
  const int64_t* starts;   // T + 1: rows of all steps before, one per sequence and step
  const int64_t* order;    // the caller's number of each sequence; null: the same as the kernels'
  const int64_t* lengths;  // null: all T
  float* out;              // outputs contiguous
  int64_t out_step, out_sequence;
  float* saved;  // rows of `kept` times padded H, null: nothing is kept
  int64_t saved_step, saved_sequence, kept;
  bool keep_out;  // the last of them is the output

  const float* packed_x;  // pack_gates of w_ih; null: inputs are projected ahead, from w_ih as it is
  const float* packed_h;  // pack_gates of w_hh
  const float* packed_r;  // pack_columns of w_hr, transposed
  const float* bias;      // [unit / lanes][4][lanes]
  const Int8Unit* unit;   // not null: packed_x and packed_h are panels of int8 (int8/int8.h)
  float* rows_of_step;    // of those, memory of step_rows_floats for quantize_step; null: forward_step quantizes

  // Not null: project_inputs of projected_rows rows, of which projected_first come before (see `starts`).
  const float* projected_x;
  int64_t projected_rows, projected_first;
  const float* w_ih;  // as it is, its rows and its order of gates
  int64_t w_ih_stride;
  const int32_t* order_x;

  float* h;            // [2][B][padded P]: by the parity of the number of steps done
  float* c;            // [B][padded H]
  float* m;            // [B][padded H], the output before its projection
  const float* zeros;  // as many as the widest of all rows
};

// Where something of step t of sequence q begins. Static, so that the linker cannot share it between instruction sets.
static inline int64_t position(const RecurrentLayer& l, int64_t t, int64_t q, int64_t step, int64_t sequence) {
  if (step == kPacked) return (l.starts[t] + q) * sequence;
  return t * step + (l.order ? l.order[q] : q) * sequence;
}

// What the backward of one direction needs beside the forward's description.
struct RecurrentBackward {
  const float* grad_out;  // null: none; outputs contiguous
  int64_t grad_step, grad_sequence;
  const float* h0;  // (B, P) or null
  const float* c0;  // (B, H) or null
  float* dh;        // [B][padded P]: on entry the gradient of the state after the last step done
  float* dc;        // [B][padded H]

  const float* columns_h;  // pack_columns of w_hh: k over the state's gate columns
  const float* columns_r;  // pack_columns of w_hr: k over outputs

  // Gradients of the pre-activations of a chunk of steps, [column / panel][row][panel]; row 0 is starts' number
  // `first_row`.
  float* gates;
  int64_t rows, first_row;
  float* dy;  // projected: [column / panel][row][panel], gradients of the outputs
  float* my;  // projected: [row][padded H], outputs before their projection
};

struct RecurrentTable {
  int64_t lanes;       // floats per vector
  int64_t panel;       // floats of a panel's row: 4 vectors
  int64_t outer_rows;  // most rows of a product that add_outer works on

  // to[c][r] = from[r][c]
  void (*transpose)(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                    int64_t to_stride);
  // Packs units [begin, end) / lanes of a weight (gates * H, K), rows `stride` apart, into
  // [unit / lanes][K][gates][lanes]; gate g comes from the weight's block order[g].
  void (*pack_gates)(const float* weight, int64_t stride, int64_t hidden, int64_t k, int64_t gates,
                     const int32_t* order, float* packed, int64_t begin, int64_t end);
  // Packs panels [begin, end) of a matrix (K, N) into [N / panel][padded K][panel's vectors, as few as N needs].
  // K is `blocks` blocks of `block` rows, each padded to kUnitGroup, block b being the source's order[b].
  void (*pack_columns)(const float* matrix, int64_t stride, int64_t blocks, int64_t block, const int32_t* order,
                       int64_t n, float* packed, int64_t begin, int64_t end);

  // Bias and products of the inputs x[first, first + count) of `rows` for units [begin, end) / lanes, into
  // [unit / lanes][row][4][lanes]. The weights are those of packed_x, where it is given, else of w_ih.
  void (*project_inputs)(const RecurrentLayer&, const float* const* x, int64_t rows, int64_t first, int64_t count,
                         int64_t begin, int64_t end, float* to, float* scratch);
  int64_t (*project_scratch)(const RecurrentLayer&, int64_t count);  // floats
  // Unit blocks [begin, end) / lanes of step `t` for sequences [b0, b0 + n), n <= kMaxRows.
  void (*forward_step)(const RecurrentLayer&, int64_t t, int64_t b0, int64_t n, int64_t begin, int64_t end,
                       float* scratch);
  int64_t (*forward_scratch)(const RecurrentLayer&);  // floats
  // Projects the outputs of step `t` (projected layers only), after forward_step over all units.
  void (*project_step)(const RecurrentLayer&, int64_t t, int64_t b0, int64_t n, float* scratch);

  // Gradients of the pre-activations of step `t`, units [begin, end), both multiples of the panel or the end
  // (all units of a projected layer, whose `scratch` holds backward_scratch floats).
  void (*backward_gates)(const RecurrentLayer&, const RecurrentBackward&, int64_t t, int64_t b0, int64_t n,
                         int64_t begin, int64_t end, float* scratch);
  int64_t (*backward_scratch)(const RecurrentLayer&);
  // Then the gradient of the state before step `t`, columns [begin, end) of panels.
  void (*backward_state)(const RecurrentLayer&, const RecurrentBackward&, int64_t t, int64_t b0, int64_t n,
                         int64_t begin, int64_t end);

  // product[column / panel][n][panel] += sum over rows k of a[k][n] * gates[column / panel][k][panel] for n in
  // [n0, n1), at most outer_rows, and columns [begin, end), multiples of the lanes.
  void (*add_outer)(const float* const* a, int64_t n0, int64_t n1, const float* gates, int64_t rows, int64_t begin,
                    int64_t end, int64_t product_rows, float* product);
  // sum[panel] += sum over rows k of b[k].
  void (*add_rows)(const float* b, int64_t rows, float* sum);

  // to[r][0, n) = or += gates[first_row + r][begin, end) @ columns for `rows` rows, columns packed by
  // pack_columns.
  void (*multiply_rows)(const float* gates, int64_t gate_rows, int64_t first_row, int64_t rows, int64_t begin,
                        int64_t end, const float* columns, int64_t n, bool add, float* const* to);
};

}  // namespace cnnlstm_fast
