// Work shared among torch's own threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace cnnlstm_fast {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Items of about equal length that keep every thread busy to the end.
inline int64_t wanted_items() {
  return 4 * static_cast<int64_t>(torch::stable::get_num_threads());
}

// The first error of work that several threads share. Nobody catches what leaves a thread, so that it is carried to the
// one that waits for all.
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
  // Once nobody works any more.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

// torch's parallel_for, whose errors keep their text.
template <class F>
void in_parallel(int64_t begin, int64_t end, int64_t grain, const F& run) {
  FirstError error;
  torch::stable::parallel_for(begin, end, grain,
                              [&](int64_t first, int64_t last) { error.free_of([&] { run(first, last); }); });
  error.rethrow();
}

// Items are handed out one after another, so that a slow core does less.
template <class F>
void for_each_item(int64_t items, const F& run) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), items);
  std::atomic<int64_t> next{0};
  FirstError error;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    error.free_of([&] {
      for (int64_t i = next++; i < items && !error.failed(); i = next++) run(i);
    });
  });
  error.rethrow();
}

}  // namespace cnnlstm_fast
