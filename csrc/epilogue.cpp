// cnnlstm_fast::epilogue and its backward on the CPU: checks, tiles, and threads. The schemas and the meaning of every
// argument stand in cnnlstm_fast/ops/epilogue.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "block_rows.h"
#include "cpu/dispatch.h"
#include "limits.h"
#include "memory.h"
#include "norm_statistics.h"
#include "op.h"
#include "tensors.h"
#include "threads.h"

namespace cnnlstm_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements of a tile, all of whose steps run while it is in cache; its least positions where channels lie inside; and
// elements that one thread takes at a time.
const int64_t kTileFloats = limit("EPILOGUE_TILE", 2048, 16);
constexpr int64_t kLeastPositions = 8;
const int64_t kElementsPerItem = limit("EPILOGUE_ITEM", 64 * 1024, 1);

// ---- The program

// Stages as in the schema: 0 a norm, 1 an added tensor, 2 + the number of an activation.
EpilogueProgram read_program(const Ints& stages, const Floats& numbers, int32_t dtype) {
  EpilogueProgram e{};
  e.norm_at = -1;
  e.dtype = dtype;
  STD_TORCH_CHECK(numbers.size() == 2 * stages.size(), "epilogue: expected two numbers for each stage");
  bool added = false;
  int last = 3;  // what the last step has got so far: 0 a norm, 1 an added tensor, 2 an activation
  for (size_t i = 0; i < stages.size(); ++i) {
    const int64_t stage = stages[i];
    STD_TORCH_CHECK(stage >= 0 && stage < 2 + kActivations, "epilogue: unknown stage ", stage);
    const int kind = static_cast<int>(std::min<int64_t>(stage, 2));
    if (kind <= last) {
      STD_TORCH_CHECK(e.steps < kEpilogueSteps && !added, "epilogue: too many stages, or stages in an order that the ",
                      "kernels don't take");
      ++e.steps;
    }
    EpilogueStep& step = e.step[e.steps - 1];
    if (kind == 0) {
      STD_TORCH_CHECK(e.norm_at < 0, "epilogue: more than one norm");
      step.norm = true;
      e.norm_at = e.steps - 1;
    } else if (kind == 1) {
      STD_TORCH_CHECK(!added, "epilogue: more than one added tensor");
      step.add = added = true;
      step.alpha = static_cast<float>(numbers[2 * i]);
    } else {
      step.activation = static_cast<int32_t>(stage - 2);
      step.act[0] = static_cast<float>(numbers[2 * i]);
      step.act[1] = static_cast<float>(numbers[2 * i + 1]);
    }
    last = kind;
  }
  STD_TORCH_CHECK(e.steps > 0, "epilogue: expected at least one stage");
  return e;
}

bool two_valued(int32_t activation) {
  return activation == kReLU || activation == kHardtanh || activation == kLeakyReLU;
}

// Whether a backward reads bits: the last activation's argument has the added tensor in it, which is not kept.
bool keeps_bits(const EpilogueProgram& e) {
  const EpilogueStep& last = e.step[e.steps - 1];
  return last.add && last.activation != kNone;
}

// ---- The map

// A map [N, C, S...] in memory: planes one after another, or channels innermost.
struct Map {
  int64_t n, c, s;
  bool inside;
};

bool is_channels_last(const Tensor& z) {
  int64_t step = z.size(1);
  if (z.dim() < 4 || z.stride(1) != 1) return false;
  for (int64_t d = z.dim() - 1; d >= 2; --d) {
    if (z.stride(d) != step) return false;
    step *= z.size(d);
  }
  return z.stride(0) == step;
}

