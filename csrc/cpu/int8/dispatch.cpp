#include "../dispatch.h"

#include <cstdlib>
#include <cstring>

#include "../processor.h"

namespace cnnlstm_fast {
namespace {

const Int8Unit* choose_int8() {
  const char *told = std::getenv("CNNLSTM_FAST_INT8"), *isa = std::getenv("CNNLSTM_FAST_ISA");
  auto is = [told](const char* name) { return told && !std::strcmp(told, name); };
  if (is("emulated") || (isa && *isa) || !cpu_has_avx512_vnni() || !avx512_vnni_unit()) return &int8_kernels().plain;
  if (amx_int8_unit() && !is("avx512_vnni") && may_use_tiles_for(TileProducts::kInt8)) return amx_int8_unit();
  return avx512_vnni_unit();
}

}  // namespace

const Int8Unit& int8_unit() {
  static const Int8Unit* const chosen = choose_int8();
  return *chosen;
}

}  // namespace cnnlstm_fast
