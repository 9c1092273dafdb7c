// The unit that multiplies four pairs of int8 and adds them to a sum.
#define CNNLSTM_FAST_UNIT avx512_vnni_unit
#include "kernels.inc"