Map describe_map(const Tensor& z) {
  STD_TORCH_CHECK(z.is_cpu() && z.dim() >= 2 && z.dim() <= 5,
                  "epilogue: expected a map of 2 to 5 dimensions on the CPU");
  STD_TORCH_CHECK(z.scalar_type() == ScalarType::Float || z.scalar_type() == ScalarType::BFloat16,
                  "epilogue: expected a map in float32 or bfloat16");
  elements("a map", z);
  STD_TORCH_CHECK(z.size(1) > 0, "epilogue: there are no channels");
  const bool contiguous = z.is_contiguous();
  STD_TORCH_CHECK(contiguous || is_channels_last(z), "epilogue: expected a map that is contiguous or channels-last");
  Map map{z.size(0), z.size(1), 1, !contiguous};
  for (int64_t d = 2; d < z.dim(); ++d) map.s *= z.size(d);
  return map;
}

// A new tensor of the map's shape and strides.
Tensor new_map(const Tensor& z, const Map& map) {
  if (!map.inside) return new_output(z, sizes(z), z.scalar_type());
  Ints shape{z.size(0)};
  for (int64_t d = 2; d < z.dim(); ++d) shape.push_back(z.size(d));
  shape.push_back(map.c);
  Tensor found = new_output(z, shape, z.scalar_type());
  for (int64_t d = z.dim() - 1; d >= 2; --d) found = torch::stable::transpose(found, d - 1, d);
  return found;
}

void check_like(const char* name, const Tensor& t, const Tensor& z) {
  check_argument("epilogue", name, t, sizes(z), z.scalar_type());
  bool same = true;
  for (int64_t d = 0; d < z.dim(); ++d) same &= z.size(d) == 1 || t.stride(d) == z.stride(d);
  STD_TORCH_CHECK(same || t.numel() == 0, "epilogue: ", name, " must lie in memory as the map does");
}

// ---- Tiles

// The map is a matrix in memory: rows are positions [N * S, C] where channels lie inside, and planes [N * C, S]
// otherwise. A tile is some whole rows, or a piece of a long plane.
class Tiling {
 public:
  explicit Tiling(const Map& map) : map_(map), inside_(map.inside || map.s == 1) {
    width_ = inside_ ? map.c : map.s;
    if (inside_) {
      rows_ = std::max(kLeastPositions, kTileFloats / map.c);
      tiles_ = ceil_div(map.n * map.s, rows_);
    } else if (map.s > kTileFloats) {
      piece_ = ceil_div(ceil_div(map.s, ceil_div(map.s, kTileFloats)), kMaxVector) * kMaxVector;
      in_image_ = ceil_div(map.s, piece_);
      tiles_ = map.n * map.c * in_image_;
    } else {
      rows_ = std::clamp<int64_t>(kTileFloats / std::max<int64_t>(1, map.s), 1, map.c);
      in_image_ = ceil_div(map.c, rows_);
      tiles_ = map.n * in_image_;
    }
    if (map.n * map.s == 0) tiles_ = 0;
  }

  int64_t tiles() const { return tiles_; }
  Ints bits_shape() const { return {inside_ ? map_.n * map_.s : map_.n * map_.c, bits_step()}; }
  int64_t most_elements() const { return piece_ ? piece_ : rows_ * width_; }
  int64_t most_channels() const { return inside_ ? map_.c : rows_; }

  // A tile, its first element, its first byte of bits, its first channel, and how many it has.
  struct Place {
    EpilogueTile tile;
    int64_t first, bits, channel, channels;
    int64_t positions() const { return tile.by_column ? tile.rows : tile.width; }
  };
  Place at(int64_t i, const NormGrads& norm) const {
    int64_t row = i * rows_, rows = std::min(rows_, map_.n * map_.s - row), column = 0, width = width_, channel = 0;
    if (piece_) {
      row = i / in_image_, rows = 1, column = i % in_image_ * piece_, width = std::min(piece_, width_ - column);
      channel = row % map_.c;
    } else if (!inside_) {
      channel = i % in_image_ * rows_;
      row = i / in_image_ * map_.c + channel;
      rows = std::min(rows_, map_.c - channel);
    }
    auto moved = [&](const float* p) { return p ? p + channel : nullptr; };
    const EpilogueTile tile{
        rows,
        width,
        inside_,
        bits_step(),
        {moved(norm.scale), moved(norm.shift), moved(norm.mean), moved(norm.mean_grad), moved(norm.slope)}};
    return {tile, row * width_ + column, row * bits_step() + column / 8, channel, inside_ ? map_.c : rows};
  }

