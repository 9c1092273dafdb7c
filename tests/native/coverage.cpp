// Edge coverage for the fuzzer: code built with -fsanitize-coverage=trace-pc calls __sanitizer_cov_trace_pc at
// every edge; it counts (previous place, this place) pairs in a map of 2^16 counters, as AFL does.
#include <cstdint>

namespace {
constexpr uint32_t kMapSize = 1 << 16;
uint8_t map[kMapSize];
thread_local uint32_t previous;

uint32_t mix(uint64_t place) {
  return static_cast<uint32_t>((place * 0x9e3779b97f4a7c15ull) >> 48);
}
}  // namespace

extern "C" {
__attribute__((visibility("default"))) void __sanitizer_cov_trace_pc() {
  const uint32_t here = mix(reinterpret_cast<uint64_t>(__builtin_return_address(0)));
  uint8_t& count = map[(here ^ previous) & (kMapSize - 1)];
  count += count != 255;
  previous = here >> 1;
}

__attribute__((visibility("default"))) uint8_t* cnnlstm_fast_coverage() {
  return map;
}
}
