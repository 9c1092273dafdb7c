// A frozen program: what a model computes, node by node over slots, made once and run by one call of an op. The code
// that it is made from, and who frees it, stand in cnnlstm_fast/ops/program.py.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "frozen_conv.h"
#include "packed_library.h"
#include "packed_pairs.h"
#include "packed_recurrent.h"
#include "tensors.h"

namespace cnnlstm_fast {

// The values of one call. Calls share nothing else that changes, so any number of threads may run one program.
struct Frame {
  std::vector<std::optional<torch::stable::Tensor>> tensors;
  Ints ints;

  const torch::stable::Tensor& tensor(int64_t slot) const { return *tensors[slot]; }
};

// A whole number that is known when the program is made, or the number in a slot of each call.
struct Number {
  bool in_slot;
  int64_t value;
  int64_t of(const Frame& frame) const { return in_slot ? frame.ints[value] : value; }
};

class Node {
 public:
  virtual ~Node() = default;
  virtual void run(Frame& frame) const = 0;
};

// A linear layer of rows of `in_` numbers of one dtype, which become rows of `out_`.
class LinearNode : public Node {
 public:
  void run(Frame& frame) const final;

 protected:
  explicit LinearNode(int64_t x) : x_(x) {}
  // `x` is contiguous and has at least one row.
  virtual void multiply(const torch::stable::Tensor& x, int64_t rows, const torch::stable::Tensor& out) const = 0;

  const int64_t x_;
  torch::headeronly::ScalarType dtype_ = torch::headeronly::ScalarType::Float;
  int64_t in_ = 0, out_ = 0, to_ = -1;
};

// The arguments of program_new, read from front to back. Whatever does not fit is an error: a file may say anything.
class Code {
 public:
  Code(const Ints& values, const Floats& floats, const std::vector<std::string>& names,
       std::vector<torch::stable::Tensor> constants)
      : constants(std::move(constants)), values_(values), floats_(floats), names_(names) {}

  int64_t next();
  int64_t next_between(int64_t least, int64_t most);
  bool next_bool() { return next_between(0, 1) == 1; }
  // How many of something follow, at least one value each.
  int64_t next_count();
  double next_float() { return floats_[next_between(0, static_cast<int64_t>(floats_.size()) - 1)]; }
  const std::string& next_name() { return names_[next_between(0, static_cast<int64_t>(names_.size()) - 1)]; }
  Ints next_ints();
  Floats next_floats();
  Number next_number();
  std::vector<Number> next_numbers();
  bool at_end() const { return at_ == values_.size(); }

  // Slots. What is read must have been written before; -1 is no tensor.
  void set_slots(int64_t tensors, int64_t ints);
  int64_t next_read();
  int64_t next_maybe_read();
  std::vector<int64_t> next_reads();
  int64_t next_written();
  int64_t next_maybe_written();
  int64_t next_int_written();
  void mark_written(int64_t slot) { written_[slot] = true; }
  // The slots that were read since the last call of this.
  std::vector<int64_t> take_reads() { return std::move(reads_); }

  // A tensor that is known when the program is made.
  const torch::stable::Tensor& next_constant();
  std::optional<torch::stable::Tensor> next_maybe_constant();

  const std::vector<torch::stable::Tensor> constants;
  std::unordered_map<int64_t, std::shared_ptr<const PackedRecurrent>>
      layers;  // by the numbers that the code gives them

  // Packed weights, one packing for all nodes of the same weight and description: a loop that was unrolled has many.
  std::shared_ptr<const FrozenConv> packed(const FrozenConvDescription& description,
                                           const torch::stable::Tensor& weight,
                                           const std::optional<torch::stable::Tensor>& bias);
  // PackedLibraryConv or PackedPairs.
  template <class Conv>
  std::shared_ptr<const Conv> packed(const Ints& conv, const torch::stable::Tensor& weight,
                                     const std::optional<torch::stable::Tensor>& bias) {
    std::shared_ptr<const Conv>& found = packed_of<Conv>()[key_of(conv, weight, bias)];
    if (!found) found = std::make_shared<const Conv>(conv, weight, bias);
    return found;
  }
  // The same of a linear layer's weight in int8 (program_int8.cpp).
  std::shared_ptr<const PackedFloats> packed_int8(const torch::stable::Tensor& weight);

 private:
  static Ints key_of(const Ints& conv, const torch::stable::Tensor& weight,
                     const std::optional<torch::stable::Tensor>& bias);
  template <class Conv>
  auto& packed_of() {
    if constexpr (std::is_same_v<Conv, PackedPairs>)
      return pairs_;
    else
      return libraries_;
  }

  const Ints& values_;
  const Floats& floats_;
  const std::vector<std::string>& names_;
  size_t at_ = 0;
  std::map<Ints, std::shared_ptr<const FrozenConv>> packed_;
  std::map<Ints, std::shared_ptr<const PackedLibraryConv>> libraries_;
  std::map<Ints, std::shared_ptr<const PackedPairs>> pairs_;
  std::map<Ints, std::shared_ptr<const PackedFloats>> packed_int8_;
  std::vector<bool> written_, ints_written_;
  std::vector<int64_t> reads_;
};

// A node of each kind from its code (program_nodes.cpp, program_calls.cpp, program_linear.cpp, program_int8.cpp).
std::unique_ptr<Node> read_call(Code& code);
std::unique_ptr<Node> read_arithmetic(Code& code);
std::unique_ptr<Node> read_view(Code& code);
std::unique_ptr<Node> read_block(Code& code);
std::unique_ptr<Node> read_recurrent(Code& code);
std::unique_ptr<Node> read_sum(Code& code);
std::unique_ptr<Node> read_linear(Code& code);
std::unique_ptr<Node> read_int8_linear(Code& code);

class Program {
 public:
  explicit Program(Code& code);
  std::vector<torch::stable::Tensor> run(const std::vector<torch::stable::Tensor>& inputs) const;

 private:
  struct Step {
    std::unique_ptr<Node> node;
    std::vector<int64_t> ends;  // slots that nobody reads afterwards
  };
  const std::vector<torch::stable::Tensor> constants_;
  int64_t inputs_, tensor_slots_, int_slots_;
  std::vector<Step> steps_;
  std::vector<int64_t> outputs_;
};

// A view of the same memory, which begins `offset` elements behind where `t` begins.
torch::stable::Tensor view_strided(const torch::stable::Tensor& t, const Ints& size, const Ints& stride,
                                   int64_t offset);

}  // namespace cnnlstm_fast
