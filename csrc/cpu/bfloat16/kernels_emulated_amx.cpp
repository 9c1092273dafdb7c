// In plain C++, for tests on processors without tiles.
#define CNNLSTM_FAST_SET emulated_amx
#define CNNLSTM_FAST_VECTOR 4
#define CNNLSTM_FAST_TILES
#include "kernels.inc"
