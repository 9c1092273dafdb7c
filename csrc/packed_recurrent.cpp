#include "packed_recurrent.h"

#include "cpu/dispatch.h"
#include "int8_packing.h"
#include "packed_memory.h"
#include "recurrent_packing.h"
#include "recurrent_pairs.h"
#include "tensors.h"

namespace cnnlstm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// The weight of a direction's inputs, or of its state.
Tensor packed_gates(const Tensor& weight, int64_t mode, bool of_inputs, const BFloat16Table* low, bool int8) {
  const int64_t hidden = weight.size(0) / gates_of(mode);
  if (low) {
    const Tensor words = as_word_rows(weight, *low);
    const Tensor packed = new_packed(weight, gate_floats(mode, hidden, words.size(1) / 2));
    pack_gate_words(words, mode, of_inputs, *low, mutable_floats(packed));
    return packed;
  }
  const Tensor rows = as_contiguous_floats(weight);
  const Tensor packed = new_packed(weight, (int8 ? int8_gate_floats : gate_floats)(mode, hidden, rows.size(1)));
  (int8 ? pack_int8_gates : pack_gate_weight)(rows, mode, of_inputs, mutable_floats(packed));
  return packed;
}

}  // namespace

PackedRecurrent::PackedRecurrent(std::vector<DirectionWeights> directions, int64_t mode, bool int8)
    : mode_(mode), unit_(int8 ? &int8_unit() : nullptr), directions_(std::move(directions)) {
  for (const DirectionWeights& w : directions_) {
    const ScalarType dtype = w.w_ih.scalar_type();
    for (const Tensor* weight : {&w.w_ih, &w.w_hh})
      STD_TORCH_CHECK(weight->dim() == 2 && weight->scalar_type() == dtype && weight->is_contiguous() &&
                          (dtype == ScalarType::Float || (dtype == ScalarType::BFloat16 && !int8)),
                      "a packed recurrent layer: expected contiguous weights of 2 dimensions, float32 or bfloat16");
    STD_TORCH_CHECK(!int8 || !w.w_hr, "a packed recurrent layer: a projected one has no int8");
    const BFloat16Table* low = low_kernels(dtype, w.w_hr.has_value());
    const int64_t hidden = w.w_hh.size(0) / gates_of(mode);
    PackedDirection packed{packed_gates(w.w_ih, mode, true, low, int8),
                           packed_gates(w.w_hh, mode, false, low, int8),
                           new_packed(w.w_ih, bias_floats(hidden)),
                           {}};
    if (w.b_ih)
      pack_bias(as_contiguous_floats(*w.b_ih), as_contiguous_floats(*w.b_hh), mode, mutable_floats(packed.bias),
                low ? low->recurrent.lanes : recurrent_kernels().lanes);
    if (w.w_hr) {
      packed.r = new_packed(w.w_ih, projection_floats(hidden, w.w_hr->size(0)));
      pack_projection(*w.w_hr, mutable_floats(*packed.r));
    }
    packed_.push_back(std::move(packed));
  }
}

}  // namespace cnnlstm_fast
