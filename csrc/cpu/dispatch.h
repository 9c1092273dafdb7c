// Which instruction set's kernels run, chosen once, at the first call.
#pragma once
#include "kernels.h"

namespace cnnlstm_fast {

const Kernels& chosen_kernels();

inline const KernelTable& kernels() {
  return chosen_kernels().block;
}
inline const RecurrentTable& recurrent_kernels() {
  return chosen_kernels().recurrent;
}
inline const WinogradTable& winograd_kernels() {
  return chosen_kernels().winograd;
}
inline const TransformTable& transform_kernels() {
  return chosen_kernels().transform;
}
inline const EpilogueTable& epilogue_kernels() {
  return chosen_kernels().epilogue;
}
inline const FrozenTable& frozen_kernels() {
  return chosen_kernels().frozen;
}
inline const Int8Table& int8_kernels() {
  return chosen_kernels().int8;
}
// Those of a layer by its weights.
inline const RecurrentTable& kernels_of(const RecurrentLayer& l) {
  return l.unit ? int8_kernels().recurrent : recurrent_kernels();
}

}  // namespace cnnlstm_fast
