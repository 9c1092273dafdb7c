// How a function becomes an op: whatever goes wrong in it is a RuntimeError with a text, memory that runs out too.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <new>
#include <stdexcept>
#include <utility>

namespace cnnlstm_fast {

template <auto function>
struct Op;

template <class Result, class... Arguments, Result (*function)(Arguments...)>
struct Op<function> {
  static Result run(Arguments... arguments) {
    try {
      return function(std::move(arguments)...);
    } catch (const std::bad_alloc&) {
      throw std::runtime_error("cnnlstm_fast: there is not enough memory for what this call works on");
    } catch (const std::length_error&) {  // a container of more than all memory
      throw std::runtime_error("cnnlstm_fast: there is not enough memory for what this call works on");
    }
  }
};

#define CNNLSTM_FAST_OP(function) TORCH_BOX(&::cnnlstm_fast::Op<&function>::run)

}  // namespace cnnlstm_fast