  // Tiles that one thread takes at a time, and those whose sums are added to one another as they are found: sizes
  // alone decide.
  int64_t tiles_per_item() const {
    return std::max<int64_t>(1, kElementsPerItem / std::max<int64_t>(1, most_elements()));
  }
  int64_t tiles_per_sum() const {
    if (!inside_) return 1;
    return ceil_div(std::clamp<int64_t>(map_.n * map_.s / 16, 1, kPositionsPerSum), rows_);
  }

 private:
  int64_t bits_step() const { return ceil_div(width_, kMaxVector) * (kMaxVector / 8); }

  const Map map_;
  const bool inside_;
  int64_t width_, rows_ = 1, piece_ = 0, in_image_ = 1, tiles_ = 0;
};

template <class Visit>
void for_each_tile(const Tiling& tiling, const NormGrads& norm, const Visit& visit) {
  const int64_t per_item = tiling.tiles_per_item(), scratch = epilogue_kernels().scratch(tiling.most_elements());
  for_each_item(ceil_div(tiling.tiles(), per_item), [&](int64_t item) {
    float* own = thread_scratch(scratch);
    for (int64_t i = item * per_item; i < std::min(tiling.tiles(), (item + 1) * per_item); ++i)
      visit(tiling.at(i, norm), own);
  });
}

// Visits sums: runs of tiles whose sums per channel lie in memory of their own, [2, channels], in one order of all.
// visit(sum, place, whether it begins, sums, scratch) for each tile, then end(sum, channel, channels, positions, sums).
template <class Visit, class End>
void for_each_sum(const Tiling& tiling, const NormGrads& norm, const Visit& visit, const End& end) {
  const int64_t per_sum = tiling.tiles_per_sum(), sums = ceil_div(tiling.tiles(), per_sum);
  const int64_t size = 2 * tiling.most_channels(), together = std::max<int64_t>(1, tiling.tiles_per_item() / per_sum);
  const int64_t scratch = epilogue_kernels().scratch(tiling.most_elements());
  std::vector<double> found(sums * size);
  for_each_item(ceil_div(sums, together), [&](int64_t item) {
    float* own = thread_scratch(scratch);
    for (int64_t at = item * together; at < std::min(sums, (item + 1) * together); ++at)
      for (int64_t i = at * per_sum; i < std::min(tiling.tiles(), (at + 1) * per_sum); ++i)
        visit(at, tiling.at(i, norm), i == at * per_sum, found.data() + at * size, own);
  });
  for (int64_t at = 0; at < sums; ++at) {
    int64_t positions = 0;
    for (int64_t i = at * per_sum; i < std::min(tiling.tiles(), (at + 1) * per_sum); ++i)
      positions += tiling.at(i, norm).positions();
    const Tiling::Place place = tiling.at(at * per_sum, norm);
    end(at, place.channel, place.channels, positions, found.data() + at * size);
  }
}

const char* element(const Tensor& t, int64_t at) {
  return static_cast<const char*>(t.data_ptr()) + at * t.element_size();
}
char* mutable_element(const Tensor& t, int64_t at) {
  return static_cast<char*>(t.data_ptr()) + at * t.element_size();
}

// ---- Ops

int32_t dtype_of(const Tensor& z) {
  return z.scalar_type() == ScalarType::Float ? kFloat32 : kBFloat16;
}

