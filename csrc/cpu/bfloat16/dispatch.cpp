#include <cstdlib>
#include <cstring>

#include "bfloat16.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace cnnlstm_fast {
namespace {

bool cpu_has_avx512_bf16() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
#else
  return false;
#endif
}

bool is(const char* name, const char* value) {
  const char* told = std::getenv(name);
  return !std::strcmp(told ? told : "", value);
}

const BFloat16Table* choose() {
  if (is("CNNLSTM_FAST_BFLOAT16", "emulated")) return emulated_bf16_kernels();
  return is("CNNLSTM_FAST_ISA", "") && cpu_has_avx512_bf16() ? avx512_bf16_kernels() : nullptr;
}

}  // namespace

const BFloat16Table* bfloat16_kernels() {
  static const BFloat16Table* const chosen = choose();
  return chosen;
}

}  // namespace cnnlstm_fast
