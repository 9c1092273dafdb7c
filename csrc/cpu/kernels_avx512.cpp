#define CNNLSTM_FAST_SET avx512
#define CNNLSTM_FAST_VECTOR 16
#define CNNLSTM_FAST_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi2"
#include "kernels.inc"
