// Work shared among torch's own threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace cnnlstm_fast {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Items of about equal length that keep every thread busy to the end.
inline int64_t wanted_items() {
  return 4 * static_cast<int64_t>(torch::stable::get_num_threads());
}

// Items are handed out one after another, so that a slow core does less.
template <class F>
void for_each_item(int64_t items, const F& run) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), items);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < items; i = next++) run(i);
  });
}

}  // namespace cnnlstm_fast
