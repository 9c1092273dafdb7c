#include "memory.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <iterator>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cnnlstm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

#if defined(__linux__) && defined(MADV_HUGEPAGE)

namespace {

// Smaller memory stays with the C library, which from here on gives it back to the system again and again.
constexpr int64_t kPooledBytes = int64_t{4} << 20;
// What the C library maps afresh at every call. Huge pages for less may cost more, looking for them, than they save.
constexpr int64_t kHugeBytes = int64_t{32} << 20;
constexpr int64_t kSmallStep = int64_t{64} << 10;
constexpr int64_t kMostIdleBytes = int64_t{256} << 20;

struct Buffer {
  char* data;
  int64_t bytes;
};

// Buffers that nobody holds, the longest unused first. Lives as long as the process: tensors may be
// freed after static objects are.
class Pool {
 public:
  // A buffer of at least `bytes`, or null.
  Buffer take(int64_t bytes) {
    bytes = round_up(bytes, bytes < kHugeBytes ? kSmallStep : kHugePage);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto it = idle_.rbegin(); it != idle_.rend(); ++it)
        if (it->bytes >= bytes && it->bytes <= bytes + bytes / 4) {
          const Buffer found = *it;
          idle_.erase(std::next(it).base());
          idle_bytes_ -= found.bytes;
          return found;
        }
    }
    return bytes < kHugeBytes ? map(bytes) : map_huge(bytes);
  }

  void give_back(Buffer buffer) {
    std::vector<Buffer> surplus;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      idle_.push_back(buffer);
      idle_bytes_ += buffer.bytes;
      while (idle_bytes_ > kMostIdleBytes) {
        surplus.push_back(idle_.front());
        idle_bytes_ -= idle_.front().bytes;
        idle_.erase(idle_.begin());
      }
    }
    for (const Buffer& b : surplus) munmap(b.data, b.bytes);
  }

 private:
  static Buffer map(int64_t bytes) {
    void* all = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return {nullptr, 0};
    return {static_cast<char*>(all), bytes};
  }

  static Buffer map_huge(int64_t bytes) {
    const Buffer all = map(bytes + kHugePage);
    if (!all.data) return all;
    char* begin = all.data;
    char* data = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(begin), kHugePage));
    if (data > begin) munmap(begin, data - begin);
    if (begin + kHugePage > data) munmap(data + bytes, begin + kHugePage - data);
    madvise(data, bytes, MADV_HUGEPAGE);
    return {data, bytes};
  }

  std::mutex mutex_;
  std::vector<Buffer> idle_;
  int64_t idle_bytes_ = 0;
};

Pool& pool() {
  static Pool* const all = new Pool;
  return *all;
}

}  // namespace

Tensor new_output(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  int64_t bytes = dtype == ScalarType::Byte ? 1 : like.element_size();
  for (int64_t s : size) bytes *= s;
  if (bytes < kPooledBytes) return torch::stable::new_empty(like, size, dtype);
  const Buffer buffer = pool().take(bytes);
  if (!buffer.data) return torch::stable::new_empty(like, size, dtype);
  std::vector<int64_t> stride(size.size(), 1);
  for (size_t i = size.size() - 1; i > 0; --i) stride[i - 1] = stride[i] * size[i];
  return torch::stable::from_blob(buffer.data, size, stride, like.device(), dtype,
                                  [buffer](void*) { pool().give_back(buffer); });
}

#else

Tensor new_output(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  return torch::stable::new_empty(like, size, dtype);
}

#endif

}  // namespace cnnlstm_fast
