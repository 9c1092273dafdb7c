// Stands in for LibTorch's parallel_for, with threads that ThreadSanitizer sees begin and end.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

using Work = void (*)(int64_t begin, int64_t end, void* context);

extern "C" __attribute__((visibility("default"))) int32_t torch_get_num_threads(uint32_t* threads) {
  *threads = 4;
  return 0;
}

extern "C" __attribute__((visibility("default"))) int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                                                             Work work, void* context) {
  const int64_t items = end - begin, most = std::max<int64_t>(1, items / std::max<int64_t>(1, grain));
  const int64_t threads = std::min<int64_t>(4, most);
  std::vector<std::thread> running;
  for (int64_t t = 0; t < threads; ++t)
    running.emplace_back(work, begin + items * t / threads, begin + items * (t + 1) / threads, context);
  for (std::thread& thread : running) thread.join();
  return 0;
}
