// Convolutions and matrix products for inference, whose weights are packed once.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/conv_block/block.h"
#include "packed_memory.h"
#include "tensors.h"

namespace cnnlstm_fast {

// layout(max_pool(activation(conv(x) + bias + added))), every part but the convolution optional.
struct FrozenConvDescription {
  int64_t channels, out_channels, kernel_h, kernel_w;
  Ints conv;  // as in the schema of conv_block: stride, padding, dilation (h, w each), groups, perhaps more zeros after
  int64_t activation = kNone;  // an Activation
  Floats act;                  // its numbers, as in the schema of conv_block
  bool adds = false;           // whether a tensor of the map's size is added before the activation
  Ints pool;                   // as in the schema of conv_block; empty: none
  // Which axis of (N, C, H, W) lies outermost to innermost: {0, 2, 3, 1} is channels-last, {0, 1, 2, 3} channels-first.
  // An addend lies as the result.
  Ints in_order{0, 2, 3, 1}, out_order{0, 2, 3, 1};
  bool winograd = true;  // whether weights are kept for Winograd's method too, 16 floats for every 9
};

// Raises where there is no such activation, or not of so many numbers.
void check_activation(int64_t activation, const Floats& act);

// MapStrides in floats by (N, C, H, W).
struct MapStrides {
  int64_t of[4];
};

// How a call computes: kAuto takes what arithmetic promises to be fastest. A method that does not serve is replaced by
// the direct one: Winograd's, but for 3x3 taps of stride 1 on inputs whose channels lie side by side.
enum class FrozenMethod : int32_t { kAuto = 0, kDirect = 1, kWinograd = 2 };

// What one call of a FrozenConv reads and writes. Memory is dense in the order of the description, unless strides are
// given: a part of the channels of a wider tensor, for example.
struct FrozenConvCall {
  int64_t n, h, w;
  const float* x = nullptr;
  float* out = nullptr;
  const float* added = nullptr;
  std::optional<MapStrides> x_strides, out_strides, added_strides;
  FrozenMethod method = FrozenMethod::kAuto;
};

class FrozenConv {
 public:
  // Packs the weight (co, c / groups, kh, kw) and the bias [co], which may be null, for the instruction set of this
  // process; the caller's may go. Raises where the arguments describe no convolution.
  FrozenConv(const FrozenConvDescription& description, const float* weight, const float* bias);
  // Over what pack_into wrote, which must stay.
  FrozenConv(const FrozenConvDescription& description, const float* packed);

  // Packed weights alone: floats of them, and writing them to memory aligned to 64 bytes.
  static int64_t packed_floats(const FrozenConvDescription& description);
  static void pack_into(const FrozenConvDescription& description, const float* weight, const float* bias, float* to);

  // (oh, ow) of the result for an input of this size. Raises where the kernel or the pool does not fit.
  std::vector<int64_t> out_size(int64_t h, int64_t w) const;

  // Bytes that run wants for a call of these sizes and strides, whatever its pointers, and torch's present number of
  // threads.
  int64_t scratch_bytes(const FrozenConvCall& call) const;

  // Writes the result. `scratch` is aligned to 64 bytes and at least scratch_bytes for one thread; as many threads work
  // as it has room for. Allocates nothing. Any number of threads may call it at a time, each with its own scratch.
  void run(const FrozenConvCall& call, void* scratch, int64_t scratch_bytes) const;

  // Whether Winograd's method serves: where it does, weights are kept for it as well.
  bool has_winograd() const;

 private:
  struct Plan;
  Plan plan_of(const FrozenConvCall& call) const;
  void run_direct(Plan& plan, const FrozenConvCall& call, float* scratch, int64_t floats) const;
  // False where NaN or infinity are not where they belong, and the direct method has to compute.
  bool run_winograd(const Plan& plan, const FrozenConvCall& call, float* scratch, int64_t floats) const;

  const FrozenConvDescription description_;
  const Block block_;  // without sizes
  const std::optional<PackedFloats> own_;
  const float* const packed_;
};

}  // namespace cnnlstm_fast
