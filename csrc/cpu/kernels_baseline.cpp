// The kernels for whatever the compiler targets by default: SSE2 on x86-64, NEON on aarch64.
#define CNNLSTM_FAST_VECTOR 4
#define CNNLSTM_FAST_NAME "baseline"
#include "kernels.inc"
#include "recurrent.inc"
#include "transform.inc"
#include "winograd.inc"

namespace cnnlstm_fast {
const KernelTable* baseline_kernels() {
  return &kTable;
}
const RecurrentTable* baseline_recurrent() {
  return &kRecurrentTable;
}
const WinogradTable* baseline_winograd() {
  return &kWinogradTable;
}
const TransformTable* baseline_transform() {
  return &kTransformTable;
}
}  // namespace cnnlstm_fast
