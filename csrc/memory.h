// Scratch memory of a thread, and outputs on huge pages.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace cnnlstm_fast {

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

// Ask for huge pages under a tensor that nothing has written yet. Does nothing where the system has none.
void advise_huge_pages(const torch::stable::Tensor& fresh);

}  // namespace cnnlstm_fast
