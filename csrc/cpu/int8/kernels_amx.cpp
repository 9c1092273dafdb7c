// The unit that multiplies tiles.
#define CNNLSTM_FAST_UNIT amx_int8_unit
#define CNNLSTM_FAST_TILE_UNIT
#if !defined(__clang__) && __GNUC__ < 11  // the assemblers of that time know no tiles
#define CNNLSTM_FAST_NO_UNIT
#endif
#include "kernels.inc"
