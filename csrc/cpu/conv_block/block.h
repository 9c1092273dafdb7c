// What the host code of blocks hands to their kernels: plain structs and function pointers. The kernels are compiled
// once per instruction set. No library code may be inlined into them: the linker would keep one copy of it, possibly
// the AVX-512 one, for every instruction set.
#pragma once
#include <cstdint>

namespace cnnlstm_fast {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1 };
// Up to kHardtanh the slope is 0 or 1 and an argmax code says which; a backward of the others needs it as a number.
enum Activation : int32_t {
  kNone = 0,
  kReLU = 1,
  kHardtanh = 2,
  kLeakyReLU = 3,
  kELU = 4,
  kTanh = 5,
  kSigmoid = 6,
  kSiLU = 7,
  kGELU = 8,
  kGELUTanh = 9,
  kSoftplus = 10,
  kMish = 11,
  kHardswish = 12,
  kHardsigmoid = 13,
  kActivations
};

constexpr int64_t kCodeGroup = 16;     // channels per group of argmax codes
constexpr int64_t kNibbleWindow = 14;  // larger windows take a byte per code
constexpr int64_t kByteWindow = 254;
constexpr int64_t kMaxVector = 16;  // floats in the widest vector of any instruction set

// One block. All strides are in elements.
struct Block {
  int64_t n, c, h, w;  // input
  int64_t co, kh, kw;  // convolution
  int64_t sh, sw, ph, pw, dh, dw, groups;
  int64_t oh, ow;                                                                  // the convolution's map
  int64_t pool_kh, pool_kw, pool_sh, pool_sw, pool_ph, pool_pw, pool_dh, pool_dw;  // 1 1 1 1 0 0 1 1 without pool
  int64_t out_h, out_w;                                                            // pooled map
  int32_t activation, dtype;
  float act[2];           // Hardtanh: least, most; LeakyReLU: slope; ELU: alpha; Softplus: beta, threshold
  int64_t x_stride[4];    // of (n, c, h, w)
  int64_t out_stride[4];  // of (n, c, h, w): the layout
  int64_t code_bytes;     // per group of 16 channels: 8 or 16

  int64_t code_groups;         // groups of 16 channels
  int64_t padded_h, padded_w;  // input with the convolution's padding
  int64_t taps;                // per output channel: c / groups * kh * kw
  bool pooled;                 // there is a pool, be it of one element
  bool coded;                  // a backward of this block reads argmax codes
  bool by_planes;              // a pointwise convolution of planes into planes, without a pool, codes and `kept`
};

// A library's convolution of one image, channels contiguous, as `epilogue` reads it.
struct ConvOutputView {
  const void* data;                // (oh, ow, co) of one image
  int64_t row_stride, col_stride;  // in elements
  int32_t dtype;
  const float *scale, *shift;  // per channel, a whole number of code groups: a norm. Both null: none
};

// What the forward kernels write: the result, the codes and, laid out as the result, one value of each window's maximum
// for the backward: what `epilogue` read there, if it has a scale, otherwise the activation's slope. Codes and `kept`
// may be null.
struct Outputs {
  void* data;
  uint8_t* codes;
  void* kept;
  // Of frozen convolutions by Winograd's method: floats of the map's size that are added before the activation, and
  // their strides by (n, c, h, w).
  const float* added = nullptr;
  const int64_t* added_stride = nullptr;
};

// A batch norm in training, per channel, a whole number of code groups of each array.
// u = z * scale + shift enters the activation, and the gradient of z is
// scale * (gradient of u - mean_grad - slope * (z - mean)).
struct NormGrads {
  const float *scale, *shift, *mean;
  const float *mean_grad, *slope;  // null until the sums are known
};

// How one patch (the inputs of all taps at one position) is read as whole vectors from memory whose channels are
// contiguous. Lane l of vector j holds tap `tap[j * vector + l]`, or none where it is -1.
struct Patch {
  int64_t vectors;
  const int32_t* offset;       // [vectors], from the patch's first element
  const int32_t* tap;          // [vectors * vector lanes]
  int64_t row_step, col_step;  // from one convolution position to the next
  bool gathered;               // patches are copied side by side (im2col) before they are read
};

struct KernelTable {
  const char* name;
  int64_t vector;       // floats per vector
  int64_t block_width;  // most output channels that one pass computes

  float (*to_float)(const void* data, int64_t index, int32_t dtype);
  void (*from_float)(float value, void* data, int64_t index, int32_t dtype);
  // to[i] = from[i] * by, multiplied in double.
  void (*scale)(const void* from, double by, void* to, int64_t begin, int64_t end, int32_t dtype);

  // Packed weights: per group, blocks of `block_width` channels, [tap][channel] with zero padding.
  // `width_contiguous` gives tap order (kh, c, kw), otherwise (kh, kw, c).
  int64_t (*packed_channels)(int64_t channels);
  void (*pack_weight)(const Block&, const void* weight, bool width_contiguous, float* packed, int64_t begin,
                      int64_t end);

