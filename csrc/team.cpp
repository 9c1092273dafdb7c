#include "team.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <pthread.h>
#endif

namespace cnnlstm_fast {
namespace {

thread_local bool wants_team = false, inside = false;  // of a part of some work

// How long a member looks for the next work before it sleeps: the parts of a program follow each other closely.
constexpr std::chrono::microseconds kPatience{100};
constexpr int64_t kSpins = 256;  // between looks at the clock

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Team {
 public:
  // Lives as long as the process. Another one serves a forked child, which has none of its threads.
  static std::atomic<Team*>& present() {
    static std::atomic<Team*> team{new Team};
    return team;
  }

  // False where another thread has the team.
  bool run(int64_t parts, void (*task)(void*, int64_t), void* context) {
    const std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
    if (!mine) return false;
    try {
      for (; members_ < parts - 1; ++members_) start();
    } catch (const std::system_error&) {  // the system gives no more threads
      return false;
    }
    task_ = task, context_ = context;
    done_.store(0, std::memory_order_relaxed);
    work_.store((++jobs_ << kPartBits) + static_cast<uint64_t>(parts));
    if (asleep_.load() > 0) {
      const std::lock_guard<std::mutex> lock(sleep_);
      for (int64_t i = 1; i < parts; ++i) wake_.notify_one();
    }
    while (run_part()) {
    }
    for (int64_t spins = 0; done_.load(std::memory_order_acquire) < parts; ++spins)
      spins < 4096 ? pause() : std::this_thread::yield();
    return true;
  }

  static constexpr int kPartBits = 16;
  static constexpr int64_t kMostParts = (int64_t{1} << kPartBits) - 1;

 private:
  // A part of the present work; false where all are taken. Who takes one may read what it consists of: the caller waits
  // until it is done.
  bool run_part() {
    uint64_t work = work_.load(std::memory_order_acquire);
    while (parts_in(work)) {
      if (!work_.compare_exchange_weak(work, work - 1, std::memory_order_acq_rel)) continue;
      task_(context_, parts_in(work) - 1);
      done_.fetch_add(1, std::memory_order_release);
      return true;
    }
    return false;
  }

  static int64_t parts_in(uint64_t work) { return static_cast<int64_t>(work & ((uint64_t{1} << kPartBits) - 1)); }

  void start() {
    std::thread([this] {
      for (;;) {
        const auto end = std::chrono::steady_clock::now() + kPatience;
        while (run_part() || (look() && std::chrono::steady_clock::now() < end)) {
        }
        std::unique_lock<std::mutex> lock(sleep_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [this] { return parts_in(work_.load()) > 0; });
        asleep_.fetch_sub(1);
      }
    }).detach();
  }

  // Looks for work a while; always true.
  bool look() const {
    for (int64_t i = 0; i < kSpins && !parts_in(work_.load(std::memory_order_relaxed)); ++i) pause();
    return true;
  }

  std::mutex busy_, sleep_;
  std::condition_variable wake_;
  // A number of the work, so that nobody takes a part of one for a part of another, and how many parts are left.
  std::atomic<uint64_t> work_{0};
  std::atomic<int64_t> done_{0}, asleep_{0};
  void (*task_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  uint64_t jobs_ = 0;
  int64_t members_ = 0;
};

#if defined(__linux__)
[[maybe_unused]] const int kAtFork =
    (Team::present(), pthread_atfork(nullptr, nullptr, [] { Team::present().store(new Team); }));
#endif

}  // namespace

OnTeam::OnTeam() : before_(wants_team) {
  wants_team = true;
}

OnTeam::~OnTeam() {
  wants_team = before_;
}

bool on_team() {
  return wants_team;
}

void run_on_team(int64_t begin, int64_t end, int64_t grain, void (*task)(void*, int64_t, int64_t), void* context) {
  if (end <= begin) return;
  const int64_t count = end - begin, least = std::max<int64_t>(1, grain);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), Team::kMostParts);
  const int64_t size = std::max(least, (count + threads - 1) / threads), parts = (count + size - 1) / size;
  struct Range {
    int64_t begin, end, size;
    void (*task)(void*, int64_t, int64_t);
    void* context;
    static void run(void* self, int64_t part) {
      const Range& r = *static_cast<Range*>(self);
      const bool before = wants_team;
      wants_team = true;
      inside = true;
      r.task(r.context, r.begin + part * r.size, std::min(r.end, r.begin + (part + 1) * r.size));
      inside = false;
      wants_team = before;
    }
  };
  Range range{begin, end, size, task, context};
  if (parts > 1 && !inside && Team::present().load()->run(parts, &Range::run, &range)) return;
  for (int64_t part = 0; part < parts; ++part)
    task(context, begin + part * size, std::min(end, begin + (part + 1) * size));
}

}  // namespace cnnlstm_fast
