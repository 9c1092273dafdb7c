// How threads share the steps of a recurrent layer, its sequences and its units.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu/recurrent/recurrent.h"
#include "recurrent_description.h"
#include "threads.h"

namespace cnnlstm_fast {

// Into how many even shares of at least `least` and about `most` to cut `count`, every thread having one.
int64_t shares(int64_t count, int64_t least, int64_t most);

// Bounds of stretches of steps that have about `most` rows each.
std::vector<int64_t> cut_steps(const RecurrentCall& call, int64_t most);

// The rows of the stretch that has most of them.
int64_t most_rows(const RecurrentCall& call, const std::vector<int64_t>& bounds);

// Pre-activations, or their gradients, of the steps that are worked on at a time: what a second-level cache or two
// hold.
extern const int64_t kStepFloats;
// Rows of a product that are worth an item.
extern const int64_t kProductRows;

// Steps [begin, end) in which at most `count` sequences take part.
struct Stretch {
  int64_t begin, end, count;
};

// Steps [begin, end) cut where so many sequences have ended that threads had better share the others anew.
std::vector<Stretch> cut_by_activity(const RecurrentCall& call, int64_t begin, int64_t end);

// Tiles of sequences, as many as threads can share evenly.
struct Tiles {
  int64_t batch, count;
  explicit Tiles(int64_t batch) : batch(batch) {
    const int64_t threads = torch::stable::get_num_threads();
    count = std::min(batch, ceil_div(ceil_div(batch, kMaxRows), threads) * threads);
  }
  int64_t begin(int64_t i) const { return i * batch / count; }
  int64_t size(int64_t i) const { return begin(i + 1) - begin(i); }
};

// Whether cores divide the units between them, each keeping its part of large weights in its cache, rather
// than the sequences.
bool by_units(const RecurrentLayer& l, int64_t sequences);

// Blocks of units for a team, multiples of `least`.
struct UnitBlocks {
  int64_t units, size, count;
  UnitBlocks(int64_t units, int64_t least, int64_t per_thread) : units(units) {
    const int64_t wanted = per_thread * torch::stable::get_num_threads();
    size = std::max<int64_t>(1, units / least / wanted) * least;
    count = ceil_div(units, size);
  }
  int64_t begin(int64_t i) const { return i * size; }
  int64_t end(int64_t i) const { return std::min(units, (i + 1) * size); }
};

// Steps of all unit blocks by a team of threads: within a step blocks are claimed, the next one begins when
// all are done. A thread waits only for blocks that a running thread has claimed, so that it makes no
// difference how many of the team ever run, or whether they do so one after another.
template <class F>
void run_with_step_barrier(int64_t steps, int64_t blocks, const F& run) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), blocks);
  std::vector<std::atomic<int64_t>> claimed(blocks);
  for (auto& c : claimed) c = 0;
  std::atomic<int64_t> done{0};
  FirstError error;
  in_parallel(0, threads, 1, [&](int64_t member, int64_t) {
    const int64_t own = member * blocks / threads;
    for (int64_t step = done.load(std::memory_order_acquire) / blocks; step < steps; ++step) {
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t block = (own + i) % blocks;
        int64_t unclaimed = step;
        if (!claimed[block].compare_exchange_strong(unclaimed, step + 1)) continue;
        if (!error.free_of([&] { run(step, block); })) return;
        done.fetch_add(1, std::memory_order_release);
      }
      for (int64_t spins = 0; done.load(std::memory_order_acquire) < (step + 1) * blocks; ++spins) {
        if (error.failed()) return;  // a block that is never done
        if (spins > 4096) std::this_thread::yield();
      }
    }
  });
  error.rethrow();
}

}  // namespace cnnlstm_fast
