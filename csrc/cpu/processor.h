// Units of the processor that the compiler's __builtin_cpu_supports has no name for.
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cnnlstm_fast {

inline bool cpu_has_avx512_bf16() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
#else
  return false;
#endif
}

inline bool cpu_has_avx512_vnni() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// Tiles, and products of bfloat16 or of int8 by them.
enum class TileProducts : unsigned { kBFloat16 = 1u << 22, kInt8 = 1u << 25 };
inline bool cpu_has_tiles_for(TileProducts of) {
#if defined(__x86_64__)
  constexpr unsigned kTiles = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & static_cast<unsigned>(of)) && (d & kTiles);
#else
  return false;
#endif
}

// The same, and Linux lets the process use them: it is asked once for all of its threads.
inline bool may_use_tiles_for(TileProducts of) {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return cpu_has_tiles_for(of) && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace cnnlstm_fast
