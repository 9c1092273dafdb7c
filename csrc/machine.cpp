// What this machine is and can do: the chosen instruction set and its measured arithmetic peak.
#include <torch/csrc/stable/ops.h>

#include <chrono>
#include <string>
#include <vector>

#include "cpu/bfloat16/bfloat16.h"
#include "cpu/dispatch.h"
#include "op.h"
#include "threads.h"

namespace cnnlstm_fast {
namespace {

std::string isa() {
  return kernels().name;
}

// GFLOP/s of bursts on all of torch's threads at once.
double peak(double (*burst)(int64_t), int64_t rounds, double seconds) {
  using Clock = std::chrono::steady_clock;
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<double> rate(threads, 0.0);
  in_parallel(0, threads, 1, [&](int64_t begin, int64_t end) {
    const auto start = Clock::now();
    double flops = 0, spent = 0;
    do {
      flops += burst(rounds);
      spent = std::chrono::duration<double>(Clock::now() - start).count();
    } while (spent < seconds);
    for (int64_t t = begin; t < end; ++t) rate[t] = flops / spent / static_cast<double>(end - begin);
  });
  double total = 0;
  for (double r : rate) total += r;
  return total / 1e9;
}

// Of float32 fused multiply-adds.
double fma_peak(double seconds) {
  return peak(kernels().fma_burst, 100000, seconds);
}

// Of products of bfloat16 with sums in float32, by a unit of the processor; 0 if it has none.
double bfloat16_peak(double seconds) {
  return bfloat16_kernels() ? peak(bfloat16_kernels()->product_burst, 1000, seconds) : 0.0;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(cnnlstm_fast, m) {
  m.def("isa() -> str");
  m.def("fma_peak(float seconds) -> float");
  m.def("bfloat16_peak(float seconds) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CompositeExplicitAutograd, m) {
  m.impl("isa", CNNLSTM_FAST_OP(isa));
  m.impl("fma_peak", CNNLSTM_FAST_OP(fma_peak));
  m.impl("bfloat16_peak", CNNLSTM_FAST_OP(bfloat16_peak));
}

}  // namespace cnnlstm_fast
