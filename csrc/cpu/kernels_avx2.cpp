#define CNNLSTM_FAST_SET avx2
#define CNNLSTM_FAST_VECTOR 8
#define CNNLSTM_FAST_TARGET "avx2,fma,bmi2"
#include "kernels.inc"
