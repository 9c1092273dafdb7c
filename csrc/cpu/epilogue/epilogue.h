// What the host code of the op `epilogue` hands to its kernels.
#pragma once
#include <cstdint>

#include "../conv_block/block.h"

namespace cnnlstm_fast {

// One loop over elements: a norm, then an added tensor, then an activation, each of which may be missing.
struct EpilogueStep {
  bool norm, add;
  float alpha;         // what the added tensor is multiplied by
  int32_t activation;  // an Activation
  float act[2];
};

constexpr int32_t kEpilogueSteps = 4;

struct EpilogueProgram {
  EpilogueStep step[kEpilogueSteps];
  int32_t steps;
  int32_t norm_at;  // the step with a norm, or -1
  int32_t dtype;    // of z, the added tensor, results and gradients
};

// A piece of the map as a matrix of consecutive elements: rows are positions and columns channels, or the other way
// round. Parameters have a float for each channel.
struct EpilogueTile {
  int64_t rows, width;
  bool by_column;     // channels are columns
  int64_t bits_step;  // bytes of bits of a row
  NormGrads norm;
};

// What a forward reads and writes, and what a backward does; null where there is no such thing.
struct EpilogueMaps {
  const void* z;
  const void* added;
  void* out;
  uint8_t* passed;  // a bit per element: whether the last activation's slope is 1
};
struct EpilogueGrads {
  const void* grad;
  const void* z;
  const uint8_t* passed;
  void* grad_added;
  void* grad_z;
};

struct EpilogueTable {
  // Floats of scratch for a tile of `count` elements.
  int64_t (*scratch)(int64_t count);
  // The sums of u - pivot and of their squares, per channel of the tile, where u is the norm's argument; added to
  // `sums` [2, channels]. `begin`: the tile's first position gives the pivots, and the sums begin with zero.
  void (*measure)(const EpilogueProgram&, const EpilogueTile&, const void* z, bool begin, double* pivots, double* sums,
                  float* scratch);
  void (*forward)(const EpilogueProgram&, const EpilogueTile&, const EpilogueMaps&, float* scratch);
  // Adds the sums of du and of du * (u - mean) per channel to `sums` [2, channels], where du is the gradient of the
  // norm's result. Writes the gradient of the added tensor, if that is asked for.
  void (*sums)(const EpilogueProgram&, const EpilogueTile&, const EpilogueGrads&, double* sums, float* scratch);
  void (*backward)(const EpilogueProgram&, const EpilogueTile&, const EpilogueGrads&, float* scratch);
};

}  // namespace cnnlstm_fast