// Mean and variance of the norm's argument over the batch.
Moments measure(const EpilogueProgram& e, const Tiling& tiling, const Tensor& z, int64_t channels) {
  Moments moments(channels);
  const int64_t size = tiling.most_channels();
  std::vector<double> pivots(ceil_div(tiling.tiles(), tiling.tiles_per_sum()) * size);
  for_each_sum(
      tiling, {},
      [&](int64_t at, const Tiling::Place& place, bool begin, double* sums, float* scratch) {
        epilogue_kernels().measure(e, place.tile, element(z, place.first), begin, pivots.data() + at * size, sums,
                                   scratch);
      },
      [&](int64_t at, int64_t channel, int64_t count, int64_t positions, const double* sums) {
        const double values = static_cast<double>(positions);
        for (int64_t c = 0; c < count; ++c) {
          const double off = sums[c] / values, squares = sums[count + c] - sums[c] * off;
          moments.add(channel + c, values, pivots[at * size + c] + off, squares < 0 ? 0 : squares);  // NaN stays
        }
      });
  return moments;
}

Tensor epilogue_moments(Tensor z, Ints stages, Floats numbers) {
  const Map map = describe_map(z);
  const EpilogueProgram e = read_program(stages, numbers, dtype_of(z));
  STD_TORCH_CHECK(e.norm_at >= 0, "epilogue_moments: expected a program with a norm");
  STD_TORCH_CHECK(map.n * map.s > 1, "epilogue_moments: expected more than 1 value per channel");
  const Moments moments = measure(e, Tiling(map), z, map.c);
  const Tensor found = torch::stable::new_empty(z, Ints{2, map.c}, ScalarType::Double);
  double* to = static_cast<double*>(found.data_ptr());
  for (int64_t c = 0; c < map.c; ++c) to[c] = moments.mean(c), to[map.c + c] = moments.var(c);
  return found;
}

std::tuple<Tensor, Tensor, Tensor> epilogue(Tensor z, std::optional<Tensor> gamma, std::optional<Tensor> beta,
                                            std::optional<Tensor> given_mean, std::optional<Tensor> given_var,
                                            std::optional<Tensor> moments, std::optional<Tensor> added, Ints stages,
                                            Floats numbers, double eps, bool keep) {
  const Map map = describe_map(z);
  const EpilogueProgram e = read_program(stages, numbers, dtype_of(z));
  const bool given = given_mean.has_value(), normed = e.norm_at >= 0;
  STD_TORCH_CHECK(given == given_var.has_value(), "epilogue: expected a mean and a variance, or neither");
  STD_TORCH_CHECK(e.step[e.steps - 1].add == added.has_value(), "epilogue: the program and the added tensor differ");
  if (added) check_like("the added tensor", *added, z);
  STD_TORCH_CHECK(!keep || !keeps_bits(e) || two_valued(e.step[e.steps - 1].activation),
                  "epilogue: a backward needs an activation of two slopes behind an added tensor");
  STD_TORCH_CHECK(!normed || given || map.n * map.s > 1, "epilogue: expected more than 1 value per channel");
  check_argument("epilogue", "moments", moments, {2, map.c}, ScalarType::Double, Memory::kContiguous);

  const Tiling tiling(map);
  const Tensor out = new_map(z, map);
  const bool bits = keep && keeps_bits(e);
  const Tensor passed = new_output(z, bits ? tiling.bits_shape() : Ints{0}, ScalarType::Byte);
  std::optional<NormForward> norm;
  NormGrads read{};
  if (normed) {
    norm.emplace(z, map.c, gamma, beta, eps);
    if (given) {
      const Parameter mean(given_mean, map.c, 0), var(given_var, map.c, 1);
      for (int64_t c = 0; c < map.c; ++c) norm->set(c, mean[c], var[c]);
    } else {
      const Tensor found = moments ? *moments : epilogue_moments(z, stages, numbers);
      const double* of = static_cast<const double*>(found.data_ptr());
      for (int64_t c = 0; c < map.c; ++c) norm->set(c, of[c], of[map.c + c]);
    }
    read.scale = norm->scale.data(), read.shift = norm->shift.data();
  }
  for_each_tile(tiling, read, [&](const Tiling::Place& place, float* scratch) {
    const int64_t first = place.first;
    epilogue_kernels().forward(
        e, place.tile,
        {element(z, first), added ? element(*added, first) : nullptr, mutable_element(out, first),
         bits ? static_cast<uint8_t*>(passed.data_ptr()) + place.bits : nullptr},
        scratch);
  });
  return {out, passed, norm ? norm->stats : torch::stable::new_empty(z, Ints{0}, ScalarType::Double)};
}

