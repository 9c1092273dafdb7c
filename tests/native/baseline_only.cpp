// In place of the other instruction sets' kernels, whose compilation takes most of a sanitized build.
#include "../../csrc/cpu/kernels.h"

namespace cnnlstm_fast {
const Kernels* avx2_kernels() {
  return nullptr;
}
const Kernels* avx512_kernels() {
  return nullptr;
}
}  // namespace cnnlstm_fast
