#include "memory.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include "limits.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace cnnlstm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kMostElements = int64_t{1} << 40;
const int64_t kKeptBytes = limit("SCRATCH_BYTES", int64_t{16} << 20, 0);

int64_t round_up(int64_t bytes, int64_t to) {
  return (bytes + to - 1) / to * to;
}

int64_t elements_of(const char* what, const int64_t* sizes, int64_t count) {
  int64_t left = kMostElements, found = 1;
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(sizes[i] >= 0, "cnnlstm_fast: ", what, " has a negative size, ", sizes[i]);
    left /= sizes[i] > 1 ? sizes[i] : 1;
    found *= left ? sizes[i] : 0;
  }
  if (left) return found;
  std::string all;
  for (int64_t i = 0; i < count; ++i) all += (i ? ", " : "") + std::to_string(sizes[i]);
  STD_TORCH_CHECK(false, "cnnlstm_fast: ", what, " of size (", all, ") has more than ", kMostElements, " elements");
}

int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Float:
      return 4;
    case ScalarType::Double:
      return 8;
    default:
      STD_TORCH_CHECK(false, "cnnlstm_fast: results of this dtype are not made");
  }
}

// Bytes of so many floats, a whole number of cache lines. What is multiplied from sizes of at most 2^40 elements stays
// below 2^48 floats.
int64_t line_bytes(int64_t floats) {
  STD_TORCH_CHECK(floats >= 0 && floats <= int64_t{1} << 48, "cnnlstm_fast: sizes that no machine has memory for");
  return round_up(floats * static_cast<int64_t>(sizeof(float)), kCacheLine);
}

void* aligned_bytes(int64_t bytes) {
  void* data = std::aligned_alloc(kCacheLine, bytes);
  STD_TORCH_CHECK(data || !bytes, "cnnlstm_fast: there is no memory for ", bytes, " bytes");
  return data;
}

struct Arena {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Arena() { std::free(data); }
};

// What lies beyond the end of a buffer is nobody's: under AddressSanitizer an access is a report.
void forbid([[maybe_unused]] const void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(data, bytes);
#endif
}

void allow([[maybe_unused]] const void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(data, bytes);
#endif
}

}  // namespace

int64_t elements(const char* what, std::initializer_list<int64_t> sizes) {
  return elements_of(what, sizes.begin(), static_cast<int64_t>(sizes.size()));
}

int64_t elements(const char* what, const std::vector<int64_t>& sizes) {
  return elements_of(what, sizes.data(), static_cast<int64_t>(sizes.size()));
}

int64_t elements(const char* what, const Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) sizes[i] = t.size(i);
  return elements(what, sizes);
}

AlignedFloats::AlignedFloats(int64_t count) {
  const int64_t bytes = line_bytes(count) + kCacheLine;
  data_ = static_cast<float*>(aligned_bytes(bytes));
  std::memset(data_, 0, bytes);
}

AlignedFloats::~AlignedFloats() {
  std::free(data_);
}

float* thread_scratch(int64_t floats) {
  static thread_local Arena arena;
  const int64_t bytes = line_bytes(floats);
  if (arena.bytes < bytes || (arena.bytes > kKeptBytes && bytes <= kKeptBytes)) {
    std::free(arena.data);
    arena = {};
    arena.data = aligned_bytes(bytes);
    arena.bytes = bytes;
  }
  allow(arena.data, arena.bytes);
  forbid(static_cast<char*>(arena.data) + bytes, arena.bytes - bytes);
  return static_cast<float*>(arena.data);
}

#if defined(__linux__) && defined(MADV_HUGEPAGE)