  // The whole block by the direct convolution: pooled rows [row0, row1) of `images` images from `image` on; `scratch`
  // holds forward_scratch floats.
  int64_t (*forward_scratch)(const Block&, int64_t images, int64_t rows);
  void (*forward)(const Block&, const void* x, const float* packed, const float* bias, const Outputs&, int64_t image,
                  int64_t images, int64_t row0, int64_t row1, float* scratch);

  // A depthwise convolution of float planes (x_stride[3] and out_stride[3] are 1) without a pool, codes and `kept`:
  // rows [row0, row1) of channels [c0, c1) of one image; `weight` is (co, taps), `bias` has co floats.
  int64_t (*depthwise_scratch)(const Block&, int64_t rows);
  void (*depthwise)(const Block&, const float* x, const float* weight, const float* bias, float* out, int64_t image,
                    int64_t c0, int64_t c1, int64_t row0, int64_t row1, float* scratch);

  // What follows a library's convolution: norm, activation, pool and layout, pooled rows [row0, row1) of one image.
  int64_t (*epilogue_scratch)(const Block&, int64_t rows);
  void (*epilogue)(const Block&, const ConvOutputView&, const Outputs&, int64_t image, int64_t row0, int64_t row1,
                   float* scratch);

  // Adds `positions` rows of `channels` floats (or bfloat16) to sums[channels].
  void (*sum_rows)(const void* from, int64_t positions, int64_t channels, int32_t dtype, double* sums);
  // Batch norm. Copies `positions` rows of `co` floats (or bfloat16), at least one, and gives per channel their mean
  // and the sum of squares about it. `to` may be `from`.
  void (*copy_and_measure)(const void* from, void* to, int64_t positions, int64_t co, int32_t dtype, double* means,
                           double* squares);
  // Adds the sums of du and of du * (z - mean) over pooled rows of one image to sums[0, co) and [co, 2 co), where
  // du is the gradient of the activation's argument; `kept` holds that argument's z.
  int64_t (*norm_scratch)(const Block&);
  void (*norm_sums)(const Block&, const NormGrads&, const void* grad, const int64_t* grad_stride, const void* kept,
                    const int64_t* kept_stride, int64_t image, int64_t row0, int64_t row1, double* sums,
                    float* scratch);
  // The gradient `to` of the convolution z = `map`, both [oh, ow, co] of one image, for pooled rows [row0, row1). `map`
  // is null where the statistics don't depend on it. Less than all rows only where windows of two pooled rows never
  // meet.
  void (*norm_unpool)(const Block&, const NormGrads&, const void* grad, const int64_t* grad_stride,
                      const uint8_t* codes, const void* kept, const int64_t* kept_stride, int64_t image, int64_t row0,
                      int64_t row1, const void* map, void* to, float* scratch);

  // Adds the products of all pairs of taps less their pivots, and of a last tap of ones, over the positions of rows
  // [row0, row1) of the convolution's map to the upper triangle of sums [taps + 1][patch_width(taps)]. The first
  // position of all gives the pivots.
  int64_t (*patch_width)(int64_t taps);
  int64_t (*patch_scratch)(const Block&);
  void (*patch_products)(const Block&, const void* x, int64_t image, int64_t row0, int64_t row1, double* pivot,
                         double* sums, float* scratch);

  // The gradient of one image's convolution, [oh, ow, co], from the gradient of the
  // pooled map and the codes; rows as for norm_unpool.
  int64_t (*max_unpool_scratch)(const Block&);
  void (*max_unpool)(const Block&, const void* grad, const int64_t* grad_stride, const uint8_t* codes, int64_t image,
                     int64_t row0, int64_t row1, void* map, float* scratch);

  // Adds one image to the gradients of the weight [co][patch.vectors * vector] and the bias [co]; either may be null.
  // Returns whether the input is finite. If not, the weight's gradient lacks the NaN that 0 * inf gives where no
  // gradient passes the pool.
  int64_t (*backward_weight_scratch)(const Block&, const Patch&);
  bool (*backward_weight)(const Block&, const Patch&, const void* x, const void* grad, const int64_t* grad_stride,
                          const uint8_t* codes, int64_t image, float* grad_weight, double* grad_bias, float* scratch);

  // Input gradient of one image; `rows` is the weight as [tile][co][vectors of the tile], where a tile
  // is input_tile vectors of a patch (the last one fewer).
  int64_t (*backward_input_scratch)(const Block&, const Patch&);
  void (*backward_input)(const Block&, const Patch&, const float* rows, const void* grad, const int64_t* grad_stride,
                         const uint8_t* codes, int64_t image, void* grad_x, const int64_t* grad_x_stride,
                         float* scratch);

  int64_t (*input_tile)(const Block&);
  bool (*all_finite)(const float* values, int64_t count);

  // Runs fused multiply-adds at full rate; returns the number of floating point operations.
  double (*fma_burst)(int64_t rounds);
};

}  // namespace cnnlstm_fast
