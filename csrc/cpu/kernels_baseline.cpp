// Whatever the compiler targets by default: SSE2 on x86-64, NEON on aarch64.
#define CNNLSTM_FAST_SET baseline
#define CNNLSTM_FAST_VECTOR 4
#include "kernels.inc"
