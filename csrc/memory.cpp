#include "memory.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

#include "limits.h"
#include "op.h"
#include "threads.h"

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

// Under AddressSanitizer, an access to memory beyond the end of a buffer is reported.
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

// ---- What an op returns

namespace {

// Smaller memory stays with the C library, which from here on gives it back to the system again and again.
const int64_t kPooledBytes = limit("POOL_BYTES", int64_t{4} << 20, 1);
// What the C library maps afresh at every call. Huge pages for less may cost more, looking for them, than they save.
const int64_t kHugeBytes = limit("HUGE_BYTES", int64_t{32} << 20, 1);
// Whether every buffer is a mapping of its own, filled with NaN, between pages without access, and is unmapped when it
// is given back: a read or write beyond its ends, or later, ends the process. Results then are PyTorch's own memory.
const bool kFenced = limit("FENCES", 0, 0) != 0;
constexpr int64_t kMostTrackedBytes = int64_t{256} << 20;
constexpr size_t kMostTracked = 64;

// A mutex that is open in a forked child process, also where another thread held it at the fork.
template <class Owner>
std::mutex& forkable() {
  static std::mutex* const mutex = [] {
#if defined(__linux__)
    pthread_atfork([] { forkable<Owner>().lock(); }, [] { forkable<Owner>().unlock(); },
                   [] { forkable<Owner>().unlock(); });
#endif
    return new std::mutex;
  }();
  return *mutex;
}

void advise_huge_pages([[maybe_unused]] const Tensor& t, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kHugeBytes) return;
  const int64_t begin = reinterpret_cast<int64_t>(t.data_ptr()), first = round_up(begin, kHugePage);
  const int64_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// PyTorch's own error has no text where an allocation fails.
Tensor new_empty(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype, int64_t bytes) {
  try {
    return torch::stable::new_empty(like, size, dtype);
  } catch (const std::runtime_error&) {
    STD_TORCH_CHECK(false, "cnnlstm_fast: there is no memory for a result of ", bytes, " bytes");
  }
}

// Storages of large results, each used for another result once nobody else holds it. They are PyTorch's own: a storage
// of our memory could be neither resized nor emptied. Only PyTorch knows how many hold one (ops/outputs.py). At most
// 256 MiB are tracked, whether others hold them or not. A storage that is dropped from here belongs to its result
// alone.
class OutputPool {
 public:
  static OutputPool& outputs() {
    static OutputPool* const all = new OutputPool;
    return *all;
  }

  void recycle(bool on) { on_ = on && !kFenced; }

  // A tensor of bytes whose storage, which has exactly so many, a result is to be made of, and is then tracked.
  std::optional<Tensor> take(const Tensor& like, int64_t bytes) {
    if (!on_ || bytes > kMostTrackedBytes) return std::nullopt;
    std::vector<Tensor> same, dropped;
    {
      const std::lock_guard<std::mutex> lock(forkable<OutputPool>());
      for (size_t i = 0; i < tracked_.size();)
        if (tracked_[i].numel() == bytes)
          same.push_back(remove(i));
        else
          ++i;
    }
    std::optional<Tensor> found;
    if (!same.empty()) {
      std::vector<int64_t> state = holders_of(same);
      for (size_t i = same.size(); i-- > 0 && !found;)  // what was used last may still be in a cache
        if (state[i] == kNobody) {
          found = same[i];
          state[i] = kForeign;
        }
      for (size_t i = 0; i < same.size(); ++i)
        if (state[i] != kForeign) add(same[i], dropped);
    }
    if (!found) {
      found = new_empty(like, {bytes}, ScalarType::Byte, bytes);
      advise_huge_pages(*found, bytes);
    }
    return found;
  }

  void track(const Tensor& t) {
    std::vector<Tensor> dropped;
    add(t, dropped);
  }

 private:
  enum Holders : int64_t { kNobody = 0, kSomebody = 1, kForeign = 2 };

