// cnnlstm_fast::program_new, program_run and program_free: programs by number, and the code they are made from.
#include "program.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <mutex>
#include <unordered_map>

#include "op.h"

namespace cnnlstm_fast {

using torch::stable::Tensor;

namespace {

constexpr int64_t kVersion = 3;
constexpr int64_t kMostSlots = int64_t{1} << 24;
constexpr int64_t kNoTensor = -1;

}  // namespace

// ---- Code

int64_t Code::next() {
  STD_TORCH_CHECK(at_ < values_.size(), "program: the code ends too early");
  return values_[at_++];
}

int64_t Code::next_between(int64_t least, int64_t most) {
  const int64_t value = next();
  STD_TORCH_CHECK(least <= value && value <= most, "program: got ", value, " in the code, expected ", least, " to ",
                  most);
  return value;
}

int64_t Code::next_count() {
  return next_between(0, static_cast<int64_t>(values_.size() - at_));
}

Ints Code::next_ints() {
  Ints found(next_count());
  for (int64_t& value : found) value = next();
  return found;
}

Floats Code::next_floats() {
  Floats found(next_count());
  for (double& value : found) value = next_float();
  return found;
}

Number Code::next_number() {
  if (!next_bool()) return {false, next()};
  const int64_t slot = next_between(0, static_cast<int64_t>(ints_written_.size()) - 1);
  STD_TORCH_CHECK(ints_written_[slot], "program: the number in slot ", slot, " is read before it is known");
  return {true, slot};
}

std::vector<Number> Code::next_numbers() {
  std::vector<Number> found;
  for (int64_t count = next_count(); count > 0; --count) found.push_back(next_number());
  return found;
}

void Code::set_slots(int64_t tensors, int64_t ints) {
  written_.assign(tensors, false), ints_written_.assign(ints, false);
}

int64_t Code::next_read() {
  const int64_t slot = next_between(0, static_cast<int64_t>(written_.size()) - 1);
  STD_TORCH_CHECK(written_[slot], "program: the tensor in slot ", slot, " is read before it is known");
  reads_.push_back(slot);
  return slot;
}

int64_t Code::next_maybe_read() {
  if (at_ < values_.size() && values_[at_] == kNoTensor) return next();
  return next_read();
}

std::vector<int64_t> Code::next_reads() {
  std::vector<int64_t> found(next_count());
  for (int64_t& slot : found) slot = next_read();
  return found;
}

int64_t Code::next_written() {
  const int64_t slot = next_between(0, static_cast<int64_t>(written_.size()) - 1);
  STD_TORCH_CHECK(!written_[slot], "program: slot ", slot, " is written twice");
  written_[slot] = true;
  return slot;
}

int64_t Code::next_maybe_written() {
  if (at_ < values_.size() && values_[at_] == kNoTensor) return next();
  return next_written();
}

int64_t Code::next_int_written() {
  const int64_t slot = next_between(0, static_cast<int64_t>(ints_written_.size()) - 1);
  STD_TORCH_CHECK(!ints_written_[slot], "program: the number in slot ", slot, " is written twice");
  ints_written_[slot] = true;
  return slot;
}

const Tensor& Code::next_constant() {
  return constants[next_between(0, static_cast<int64_t>(constants.size()) - 1)];
}

std::optional<Tensor> Code::next_maybe_constant() {
  if (at_ < values_.size() && values_[at_] == kNoTensor) {
    next();
    return {};
  }
  return next_constant();
}

// ---- Program

namespace {

using Reader = std::unique_ptr<Node> (*)(Code&);
// In the order of KINDS in cnnlstm_fast/ops/program.py.
constexpr Reader kReaders[] = {read_call,      read_arithmetic, read_view,   read_block,
                               read_recurrent, read_sum,        read_linear, read_int8_linear};
constexpr int64_t kKinds = sizeof(kReaders) / sizeof(kReaders[0]);

}  // namespace

Program::Program(Code& code) : constants_(code.constants) {
  const int64_t version = code.next();
  STD_TORCH_CHECK(version == kVersion, "program: the code is of version ", version, ", expected ", kVersion);
  tensor_slots_ = code.next_between(0, kMostSlots), int_slots_ = code.next_between(0, kMostSlots);
  const int64_t constants = static_cast<int64_t>(constants_.size());
  inputs_ = code.next_between(0, tensor_slots_ - constants);
  code.set_slots(tensor_slots_, int_slots_);
  for (int64_t slot = 0; slot < constants + inputs_; ++slot) code.mark_written(slot);
  std::vector<std::vector<int64_t>> reads;
  for (int64_t count = code.next_count(); count > 0; --count) {
    Reader read = kReaders[code.next_between(0, kKinds - 1)];
    steps_.push_back({read(code), {}});
    reads.push_back(code.take_reads());
  }
  outputs_ = code.next_reads();
  STD_TORCH_CHECK(code.at_end(), "program: the code goes on after its end");
  std::vector<bool> needed(tensor_slots_, false);
  for (int64_t slot = 0; slot < constants; ++slot) needed[slot] = true;
  for (const int64_t slot : outputs_) needed[slot] = true;
  for (size_t i = steps_.size(); i-- > 0;)
    for (const int64_t slot : reads[i])
      if (!needed[slot]) needed[slot] = true, steps_[i].ends.push_back(slot);
}

std::vector<Tensor> Program::run(const std::vector<Tensor>& inputs) const {
  STD_TORCH_CHECK(static_cast<int64_t>(inputs.size()) == inputs_, "program: got ", inputs.size(), " inputs, expected ",
                  inputs_);
  Frame frame;
  frame.tensors.resize(tensor_slots_);
  frame.ints.resize(int_slots_);
  size_t at = 0;
  for (const Tensor& t : constants_) frame.tensors[at++] = t;
  for (const Tensor& t : inputs) frame.tensors[at++] = t;
  for (const Step& step : steps_) {
    step.node->run(frame);
    for (const int64_t slot : step.ends) frame.tensors[slot].reset();
  }
  std::vector<Tensor> found;
  for (const int64_t slot : outputs_) found.push_back(*frame.tensors[slot]);
  return found;
}

// ---- Ops

namespace {

std::mutex mutex;
std::unordered_map<int64_t, std::shared_ptr<const Program>> programs;
int64_t made = 0;

int64_t program_new(Ints values, Floats floats, std::vector<std::string> names, std::vector<Tensor> constants) {
  Code code(values, floats, names, std::move(constants));
  auto program = std::make_shared<const Program>(code);
  const std::lock_guard<std::mutex> lock(mutex);
  programs[++made] = std::move(program);
  return made;
}

void program_free(int64_t number) {
  std::shared_ptr<const Program> last;  // ends after the lock
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = programs.find(number);
  if (found == programs.end()) return;
  last = std::move(found->second);
  programs.erase(found);
}

std::vector<Tensor> program_run(int64_t number, std::vector<Tensor> inputs) {
  std::shared_ptr<const Program> program;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = programs.find(number);
    STD_TORCH_CHECK(found != programs.end(), "program_run: there is no program ", number);
    program = found->second;
  }
  return program->run(inputs);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CompositeExplicitAutograd, m) {
  m.impl("program_new", CNNLSTM_FAST_OP(program_new));
  m.impl("program_free", CNNLSTM_FAST_OP(program_free));
  m.impl("program_run", CNNLSTM_FAST_OP(program_run));
}

}  // namespace cnnlstm_fast
