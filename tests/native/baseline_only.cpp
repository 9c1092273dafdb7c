// In place of the other instruction sets' kernels, whose compilation takes most of a sanitized build.
#include "../../csrc/cpu/block.h"
#include "../../csrc/cpu/recurrent.h"
#include "../../csrc/cpu/transform.h"
#include "../../csrc/cpu/winograd.h"

namespace cnnlstm_fast {
const KernelTable* avx2_kernels() {
  return nullptr;
}
const KernelTable* avx512_kernels() {
  return nullptr;
}
const RecurrentTable* avx2_recurrent() {
  return nullptr;
}
const RecurrentTable* avx512_recurrent() {
  return nullptr;
}
const WinogradTable* avx2_winograd() {
  return nullptr;
}
const WinogradTable* avx512_winograd() {
  return nullptr;
}
const TransformTable* avx2_transform() {
  return nullptr;
}
const TransformTable* avx512_transform() {
  return nullptr;
}
}  // namespace cnnlstm_fast
