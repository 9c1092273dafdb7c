#include <cstdlib>
#include <cstring>

#include "../processor.h"
#include "bfloat16.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cnnlstm_fast {
namespace {

// Linux gives a process tiles when it asks for them, once for all of its threads.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return cpu_has_amx_bf16() && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

const BFloat16Table* choose() {
  const char* told = std::getenv("CNNLSTM_FAST_BFLOAT16");
  auto is = [told](const char* name) { return told && !std::strcmp(told, name); };
  if (is("emulated")) return emulated_kernels();
  if (is("emulated_amx")) return emulated_amx_kernels();
  const char* isa = std::getenv("CNNLSTM_FAST_ISA");
  if ((isa && *isa) || !cpu_has_avx512_bf16()) return nullptr;
  if (amx_kernels() && !is("avx512_bf16") && may_use_tiles()) return amx_kernels();
  return avx512_bf16_kernels();
}

}  // namespace

const BFloat16Table* bfloat16_kernels() {
  static const BFloat16Table* const chosen = choose();
  return chosen;
}

}  // namespace cnnlstm_fast
