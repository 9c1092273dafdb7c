// A matrix product is a convolution of one tap: rows are the positions of an image of one row.
#include "frozen_conv.h"

namespace cnnlstm_fast {
namespace {

FrozenConvDescription describe(int64_t inputs, int64_t outputs, int64_t activation, const Floats& act, bool adds) {
  return {inputs, outputs, 1, 1, {1, 1, 0, 0, 1, 1, 1}, activation, act, adds, {}};
}

MapStrides rows_of(int64_t rows, int64_t step) {
  return {{rows * step, 1, rows * step, step}};
}

}  // namespace

FrozenLinear::FrozenLinear(int64_t inputs, int64_t outputs, const float* weight, const float* bias, int64_t activation,
                           const Floats& act, bool adds)
    : inputs_(inputs), outputs_(outputs), conv_(describe(inputs, outputs, activation, act, adds), weight, bias) {}

FrozenConvCall FrozenLinear::call_of(int64_t rows, int64_t x_row, int64_t out_row, int64_t added_row) const {
  FrozenConvCall call{1, 1, rows};
  call.x_strides = rows_of(rows, x_row ? x_row : inputs_);
  call.out_strides = rows_of(rows, out_row ? out_row : outputs_);
  call.added_strides = rows_of(rows, added_row ? added_row : outputs_);
  return call;
}

int64_t FrozenLinear::scratch_bytes(int64_t rows, int64_t x_row, int64_t out_row, int64_t added_row) const {
  return rows > 0 ? conv_.scratch_bytes(call_of(rows, x_row, out_row, added_row)) : 0;
}

void FrozenLinear::run(int64_t rows, const float* x, float* out, const float* added, void* scratch,
                       int64_t scratch_bytes, int64_t x_row, int64_t out_row, int64_t added_row) const {
  if (rows <= 0) return;
  FrozenConvCall call = call_of(rows, x_row, out_row, added_row);
  call.x = x, call.out = out, call.added = added;
  conv_.run(call, scratch, scratch_bytes);
}

}  // namespace cnnlstm_fast
