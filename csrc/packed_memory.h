// Memory of packed weights: written once, read from front to back at every call.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>

namespace cnnlstm_fast {

// Zeroed floats on a cache line's boundary. What fills huge pages lies on them, where the system has them: an address
// of every few kilobytes has to be looked up otherwise, and no processor prefetches past the end of a page.
class PackedFloats {
 public:
  explicit PackedFloats(int64_t count);
  float* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* data) const;
  };
  std::unique_ptr<float, Free> data_;
};

// The same as a tensor of one dimension.
torch::stable::Tensor new_packed(const torch::stable::Tensor& like, int64_t count);

}  // namespace cnnlstm_fast