std::tuple<Tensor, Tensor, Tensor> epilogue_backward(Tensor grad, std::optional<Tensor> z, Tensor passed, Tensor stats,
                                                     Ints stages, Floats numbers, double eps, bool given, bool need_z,
                                                     bool need_added) {
  const char* op = "epilogue_backward";
  const Map map = describe_map(grad);
  const EpilogueProgram e = read_program(stages, numbers, dtype_of(grad));
  const bool normed = e.norm_at >= 0, bits = keeps_bits(e);
  const Tiling tiling(map);
  if (z) check_like("the map", *z, grad);
  const bool reads_z = e.steps > 1 || (normed && !given) || (!bits && e.step[0].activation != kNone);
  STD_TORCH_CHECK(z || !reads_z, op, ": expected the map");
  STD_TORCH_CHECK(!need_added || e.step[e.steps - 1].add, op, ": the program adds no tensor");
  check_argument(op, "passed", passed, bits ? tiling.bits_shape() : Ints{0}, ScalarType::Byte, Memory::kContiguous);
  check_argument(op, "stats", stats, normed ? Ints{4, map.c} : Ints{0}, ScalarType::Double, Memory::kContiguous);
  const Tensor grad_z = need_z ? new_map(grad, map) : no_elements(grad);
  const Tensor grad_added = need_added ? new_map(grad, map) : no_elements(grad);
  auto maps = [&](const Tiling::Place& place, bool of_added) {
    const int64_t first = place.first;
    return EpilogueGrads{element(grad, first), z ? element(*z, first) : nullptr,
                         bits ? static_cast<const uint8_t*>(passed.data_ptr()) + place.bits : nullptr,
                         need_added && of_added ? mutable_element(grad_added, first) : nullptr,
                         need_z ? mutable_element(grad_z, first) : nullptr};
  };

  Tensor sums = torch::stable::new_empty(grad, Ints{0}, ScalarType::Double);
  std::optional<NormBackward> norm;
  NormGrads read{};
  const bool summed = normed && z.has_value();
  if (normed) {
    norm.emplace(stats, map.c);
    if (summed) {
      std::vector<double> total(2 * map.c);
      for_each_sum(
          tiling, norm->norm(),
          [&](int64_t, const Tiling::Place& place, bool, double* found, float* scratch) {
            epilogue_kernels().sums(e, place.tile, maps(place, true), found, scratch);
          },
          [&](int64_t, int64_t channel, int64_t count, int64_t, const double* found) {
            for (int64_t c = 0; c < count; ++c) {
              total[channel + c] += found[c];
              total[map.c + channel + c] += found[count + c];
            }
          });
      sums = norm->finish(grad, total, map.n * map.s, eps, given);
    }
    read = norm->norm();
    if (given) read.mean_grad = read.slope = nullptr;
  }
  if (need_z || (need_added && !summed)) {
    for_each_tile(tiling, read, [&](const Tiling::Place& place, float* scratch) {
      epilogue_kernels().backward(e, place.tile, maps(place, !summed), scratch);
    });
  }
  return {grad_z, grad_added, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CPU, m) {
  m.impl("epilogue", CNNLSTM_FAST_OP(epilogue));
  m.impl("epilogue_moments", CNNLSTM_FAST_OP(epilogue_moments));
  m.impl("epilogue_backward", CNNLSTM_FAST_OP(epilogue_backward));
}

}  // namespace cnnlstm_fast
