#include "packed_memory.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cnnlstm_fast {

using torch::stable::Tensor;

namespace {

constexpr int64_t kLine = 64, kPackedPage = int64_t{2} << 20;

}  // namespace

void PackedFloats::Free::operator()(float* data) const {
  std::free(data);
}

PackedFloats::PackedFloats(int64_t count) {
  STD_TORCH_CHECK(count >= 0 && count <= int64_t{1} << 48, "packed weights: no machine has memory for ", count);
  const int64_t bytes = (count * static_cast<int64_t>(sizeof(float)) + kLine) / kLine * kLine;  // a line at least
  const int64_t boundary = bytes < kPackedPage ? kLine : kPackedPage;
  void* data = std::aligned_alloc(boundary, (bytes + boundary - 1) / boundary * boundary);
  STD_TORCH_CHECK(data, "packed weights: there is no memory for ", bytes, " bytes");
  data_.reset(static_cast<float*>(data));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (const int64_t whole = bytes / kPackedPage * kPackedPage) madvise(data, whole, MADV_HUGEPAGE);
#endif
  std::memset(data, 0, bytes);  // what lies behind is never touched, so that it has no pages
}

Tensor new_packed(const Tensor& like, int64_t count) {
  auto memory = std::make_shared<PackedFloats>(count);
  const std::vector<int64_t> size{count}, stride{1};
  return torch::stable::from_blob(memory->data(), size, stride, like.device(), torch::headeronly::ScalarType::Float,
                                  [memory](void*) mutable { memory.reset(); });
}

}  // namespace cnnlstm_fast
