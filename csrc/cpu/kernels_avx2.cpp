#include "block.h"
#include "recurrent.h"
#include "transform.h"
#include "winograd.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi2")
#endif
#define CNNLSTM_FAST_VECTOR 8
#define CNNLSTM_FAST_NAME "avx2"
#include "kernels.inc"
#include "recurrent.inc"
#include "transform.inc"
#include "winograd.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace cnnlstm_fast {
const KernelTable* avx2_kernels() {
  return &kTable;
}
const RecurrentTable* avx2_recurrent() {
  return &kRecurrentTable;
}
const WinogradTable* avx2_winograd() {
  return &kWinogradTable;
}
const TransformTable* avx2_transform() {
  return &kTransformTable;
}
}  // namespace cnnlstm_fast
#else
namespace cnnlstm_fast {
const KernelTable* avx2_kernels() {
  return nullptr;
}
const RecurrentTable* avx2_recurrent() {
  return nullptr;
}
const WinogradTable* avx2_winograd() {
  return nullptr;
}
const TransformTable* avx2_transform() {
  return nullptr;
}
}  // namespace cnnlstm_fast
#endif
