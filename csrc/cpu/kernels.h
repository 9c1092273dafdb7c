// All kernels of one instruction set.
#pragma once
#include "conv_block/block.h"
#include "conv_fft/transform.h"
#include "epilogue/epilogue.h"
#include "frozen_conv/frozen.h"
#include "int8/int8.h"
#include "recurrent/recurrent.h"
#include "winograd_conv/winograd.h"

namespace cnnlstm_fast {

struct Kernels {
  KernelTable block;
  RecurrentTable recurrent;
  WinogradTable winograd;
  TransformTable transform;
  EpilogueTable epilogue;
  FrozenTable frozen;
  Int8Table int8;
};

// One per file kernels_*.cpp; null where the compiler's target has no such instruction set.
const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace cnnlstm_fast
