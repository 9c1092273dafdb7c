// Whether memory has changed: a number of what tensors hold, and copies of small ones.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <optional>
#include <vector>

#include "op.h"
#include "tensors.h"

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

// Each tensor's bytes begin at a multiple of this in a copy, so that they can be viewed as any dtype.
constexpr int64_t kAlignment = 16;

int64_t bytes_of(const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), "copy_contents takes CPU tensors");
  return t.numel() * static_cast<int64_t>(t.element_size());
}

int64_t aligned(int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

Tensor copy_contents(std::vector<Tensor> tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "copy_contents takes one tensor at least");
  int64_t bytes = 0;
  for (const Tensor& t : tensors) bytes += aligned(bytes_of(t));
  const Tensor copy = torch::stable::new_empty(tensors[0], Ints{bytes}, torch::headeronly::ScalarType::Byte);
  char* to = static_cast<char*>(copy.mutable_data_ptr());
  for (const Tensor& t : tensors) {
    const Tensor from = torch::stable::contiguous(t);
    const int64_t size = bytes_of(t);
    if (size > 0) std::memcpy(to, from.const_data_ptr(), size);
    to += aligned(size);
  }
  return copy;
}

bool same_contents(Tensor copy, std::vector<Tensor> tensors) {
  int64_t bytes = 0;
  for (const Tensor& t : tensors) bytes += aligned(bytes_of(t));
  STD_TORCH_CHECK(copy.is_cpu() && copy.is_contiguous() && bytes <= bytes_of(copy),
                  "same_contents takes what copy_contents gave for these tensors or more");
  const char* then = static_cast<const char*>(copy.const_data_ptr());
  for (const Tensor& t : tensors) {
    const Tensor now = torch::stable::contiguous(t);
    const int64_t size = bytes_of(t);
    if (size > 0 && std::memcmp(then, now.const_data_ptr(), size) != 0) return false;
    then += aligned(size);
  }
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cnnlstm_fast, m) {
  m.def("fingerprint(Tensor first, Tensor? second, Tensor? third, Tensor? fourth) -> int");
  // The bytes of all tensors, each from a multiple of 16 on; and whether the first ones still hold the same.
  m.def("copy_contents(Tensor[] tensors) -> Tensor");
  m.def("same_contents(Tensor copy, Tensor[] tensors) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CPU, m) {
  m.impl("fingerprint", CNNLSTM_FAST_OP(fingerprint));
  m.impl("copy_contents", CNNLSTM_FAST_OP(copy_contents));
  m.impl("same_contents", CNNLSTM_FAST_OP(same_contents));
}

}  // namespace cnnlstm_fast
