// The unit that multiplies four pairs of int8 and adds them to a sum. All around it is compiled with the instruction
// set's other kernels.
#define CNNLSTM_FAST_VECTOR 16
#define CNNLSTM_FAST_VNNI
#include "int8.h"

#if defined(__x86_64__)

#define CNNLSTM_FAST_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,bmi2"
#pragma GCC diagnostic ignored "-Wunused-function"  // of the float32 kernels, only what stands around the products
// clang-format off: common/target_begin.inc comes first, common/target_end.inc last
#include "../common/target_begin.inc"
#include "dot.inc"
#include "../common/target_end.inc"
// clang-format on

namespace cnnlstm_fast {

const Int8Unit* avx512_vnni_unit() {
  static constexpr Int8Unit kUnit = {"avx512_vnni", kInt8RowWords, kInt8Format, int8_multiply};
  return &kUnit;
}

}  // namespace cnnlstm_fast

#else

namespace cnnlstm_fast {
const Int8Unit* avx512_vnni_unit() {
  return nullptr;
}
}  // namespace cnnlstm_fast

#endif
