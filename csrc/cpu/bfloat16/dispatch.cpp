#include <cstdlib>
#include <cstring>

#include "../processor.h"
#include "bfloat16.h"

namespace cnnlstm_fast {
namespace {

const BFloat16Table* choose() {
  const char* told = std::getenv("CNNLSTM_FAST_BFLOAT16");
  auto is = [told](const char* name) { return told && !std::strcmp(told, name); };
  if (is("emulated")) return emulated_kernels();
  if (is("emulated_amx")) return emulated_amx_kernels();
  const char* isa = std::getenv("CNNLSTM_FAST_ISA");
  if ((isa && *isa) || !cpu_has_avx512_bf16()) return nullptr;
  if (amx_kernels() && !is("avx512_bf16") && may_use_tiles_for(TileProducts::kBFloat16)) return amx_kernels();
  return avx512_bf16_kernels();
}

}  // namespace

const BFloat16Table* bfloat16_kernels() {
  static const BFloat16Table* const chosen = choose();
  return chosen;
}

}  // namespace cnnlstm_fast
