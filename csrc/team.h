// Threads of our own for frozen programs. OpenMP's team joins when every member has come by, also one that another
// process keeps from running: a call then waits for the scheduler, at each of its parallel parts. Here a part that
// nobody has begun is done by the caller.
#pragma once
#include <cstdint>

namespace cnnlstm_fast {

// While this lives, what goes in parallel from this thread goes to the team.
class OnTeam {
 public:
  OnTeam();
  ~OnTeam();
  OnTeam(const OnTeam&) = delete;
  OnTeam& operator=(const OnTeam&) = delete;

 private:
  const bool before_;
};

bool on_team();

// Calls task(context, first, last) for parts of [begin, end), of at least `grain` but for the last one, at most as many
// as torch has threads. Where the team has other work, and for work within work, the calling thread does all.
void run_on_team(int64_t begin, int64_t end, int64_t grain, void (*task)(void*, int64_t, int64_t), void* context);

}  // namespace cnnlstm_fast
