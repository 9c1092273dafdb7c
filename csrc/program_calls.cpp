// Nodes of a frozen program that call an operator of PyTorch's through its dispatcher.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/Layout.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include <variant>

#include "program.h"

namespace cnnlstm_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

// In the order of ARGUMENTS in cnnlstm_fast/ops/program.py.
enum Kind {
  kNull,
  kTensor,
  kInt,
  kFloat,
  kBool,
  kInts,
  kTensors,
  kString,
  kFloats,
  kBools,
  kDtype,
  kLayout,
  kDevice,
  kMemoryFormat,
  kMaybeTensors,
  kKinds
};

struct Argument {
  Kind kind;
  bool optional;  // the schema says so: the value travels in a box
  int64_t value = 0;
  double number = 0;
  std::string text;
  std::vector<int64_t> slots;
  std::vector<Number> numbers;
  Floats floats;

  StableIValue in(const Frame& frame) const {
    if (kind == kNull) return from(std::nullopt);
    const StableIValue bits = plain(frame);
    return optional ? from(std::optional<uint64_t>(bits)) : bits;
  }

 private:
  StableIValue plain(const Frame& frame) const {
    switch (kind) {
      case kTensor:
        return from(frame.tensor(value));
      case kInt:
        return from(numbers[0].of(frame));
      case kFloat:
        return from(number);
      case kBool:
        return from(value != 0);
      case kInts: {
        Ints found;
        for (const Number& n : numbers) found.push_back(n.of(frame));
        return from(found);
      }
      case kTensors: {
        std::vector<Tensor> found;
        for (const int64_t slot : slots) found.push_back(frame.tensor(slot));
        return from(found);
      }
      case kMaybeTensors: {
        std::vector<std::optional<Tensor>> found;
        for (const int64_t slot : slots)
          found.push_back(slot < 0 ? std::optional<Tensor>() : std::optional<Tensor>(frame.tensor(slot)));
        return from(found);
      }
      case kString:
        return from(text);
      case kFloats:
        return from(floats);
      case kBools: {
        const std::unique_ptr<bool[]> found(new bool[slots.size() + 1]);
        for (size_t i = 0; i < slots.size(); ++i) found[i] = slots[i] != 0;
        return from(torch::headeronly::HeaderOnlyArrayRef<bool>(found.get(), slots.size()));
      }
      case kDtype:
        return from(static_cast<ScalarType>(value));
      case kLayout:
        return from(torch::headeronly::Layout::Strided);
      case kDevice:
        return from(torch::stable::Device(torch::headeronly::DeviceType::CPU));
      case kMemoryFormat:
        return from(static_cast<torch::headeronly::MemoryFormat>(value));
      default:
        return from(std::nullopt);
    }
  }
};

Argument read_argument(Code& code) {
  Argument a{};
  a.kind = static_cast<Kind>(code.next_between(0, kKinds - 1));
  a.optional = code.next_bool();
  switch (a.kind) {
    case kTensor:
      a.value = code.next_read();
      break;
    case kInt:
      a.numbers = {code.next_number()};
      break;
    case kFloat:
      a.number = code.next_float();
      break;
    case kBool:
    case kDtype:
    case kMemoryFormat:
      a.value = code.next_between(0, 127);
      break;
    case kInts:
      a.numbers = code.next_numbers();
      break;
    case kTensors:
      a.slots = code.next_reads();
      break;
    case kMaybeTensors:
      a.slots.resize(code.next_count());
      for (int64_t& slot : a.slots) slot = code.next_maybe_read();
      break;
    case kString:
      a.text = code.next_name();
      break;
    case kFloats:
      a.floats = code.next_floats();
      break;
    case kBools:
      a.slots = code.next_ints();
      break;
    default:
      break;
  }
  return a;
}

// A tensor, or a list of tensors whose number is known.
struct Result {
  bool list;
  std::vector<int64_t> slots;  // -1: nobody reads it
};

class Call : public Node {
 public:
  explicit Call(Code& code) : name_(code.next_name()), overload_(code.next_name()) {
    for (int64_t count = code.next_count(); count > 0; --count) arguments_.push_back(read_argument(code));
    for (int64_t count = code.next_count(); count > 0; --count) {
      Result result{code.next_bool(), {}};
      result.slots.resize(result.list ? code.next_count() : 1);
      for (int64_t& slot : result.slots) slot = code.next_maybe_written();
      results_.push_back(std::move(result));
    }
  }

  void run(Frame& frame) const override {
    std::vector<StableIValue> stack;
    stack.reserve(std::max(arguments_.size(), results_.size()) + 1);
    for (const Argument& a : arguments_) stack.push_back(a.in(frame));
    stack.resize(std::max(arguments_.size(), results_.size()));
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name_.c_str(), overload_.c_str(), stack.data(), TORCH_ABI_VERSION));
    for (size_t i = 0; i < results_.size(); ++i) {
      const Result& result = results_[i];
      if (!result.list) {
        Tensor found = to<Tensor>(stack[i]);
        if (result.slots[0] >= 0) frame.tensors[result.slots[0]] = std::move(found);
        continue;
      }
      std::vector<Tensor> found = to<std::vector<Tensor>>(stack[i]);
      STD_TORCH_CHECK(found.size() == result.slots.size(), "program: ", name_, " gave ", found.size(),
                      " tensors, expected ", result.slots.size());
      for (size_t j = 0; j < found.size(); ++j)
        if (result.slots[j] >= 0) frame.tensors[result.slots[j]] = std::move(found[j]);
    }
  }

 private:
  const std::string name_, overload_;
  std::vector<Argument> arguments_;
  std::vector<Result> results_;
};

}  // namespace

std::unique_ptr<Node> read_call(Code& code) {
  return std::make_unique<Call>(code);
}

}  // namespace cnnlstm_fast
