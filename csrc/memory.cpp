#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cnnlstm_fast {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kKeptBytes = int64_t{16} << 20;

int64_t round_up(int64_t bytes, int64_t to) {
  return (bytes + to - 1) / to * to;
}

struct Arena {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Arena() { std::free(data); }
};

}  // namespace

AlignedFloats::AlignedFloats(int64_t count) {
  const int64_t bytes = round_up(count * static_cast<int64_t>(sizeof(float)), kCacheLine) + kCacheLine;
  data_ = static_cast<float*>(std::aligned_alloc(kCacheLine, bytes));
  if (!data_) throw std::bad_alloc();
  std::memset(data_, 0, bytes);
}

AlignedFloats::~AlignedFloats() {
  std::free(data_);
}

float* thread_scratch(int64_t floats) {
  static thread_local Arena arena;
  const int64_t bytes = round_up(floats * static_cast<int64_t>(sizeof(float)), kCacheLine);
  if (arena.bytes < bytes || (arena.bytes > kKeptBytes && bytes <= kKeptBytes)) {
    std::free(arena.data);
    arena.bytes = 0;
    arena.data = std::aligned_alloc(kCacheLine, bytes);
    if (!arena.data) throw std::bad_alloc();
    arena.bytes = bytes;
  }
  return static_cast<float*>(arena.data);
}

void advise_huge_pages(const torch::stable::Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t end = begin + fresh.numel() * fresh.element_size();
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)fresh;
#endif
}

}  // namespace cnnlstm_fast
