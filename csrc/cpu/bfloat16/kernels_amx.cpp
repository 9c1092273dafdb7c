#define CNNLSTM_FAST_SET amx
#define CNNLSTM_FAST_VECTOR 16
#define CNNLSTM_FAST_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,bmi2"
#define CNNLSTM_FAST_BF16_UNIT
#define CNNLSTM_FAST_TILES
#define CNNLSTM_FAST_TILE_UNIT
#if !defined(__clang__) && __GNUC__ < 11  // the assemblers of that time know no tiles
#define CNNLSTM_FAST_NO_UNIT
#endif
#include "kernels.inc"
