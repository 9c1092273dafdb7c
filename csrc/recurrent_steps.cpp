#include "recurrent_steps.h"

#include "limits.h"

namespace cnnlstm_fast {
namespace {

// So many weights of the state are shared by cores if sequences are not too many for a core.
const int64_t kSharedWeights = limit("SHARED_WEIGHTS", int64_t{1} << 18, 1), kMostSharingSequences = 32;

}  // namespace

const int64_t kStepFloats = limit("RECURRENT_CHUNK_FLOATS", int64_t{1} << 20, 1);
const int64_t kProductRows = limit("RECURRENT_ROWS", 24, 1);

int64_t shares(int64_t count, int64_t least, int64_t most) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = ceil_div(ceil_div(count, most), threads) * threads;
  return std::clamp<int64_t>(wanted, 1, ceil_div(count, least));
}

std::vector<int64_t> cut_steps(const RecurrentCall& call, int64_t most) {
  const int64_t longest = call.longest(), total = call.starts[longest];
  const int64_t wanted = ceil_div(total, std::max<int64_t>(1, most));
  const int64_t count = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, longest));
  std::vector<int64_t> bounds{0};
  for (int64_t i = 1; i <= count; ++i) {
    const int64_t rows = ceil_div(i * total, count);
    const int64_t t = std::lower_bound(call.starts.begin(), call.starts.end(), rows) - call.starts.begin();
    if (t > bounds.back()) bounds.push_back(t);
  }
  return bounds;
}

int64_t most_rows(const RecurrentCall& call, const std::vector<int64_t>& bounds) {
  int64_t most = 0;
  for (size_t i = 1; i < bounds.size(); ++i) most = std::max(most, call.starts[bounds[i]] - call.starts[bounds[i - 1]]);
  return most;
}

std::vector<Stretch> cut_by_activity(const RecurrentCall& call, int64_t begin, int64_t end) {
  std::vector<Stretch> stretches;
  while (begin < end) {
    Stretch s{begin, begin + 1, call.active(begin)};
    while (s.end < end && 4 * call.active(s.end) >= 3 * s.count) ++s.end;
    stretches.push_back(s);
    begin = s.end;
  }
  return stretches;
}

bool by_units(const RecurrentLayer& l, int64_t sequences) {
  const int64_t threads = torch::stable::get_num_threads();
  return threads > 1 && !l.projected && 4 * l.padded_hidden * l.width >= kSharedWeights &&
         sequences <= kMostSharingSequences * threads;
}

}  // namespace cnnlstm_fast
