// In plain C++, for tests on processors without a unit.
#define CNNLSTM_FAST_SET emulated
#define CNNLSTM_FAST_VECTOR 4
#include "kernels.inc"
