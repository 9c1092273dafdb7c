// Whether memory has changed: a number of what tensors hold.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <optional>

#include "op.h"

namespace cnnlstm_fast {
namespace {

using torch::stable::Tensor;

// Four lanes of multiply and rotate, as xxHash64 mixes them: about as fast as memory is read.
uint64_t mix(uint64_t state, uint64_t word) {
  state += word * 0xC2B2AE3D27D4EB4FULL;
  return ((state << 31) | (state >> 33)) * 0x9E3779B185EBCA87ULL;
}

uint64_t hash(const char* data, int64_t bytes, uint64_t seed) {
  uint64_t lanes[4] = {seed, seed + 1, seed + 2, seed + 3};
  int64_t at = 0;
  for (; at + 32 <= bytes; at += 32)
    for (int lane = 0; lane < 4; ++lane) {
      uint64_t word;
      std::memcpy(&word, data + at + 8 * lane, 8);
      lanes[lane] = mix(lanes[lane], word);
    }
  for (; at < bytes; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, data + at, bytes - at < 8 ? bytes - at : 8);
    lanes[0] = mix(lanes[0], word);
  }
  uint64_t all = static_cast<uint64_t>(bytes);
  for (const uint64_t lane : lanes) all = mix(all, lane);
  return all ^ (all >> 29);
}

int64_t fingerprint(Tensor first, std::optional<Tensor> second, std::optional<Tensor> third,
                    std::optional<Tensor> fourth) {
  uint64_t all = 0;
  for (const std::optional<Tensor>& t : {std::optional<Tensor>(first), second, third, fourth}) {
    if (!t) continue;
    STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous(), "fingerprint takes contiguous CPU tensors");
    all = hash(static_cast<const char*>(t->data_ptr()), t->numel() * t->element_size(), all);
  }
  return static_cast<int64_t>(all);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cnnlstm_fast, m) {
  m.def("fingerprint(Tensor first, Tensor? second, Tensor? third, Tensor? fourth) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CPU, m) {
  m.impl("fingerprint", CNNLSTM_FAST_OP(fingerprint));
}

}  // namespace cnnlstm_fast
