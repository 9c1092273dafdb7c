// Where fast paths begin, and what is worked on at a time: measured sizes that tests can set.
#pragma once
#include <cstdint>

namespace cnnlstm_fast {

// `usual`, unless the environment variable CNNLSTM_FAST_<name> holds another number, or CNNLSTM_FAST_LEAST is 1: then
// `least`. Read once, when the library is loaded: a limit is a constant of its file. Python asks the op
// cnnlstm_fast::limit for its value.
int64_t limit(const char* name, int64_t usual, int64_t least);

}  // namespace cnnlstm_fast
