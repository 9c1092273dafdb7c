#include "limits.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

namespace cnnlstm_fast {

int64_t limit(const char* name, int64_t usual, int64_t least) {
  const char* one = std::getenv(("CNNLSTM_FAST_" + std::string(name)).c_str());
  if (one && *one) return std::max<int64_t>(least, std::strtoll(one, nullptr, 10));
  const char* all = std::getenv("CNNLSTM_FAST_LEAST");
  return all && !std::strcmp(all, "1") ? least : usual;
}

}  // namespace cnnlstm_fast
