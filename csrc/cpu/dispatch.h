// Which instruction set's kernels run, chosen once when the library is loaded.
#pragma once
#include "block.h"

namespace cnnlstm_fast {
const KernelTable& kernels();
}  // namespace cnnlstm_fast