namespace {

// Smaller memory stays with the C library, which from here on gives it back to the system again and again.
const int64_t kPooledBytes = limit("POOL_BYTES", int64_t{4} << 20, 1);
// What the C library maps afresh at every call. Huge pages for less may cost more, looking for them, than they save.
const int64_t kHugeBytes = limit("HUGE_BYTES", int64_t{32} << 20, 1);
// Whether every buffer is a mapping of its own between pages that nobody may touch, filled with NaN, and gone when it
// is given back: whatever reads or writes beyond its ends, or later, ends the process.
const bool kFenced = limit("FENCES", 0, 0) != 0;
constexpr int64_t kPage = 4096;
constexpr int64_t kSmallStep = int64_t{64} << 10;
constexpr int64_t kMostIdleBytes = int64_t{256} << 20;

struct Buffer {
  char* data = nullptr;
  int64_t bytes = 0;
};

// Pages of `bytes` between two that are forbidden; the buffer ends where the second one begins, to a cache line.
class Fenced {
 public:
  static Buffer make(int64_t bytes) {
    const int64_t inside = inside_of(bytes);
    void* all = mmap(nullptr, inside + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return {};
    char* pages = static_cast<char*>(all) + kPage;
    if (mprotect(pages, inside, PROT_READ | PROT_WRITE)) {
      munmap(all, inside + 2 * kPage);
      return {};
    }
    std::memset(pages, kUnwritten, inside);
    char* data = pages + inside - round_up(bytes, kCacheLine);
    forbid(pages, data - pages);
    forbid(data + bytes, pages + inside - data - bytes);
    return {data, bytes};
  }

  static void unmake(Buffer b) {
    const int64_t inside = inside_of(b.bytes);
    char* pages = b.data + round_up(b.bytes, kCacheLine) - inside;
    allow(pages, inside);
    for (char* at = pages; at < pages + inside; ++at)
      if ((at < b.data || at >= b.data + b.bytes) && *at != kUnwritten) {
        std::fprintf(stderr, "cnnlstm_fast: a buffer of %lld bytes was written %lld bytes from its begin\n",
                     static_cast<long long>(b.bytes), static_cast<long long>(at - b.data));
        std::abort();
      }
    munmap(pages - kPage, inside + 2 * kPage);
  }

 private:
  static constexpr char kUnwritten = -1;  // a NaN in every float type
  static int64_t inside_of(int64_t bytes) { return round_up(round_up(bytes, kCacheLine), kPage); }
};

// Buffers that nobody holds, the longest unused first. Lives as long as the process: tensors may be
// freed after static objects are. Nothing here allocates: it may run where an error would have nowhere to go.
class Pool {
 public:
  Pool() {
    pthread_atfork([] { pool().mutex_.lock(); }, [] { pool().mutex_.unlock(); }, [] { pool().mutex_.unlock(); });
  }

  static Pool& pool() {
    static Pool* const all = new Pool;
    return *all;
  }

  // A buffer of at least `bytes`, or null.
  Buffer take(int64_t bytes) {
    if (kFenced) return Fenced::make(bytes);
    bytes = round_up(bytes, bytes < kHugeBytes ? kSmallStep : kHugePage);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (int64_t i = count_ - 1; i >= 0; --i)
        if (idle_[i].bytes >= bytes && idle_[i].bytes <= bytes + bytes / 4) return remove(i);
    }
    return bytes < kHugeBytes ? map(bytes) : map_huge(bytes);
  }

  void give_back(Buffer buffer) noexcept {
    if (kFenced) return Fenced::unmake(buffer);
    for (bool kept = false; !kept;) {
      Buffer surplus;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (count_ > 0 && (count_ == kMostIdle || idle_bytes_ + buffer.bytes > kMostIdleBytes)) {
          surplus = remove(0);
        } else if (buffer.bytes <= kMostIdleBytes) {
          idle_[count_++] = buffer;
          idle_bytes_ += buffer.bytes;
          kept = true;
        } else {
          surplus = buffer;
          kept = true;
        }
      }
      if (surplus.data) munmap(surplus.data, surplus.bytes);
    }
  }

 private:
  Buffer remove(int64_t at) {
    const Buffer found = idle_[at];
    for (int64_t i = at + 1; i < count_; ++i) idle_[i - 1] = idle_[i];
    --count_;
    idle_bytes_ -= found.bytes;
    return found;
  }

  static Buffer map(int64_t bytes) {
    void* all = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return {};
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

  static constexpr int64_t kMostIdle = 256;
  std::mutex mutex_;
  std::array<Buffer, kMostIdle> idle_;
  int64_t count_ = 0, idle_bytes_ = 0;
};

}  // namespace

Tensor new_output(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  const int64_t bytes = elements("a result", size) * bytes_of(dtype);
  if (bytes < kPooledBytes) return torch::stable::new_empty(like, size, dtype);
  const Buffer buffer = Pool::pool().take(bytes);
  STD_TORCH_CHECK(buffer.data, "cnnlstm_fast: there is no memory for a result of ", bytes, " bytes");
  try {
    std::vector<int64_t> stride(size.size(), 1);
    for (size_t i = size.size() - 1; i > 0; --i) stride[i - 1] = stride[i] * size[i];
    return torch::stable::from_blob(buffer.data, size, stride, like.device(), dtype,
                                    [buffer](void*) { Pool::pool().give_back(buffer); });
  } catch (...) {
    Pool::pool().give_back(buffer);
    throw;
  }
}

#else

Tensor new_output(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  elements("a result", size);
  return torch::stable::new_empty(like, size, dtype);
}

#endif

}  // namespace cnnlstm_fast
