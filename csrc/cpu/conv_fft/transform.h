// What the host code of transforms of windows hands to their kernel, compiled once per instruction set.
#pragma once
#include <cstdint>

namespace cnnlstm_fast {

// Products at one position, strides in floats: `count` matrices x (K, columns), columns contiguous, each times
// the same matrix (K, M), M contiguous, gives or is added to as many (M, columns).
struct Transform {
  const float* matrix;
  int64_t matrix_step, k, m;
  int64_t count, columns;
  int64_t x_matrix, x_row;
  int64_t out_matrix, out_row;
  bool add;
};

struct TransformTable {
  void (*run)(const Transform&, const float* x, float* out);
};

}  // namespace cnnlstm_fast
