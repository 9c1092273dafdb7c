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
const Kernels* choose() {
  const char* asked = std::getenv("CNNLSTM_FAST_ISA");
  const bool any = !asked || !*asked;
  if (cpu_has_avx512() && avx512_kernels() && (any || !std::strcmp(asked, "avx512"))) return avx512_kernels();
  if (cpu_has_avx2() && avx2_kernels() && (any || std::strcmp(asked, "baseline"))) return avx2_kernels();
  return baseline_kernels();
}

}  // namespace

const Kernels& chosen_kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

}  // namespace cnnlstm_fast
