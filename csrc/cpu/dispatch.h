// Which instruction set's kernels run, chosen once when the library is loaded.
#pragma once
#include "block.h"
#include "recurrent.h"
#include "transform.h"
#include "winograd.h"

namespace cnnlstm_fast {
const KernelTable& kernels();
const RecurrentTable& recurrent_kernels();
const TransformTable& transform_kernels();
const WinogradTable& winograd_kernels();
}  // namespace cnnlstm_fast
