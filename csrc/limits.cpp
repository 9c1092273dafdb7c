#include "limits.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "op.h"

namespace cnnlstm_fast {
namespace {

// The value in force of every limit, by its name. Filled while the library is loaded, then only read.
std::map<std::string, int64_t>& values() {
  static std::map<std::string, int64_t> all;
  return all;
}

int64_t read(const char* name, int64_t usual, int64_t least) {
  const char* one = std::getenv(("CNNLSTM_FAST_" + std::string(name)).c_str());
  if (one && *one) return std::max<int64_t>(least, std::strtoll(one, nullptr, 10));
  const char* all = std::getenv("CNNLSTM_FAST_LEAST");
  return all && !std::strcmp(all, "1") ? least : usual;
}

int64_t limit_of(std::string name) {
  const auto found = values().find(name);
  STD_TORCH_CHECK(found != values().end(), "limit: there is none of the name ", name);
  return found->second;
}

}  // namespace

int64_t limit(const char* name, int64_t usual, int64_t least) {
  return values()[name] = read(name, usual, least);
}

STABLE_TORCH_LIBRARY_FRAGMENT(cnnlstm_fast, m) {
  m.def("limit(str name) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CompositeExplicitAutograd, m) {
  m.impl("limit", CNNLSTM_FAST_OP(limit_of));
}

}  // namespace cnnlstm_fast
