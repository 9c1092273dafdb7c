#include "../dispatch.h"

#include <cstdlib>
#include <cstring>

#include "../processor.h"

namespace cnnlstm_fast {
namespace {

const Int8Unit* choose_int8() {
  const char *told = std::getenv("CNNLSTM_FAST_INT8"), *isa = std::getenv("CNNLSTM_FAST_ISA");
  const bool plain = (told && !std::strcmp(told, "emulated")) || (isa && *isa);
  if (!plain && cpu_has_avx512_vnni() && avx512_vnni_unit()) return avx512_vnni_unit();
  return &int8_kernels().plain;
}

}  // namespace

const Int8Unit& int8_unit() {
  static const Int8Unit* const chosen = choose_int8();
  return *chosen;
}

}  // namespace cnnlstm_fast
