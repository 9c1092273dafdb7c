#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace cnnlstm_fast {
namespace {

bool cpu_has_avx2() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#else
  return false;
#endif
}

bool cpu_has_avx512() {
#if defined(__x86_64__)
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

// CNNLSTM_FAST_ISA=baseline|avx2|avx512 forces a lower set than the processor has.
template <class Table>
const Table* choose(const Table* baseline, const Table* avx2, const Table* avx512) {
  const char* wish = std::getenv("CNNLSTM_FAST_ISA");
  const bool any = !wish || !*wish;
  if (cpu_has_avx512() && avx512 && (any || !std::strcmp(wish, "avx512"))) return avx512;
  if (cpu_has_avx2() && avx2 && (any || std::strcmp(wish, "baseline"))) return avx2;
  return baseline;
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable* chosen = choose(baseline_kernels(), avx2_kernels(), avx512_kernels());
  return *chosen;
}

const RecurrentTable& recurrent_kernels() {
  static const RecurrentTable* chosen = choose(baseline_recurrent(), avx2_recurrent(), avx512_recurrent());
  return *chosen;
}

const WinogradTable& winograd_kernels() {
  static const WinogradTable* chosen = choose(baseline_winograd(), avx2_winograd(), avx512_winograd());
  return *chosen;
}

const TransformTable& transform_kernels() {
  static const TransformTable* chosen = choose(baseline_transform(), avx2_transform(), avx512_transform());
  return *chosen;
}

}  // namespace cnnlstm_fast