  static std::vector<int64_t> holders_of(const std::vector<Tensor>& tensors) {
    using torch::stable::detail::from;
    StableIValue stack[1] = {from(tensors)};
    std::vector<int64_t> found;
    if (torch_call_dispatcher("cnnlstm_fast::holders", "", stack, TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS) {
      found = torch::stable::detail::to<std::vector<int64_t>>(stack[0]);
    } else if (!tensors.empty()) {  // Ctrl-C before its first line
      holders_of({});
    }
    found.resize(tensors.size(), kSomebody);
    return found;
  }

  Tensor remove(size_t at) {
    const Tensor found = tracked_[at];
    tracked_.erase(tracked_.begin() + at);
    bytes_ -= found.numel();
    return found;
  }

  // What makes room is drawn by chance: a program that goes through more storages than there is room for, again and
  // again in the same order, would otherwise never find one of them. The caller drops it when the lock is open.
  void add(const Tensor& t, std::vector<Tensor>& dropped) {
    const std::lock_guard<std::mutex> lock(forkable<OutputPool>());
    while (!tracked_.empty() && (tracked_.size() == kMostTracked || bytes_ + t.numel() > kMostTrackedBytes)) {
      chance_ = chance_ * 6364136223846793005u + 1442695040888963407u;
      dropped.push_back(remove((chance_ >> 33) % tracked_.size()));
    }
    tracked_.push_back(t);
    bytes_ += t.numel();
  }

  std::atomic<bool> on_{false};
  std::vector<Tensor> tracked_;
  int64_t bytes_ = 0;
  uint64_t chance_ = 1;
};

// Made as the library is loaded, where no other thread can fork.
[[maybe_unused]] const bool kOutputsMade = (OutputPool::outputs(), &forkable<OutputPool>());

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& size) {
  std::vector<int64_t> stride(size.size(), 1);
  for (size_t i = size.size(); i-- > 1;) stride[i - 1] = stride[i] * size[i];
  return stride;
}

void recycle_outputs(bool on) {
  OutputPool::outputs().recycle(on);
}

}  // namespace

Tensor new_output(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  const int64_t bytes = elements("a result", size) * bytes_of(dtype);
  if (bytes < kPooledBytes) return new_empty(like, size, dtype, bytes);
  if (const std::optional<Tensor> memory = OutputPool::outputs().take(like, bytes)) {
    using torch::stable::detail::from;
    // By way of a tensor of today's mode, inference or not, whose version counts that it is set.
    const std::vector<int64_t> flat{bytes}, one{1}, strides = contiguous_strides(size);
    const Tensor made = torch::stable::new_empty(like, {0}, ScalarType::Byte);
    StableIValue stack[5] = {from(made), from(*memory), from(int64_t{0}), from(flat), from(one)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::set_", "source_Tensor_storage_offset", stack, TORCH_ABI_VERSION));
    const Tensor set = torch::stable::detail::to<Tensor>(stack[0]);
    AtenTensorHandle result;
    TORCH_ERROR_CODE_CHECK(aoti_torch__alloc_from_pool(set.get(), 0, torch::stable::detail::to<int32_t>(from(dtype)),
                                                       static_cast<int64_t>(size.size()), size.data(), strides.data(),
                                                       &result));
    OutputPool::outputs().track(*memory);
    return Tensor(result);
  }
  const Tensor made = new_empty(like, size, dtype, bytes);
  advise_huge_pages(made, bytes);
  return made;
}

// ---- What an op works on

#if defined(__linux__) && defined(MADV_HUGEPAGE)

namespace {

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
  static Pool& pool() {
    static Pool* const all = new Pool;
    return *all;
  }

  // A buffer of at least `bytes`, or null.
  Buffer take(int64_t bytes) {
    if (kFenced) return Fenced::make(bytes);
    bytes = round_up(bytes, bytes < kHugeBytes ? kSmallStep : kHugePage);
    {
      const std::lock_guard<std::mutex> lock(forkable<Pool>());
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
        const std::lock_guard<std::mutex> lock(forkable<Pool>());
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
  std::array<Buffer, kMostIdle> idle_;
  int64_t count_ = 0, idle_bytes_ = 0;
};

}  // namespace

namespace {
[[maybe_unused]] const bool kPoolMade = (Pool::pool(), &forkable<Pool>());
}

Tensor new_temporary(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  const int64_t bytes = elements("what a block works on", size) * bytes_of(dtype);
  if (bytes < kPooledBytes) return new_empty(like, size, dtype, bytes);
  const Buffer buffer = Pool::pool().take(bytes);
  STD_TORCH_CHECK(buffer.data, "cnnlstm_fast: there is no memory for ", bytes, " bytes");
  try {
    return torch::stable::from_blob(buffer.data, size, contiguous_strides(size), like.device(), dtype,
                                    [buffer](void*) { Pool::pool().give_back(buffer); });
  } catch (...) {
    Pool::pool().give_back(buffer);
    throw;
  }
}

#else

Tensor new_temporary(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  return new_output(like, size, dtype);
}

#endif

STABLE_TORCH_LIBRARY_FRAGMENT(cnnlstm_fast, m) {
  m.def("recycle_outputs(bool on) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CompositeExplicitAutograd, m) {
  m.impl("recycle_outputs", CNNLSTM_FAST_OP(recycle_outputs));
}

}  // namespace cnnlstm_fast
