// In place of the other instruction sets' kernels, and of those of the processor's units for bfloat16 and int8, which
// the baseline does not call: their compilation takes most of a sanitized build. One emulated unit stays.
#include "../../csrc/cpu/bfloat16/bfloat16.h"
#include "../../csrc/cpu/int8/int8.h"
#include "../../csrc/cpu/kernels.h"

namespace cnnlstm_fast {
const Kernels* avx2_kernels() {
  return nullptr;
}
const Kernels* avx512_kernels() {
  return nullptr;
}
const BFloat16Table* avx512_bf16_kernels() {
  return nullptr;
}
const BFloat16Table* amx_kernels() {
  return nullptr;
}
const BFloat16Table* emulated_kernels() {
  return nullptr;
}
const Int8Unit* avx512_vnni_unit() {
  return nullptr;
}
const Int8Unit* amx_int8_unit() {
  return nullptr;
}
}  // namespace cnnlstm_fast
