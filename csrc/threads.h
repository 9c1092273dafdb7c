// Work shared among torch's own threads, and how they treat denormal numbers.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace cnnlstm_fast {

// While this lives, denormal operands and results of the thread are zero; then its mode is again what it was.
// Gradients through time and saturated gates are full of them, and some processors take a hundred times as long
// over one as over a normal number.
class FlushDenormals {
 public:
  FlushDenormals() : before_(mode()) {
    if ((before_ & kFlush) != kFlush) set_mode(before_ | kFlush);
  }
  ~FlushDenormals() {
    if ((before_ & kFlush) != kFlush) set_mode(before_);
  }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kFlush = 0x8040;  // of results, and of operands
  static uint64_t mode() { return _mm_getcsr(); }
  static void set_mode(uint64_t mode) { _mm_setcsr(static_cast<uint32_t>(mode)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = uint64_t{1} << 24;
  static uint64_t mode() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set_mode(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t mode() { return 0; }
  static void set_mode(uint64_t) {}
#endif
  const uint64_t before_;
};

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t to) {
  return ceil_div(a, to) * to;
}

// Items of about equal length that keep every thread busy to the end.
inline int64_t wanted_items() {
  return 4 * static_cast<int64_t>(torch::stable::get_num_threads());
}

// The first error of work that several threads share. An exception that leaves a thread ends the process, so it is
// kept for the thread that waits for all.
class FirstError {
 public:
  // Whether `run` came to its end.
  template <class F>
  bool free_of(const F& run) {
    try {
      run();
      return true;
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
      return false;
    }
  }
  // Whether the others may as well stop.
  bool failed() const { return failed_.load(std::memory_order_relaxed); }
  // To be called when all threads have ended.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

// What all parallel work goes through: torch's parallel_for, with denormals flushed, whose errors keep their text.
template <class F>
void in_parallel(int64_t begin, int64_t end, int64_t grain, const F& run) {
  FirstError error;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    const FlushDenormals flush;
    error.free_of([&] { run(first, last); });
  });
  error.rethrow();
}

// Items are handed out one after another, so that a slow core does less.
template <class F>
void for_each_item(int64_t items, const F& run) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), items);
  std::atomic<int64_t> next{0};
  FirstError error;
  in_parallel(0, threads, 1, [&](int64_t, int64_t) {
    error.free_of([&] {
      for (int64_t i = next++; i < items && !error.failed(); i = next++) run(i);
    });
  });
  error.rethrow();
}

}  // namespace cnnlstm_fast
