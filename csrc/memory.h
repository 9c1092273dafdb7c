// Sizes, scratch memory of a thread, and large outputs.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

namespace cnnlstm_fast {

// The elements of a tensor of these sizes. An error where they are more than 2^40, sizes of 0 taken for 1: then no
// product of some of the sizes overflows. A tensor whose strides are 0 may have such sizes with hardly any memory.
int64_t elements(const char* what, std::initializer_list<int64_t> sizes);
int64_t elements(const char* what, const std::vector<int64_t>& sizes);
int64_t elements(const char* what, const torch::stable::Tensor& t);

// At least `floats` floats, aligned to a cache line, valid until this thread's next call. The memory
// stays with the thread, since fresh pages cost more than most blocks; more than a few megabytes are
// given back at the next smaller request.
float* thread_scratch(int64_t floats);

// Zeroed floats on a cache line's boundary: vectors that cross lines cost two loads.
class AlignedFloats {
 public:
  explicit AlignedFloats(int64_t count);
  ~AlignedFloats();
  AlignedFloats(const AlignedFloats&) = delete;
  AlignedFloats& operator=(const AlignedFloats&) = delete;
  float* data() const { return data_; }
  float& operator[](int64_t i) const { return data_[i]; }

 private:
  float* data_;
};

// A new, unwritten CPU tensor like `like` of the given size, for an op to return. Its storage is PyTorch's own, so that
// it can be resized and emptied. The C library gives large memory back to the system each time, and clearing fresh
// pages costs as much as a convolution: such memory is used again when nobody else holds it. The largest lies on huge
// pages, where the system has them.
torch::stable::Tensor new_output(const torch::stable::Tensor& like, const std::vector<int64_t>& size,
                                 torch::headeronly::ScalarType dtype);

// The same for what an op works on and never returns: such memory comes from a small pool of our own, and goes back to
// it with its last owner.
torch::stable::Tensor new_temporary(const torch::stable::Tensor& like, const std::vector<int64_t>& size,
                                    torch::headeronly::ScalarType dtype);

}  // namespace cnnlstm_fast
