// A block with a batch norm on the CPU: cnnlstm_fast::fold_norm, conv_norm_block with its backward, and patch_moments.
// The schemas and the meaning of every argument stand in cnnlstm_fast/ops/conv_norm.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "block_description.h"
#include "block_rows.h"
#include "conv_plan.h"
#include "cpu/dispatch.h"
#include "limits.h"
#include "memory.h"
#include "norm_statistics.h"
#include "op.h"
#include "threads.h"

namespace cnnlstm_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements of a weight that one item folds.
const int64_t kWeightsPerItem = limit("WEIGHTS_PER_ITEM", 32 * 1024, 1);

// Copies rows of channels, and adds them to the moments.
void copy_and_add(Moments& moments, const char* from, char* to, int64_t positions, int64_t channels, int32_t dtype) {
  const int64_t parts = ceil_div(positions, kPositionsPerSum);
  const int64_t part_bytes = kPositionsPerSum * channels * (dtype == kFloat32 ? 4 : 2);
  std::vector<double> found(parts * 2 * channels);
  auto size_of = [&](int64_t i) { return std::min(kPositionsPerSum, positions - i * kPositionsPerSum); };
  for_each_item(parts, [&](int64_t i) {
    double* means = found.data() + i * 2 * channels;
    kernels().copy_and_measure(from + i * part_bytes, to + i * part_bytes, size_of(i), channels, dtype, means,
                               means + channels);
  });
  for (int64_t i = 0; i < parts; ++i) {
    const double *means = found.data() + i * 2 * channels, *squares = means + channels;
    for (int64_t c = 0; c < channels; ++c) moments.add(c, static_cast<double>(size_of(i)), means[c], squares[c]);
  }
}

std::tuple<Tensor, Tensor> fold_norm(Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> gamma,
                                     std::optional<Tensor> beta, Tensor mean, Tensor var, double eps) {
  const ScalarType dtype = weight.scalar_type();
  STD_TORCH_CHECK(
      weight.dim() == 4 && weight.size(0) >= 1 && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
      "fold_norm: expected a 4-d weight in float32 or bfloat16");
  elements("a weight", weight);
  const int64_t co = weight.size(0), taps = weight.numel() / co;
  const int32_t type = dtype == ScalarType::Float ? kFloat32 : kBFloat16;
  const Parameter b(bias, co, 0), g(gamma, co, 1), shift(beta, co, 0), m(mean, co, 0), v(var, co, 1);
  const Tensor from = torch::stable::contiguous(weight);
  const Tensor to = torch::stable::new_empty(weight, sizes(weight));
  const Tensor to_bias = torch::stable::new_empty(weight, Ints{co});
  const KernelTable& k = kernels();
  const void* source = from.data_ptr();
  void *target = to.data_ptr(), *target_bias = to_bias.data_ptr();
  auto fold = [&](int64_t c) {
    const double scale = g[c] / std::sqrt(v[c] + eps);
    k.scale(source, scale, target, c * taps, (c + 1) * taps, type);
    k.from_float(static_cast<float>(shift[c] + (b[c] - m[c]) * scale), target_bias, c, type);
  };
  const int64_t part = std::max<int64_t>(1, kWeightsPerItem / std::max<int64_t>(1, taps));
  for_each_item(ceil_div(co, part), [&](int64_t item) {
    for (int64_t c = item * part; c < std::min(co, (item + 1) * part); ++c) fold(c);
  });
  return {to, to_bias};
}

// ---- Forward

// Where the convolution's map goes, chunk by chunk.
struct MapStorage {
  bool stored;    // the whole map is read again: to normalise it, or by the backward
  bool in_parts;  // it is put together from chunks
  bool returned;
  NewTensor new_map;
  Tensor map;  // [N, OH, OW, CO], without elements until there is one

  MapStorage(const Tensor& x, const Block& b, int64_t chunk, bool given, bool keep, bool keep_map)
      : stored(!given || (keep && !b.pooled)),
        in_parts(chunk < b.n || b.n == 0),
        returned(keep && (!b.pooled || (keep_map && !given))),
        new_map(returned ? NewTensor(new_output) : NewTensor(new_temporary)),
        map(new_map(x, stored && in_parts ? map_shape(b, b.n) : Ints{0}, x.scalar_type())) {}
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_norm_block(
    Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> gamma, std::optional<Tensor> beta,
    std::optional<Tensor> given_mean, std::optional<Tensor> given_var, double eps, Ints conv, int64_t activation,
    Floats act, Ints pool, Ints order, int64_t plan, bool keep, bool keep_map) {
  const BlockDescription description = describe_block(x, weight, conv, activation, act, pool, order);
  const Block& b = description.block;
  const ConvPlan& chosen = conv_plan(plan, b, weight);
  STD_TORCH_CHECK(given_mean.has_value() == given_var.has_value(),
                  "conv_norm_block: expected a mean and a variance, or neither");
  const bool given = given_mean.has_value();
  STD_TORCH_CHECK(given || b.n * b.oh * b.ow > 1, "conv_norm_block: expected more than 1 value per channel");
  const Parameter added(bias, b.co, 0), known_mean(given_mean, b.co, 0), known_var(given_var, b.co, 1);
  NormForward norm(x, b.co, gamma, beta, eps);

  const Ints shape = result_shape(description);
  const Tensor out = new_output(x, shape, x.scalar_type());
  const Tensor codes = new_output(x, keep && b.pooled ? codes_shape(b) : Ints{0}, ScalarType::Byte);
  const Tensor kept = new_output(x, keep && b.pooled ? shape : Ints{0}, x.scalar_type());
  const int64_t chunk = chosen.images_per_chunk(b);
  MapStorage storage(x, b, chunk, given, keep, keep_map);
  if (given)
    for (int64_t c = 0; c < b.co; ++c) norm.set(c, known_mean[c] - added[c], known_var[c]);
  if (b.n == 0) return {out, codes, kept, storage.map, norm.stats};

  const Outputs outputs{out.data_ptr(), codes_pointer(codes), kept.numel() ? kept.data_ptr() : nullptr};
  auto normalise = [&](const void* map, int64_t n0, int64_t count) {
    run_epilogue(b, map, n0, count, norm.scale.data(), norm.shift.data(), outputs);
  };
  Moments moments(b.co);
  const auto forward = chosen.conv_forward({conv, weight, std::nullopt}, storage.new_map);
  const int64_t image_bytes = b.oh * b.ow * b.co * x.element_size();
  for (int64_t n0 = 0; n0 < b.n; n0 += chunk) {
    const int64_t count = std::min(chunk, b.n - n0);
    const Tensor found = forward->map_of(torch::stable::narrow(x, 0, n0, count));
    if (given) normalise(found.data_ptr(), n0, count);
    if (!storage.stored) continue;
    if (!storage.in_parts) storage.map = contiguous_strict(found);
    copy_and_add(moments, static_cast<const char*>(found.data_ptr()),
                 static_cast<char*>(storage.map.data_ptr()) + n0 * image_bytes, count * b.oh * b.ow, b.co, b.dtype);
  }
  if (!given) {
    for (int64_t c = 0; c < b.co; ++c) norm.set(c, moments.mean(c), moments.var(c));
    normalise(storage.map.data_ptr(), 0, b.n);
  }
  return {out, codes, kept, storage.returned ? storage.map : no_elements(x), norm.stats};
}

// ---- Backward

// What a backward reads of the forward's results.
struct NormResult {
  const Tensor& grad;
  const Ints grad_stride;  // by (N, C, H, W)
  const Tensor& codes;
  const Tensor& values;  // z at every argmax, or the whole map where there is no pool
  const Ints values_stride;
  const Tensor& map;  // without elements where it is computed again
};

// The sums of du and of du * (z - mean) over the batch, [2, C].
std::vector<double> norm_sums(const Block& b, const NormGrads& norm, const NormResult& result) {
  const KernelTable& k = kernels();
  const int64_t rows = std::max<int64_t>(1, kPositionsPerSum / b.out_w), bands = ceil_div(b.out_h, rows);
  const int64_t scratch = k.norm_scratch(b);
  std::vector<double> part(b.n * bands * 2 * b.co), total(2 * b.co);
  for_each_item(b.n * bands, [&](int64_t item) {
    const int64_t row0 = item % bands * rows;
    k.norm_sums(b, norm, result.grad.data_ptr(), result.grad_stride.data(), result.values.data_ptr(),
                result.values_stride.data(), item / bands, row0, std::min(b.out_h, row0 + rows),
                part.data() + item * 2 * b.co, thread_scratch(scratch));
  });
  for (size_t i = 0; i < part.size(); ++i) total[i % (2 * b.co)] += part[i];
  return total;
}

// The gradients of the convolution by a plan, chunk by chunk; nothing, if they are not finite.
std::optional<ConvolutionGrads> convolution_grads(const ConvPlan& plan, const BlockDescription& description,
                                                  const NormGrads& norm, const NormResult& result, const Tensor& x,
                                                  const Tensor& weight, bool given, Needs need) {
  const KernelTable& k = kernels();
  const Block& b = description.block;
  const int64_t chunk = plan.images_per_chunk(b), image = b.oh * b.ow * b.co, size = x.element_size();
  const int64_t scratch = k.norm_scratch(b);
  const auto forward = plan.conv_forward({description.conv, weight, std::nullopt}, new_temporary);
  const auto grads = plan.conv_backward(description.conv, x, weight, need);
  for (int64_t n0 = 0; n0 < b.n; n0 += chunk) {
    const int64_t count = std::min(chunk, b.n - n0);
    std::optional<Tensor> again;
    const char* from = nullptr;  // z, which the gradient does not depend on where the statistics are given
    if (!given && result.map.numel()) {
      from = static_cast<const char*>(result.map.data_ptr()) + n0 * image * size;
    } else if (!given) {
      again = forward->map_of(torch::stable::narrow(const_cast<Tensor&>(x), 0, n0, count));
      from = static_cast<const char*>(again->data_ptr());
    }
    const Tensor grad_map = new_temporary(x, map_shape(b, count), x.scalar_type());
    char* to = static_cast<char*>(grad_map.data_ptr());
    for_each_band(b, count, [&](int64_t i, int64_t row0, int64_t row1) {
      k.norm_unpool(b, norm, result.grad.data_ptr(), result.grad_stride.data(), codes_pointer(result.codes),
                    result.values.data_ptr(), result.values_stride.data(), n0 + i, row0, row1,
                    from ? from + i * image * size : nullptr, to + i * image * size, thread_scratch(scratch));
    });
    grads->add(grad_map, n0);
  }
  return grads->result();
}

std::tuple<Tensor, Tensor, Tensor> conv_norm_block_backward(Tensor grad, Tensor x, Tensor weight, Tensor stats,
                                                            Tensor codes, Tensor kept, Tensor map, double eps,
                                                            Ints conv, int64_t activation, Floats act, Ints pool,
                                                            Ints order, int64_t plan, bool given, bool need_x,
                                                            bool need_weight) {
  const char* op = "conv_norm_block_backward";
  const BlockDescription description = describe_block(x, weight, conv, activation, act, pool, order);
  const Block& b = description.block;
  const ConvPlan& chosen = conv_plan(plan, b, weight);
  const Ints shape = result_shape(description);
  check_argument(op, "the gradient", grad, shape, x.scalar_type());
  if (b.pooled) check_argument(op, "kept", kept, shape, x.scalar_type(), Memory::kContiguous);
  if (!b.pooled || map.numel())
    check_argument(op, "the map", map, map_shape(b, b.n), x.scalar_type(), Memory::kContiguous);
  if (b.pooled) check_argument(op, "codes", codes, codes_shape(b), ScalarType::Byte, Memory::kContiguous);
  check_argument(op, "stats", stats, {4, b.co}, ScalarType::Double, Memory::kContiguous);

  const Tensor& values = b.pooled ? kept : map;
  const NormResult result{
      grad, strides_by_axis(grad, order), codes, values, strides_by_axis(values, b.pooled ? order : Ints{0, 2, 3, 1}),
      map};
  NormBackward norm(stats, b.co);
  const Tensor grads = norm.finish(x, norm_sums(b, norm.norm(), result), b.n * b.oh * b.ow, eps, given);
  if (b.n == 0 || (!need_x && !need_weight)) {
    const Tensor dx = need_x ? new_like_input(x) : no_elements(x);
    return {dx, torch::stable::new_zeros(weight, need_weight ? sizes(weight) : Ints{0}), grads};
  }
  auto by = [&](const ConvPlan& way) {
    return convolution_grads(way, description, norm.norm(), result, x, weight, given, {need_x, need_weight, false});
  };
  std::optional<ConvolutionGrads> found = by(chosen);
  if (!found) found = by(chunked_plan());
  return {found->x, found->weight, grads};
}

// ---- Statistics from patches

// Moments of the patches that a convolution sees, from slices of the batch: T. Chan, G. Golub and R. LeVeque, as
// Moments has it.
class PatchMoments {
 public:
  PatchMoments(const Tensor& like, int64_t taps, int64_t width)
      : moments(torch::stable::new_zeros(like, Ints{taps + 1, taps}, ScalarType::Double)), taps_(taps), width_(width) {}

  // Products [taps + 1, width], upper triangle, of all pairs of taps less their pivots and of a last tap of ones.
  void add(const double* products, const double* pivots) {
    std::vector<double> off(taps_), delta(taps_);
    double *sums = static_cast<double*>(moments.data_ptr()), *mean = sums + taps_ * taps_;
    const double here = products[taps_ * width_ + taps_], share = here / (count_ + here);
    for (int64_t i = 0; i < taps_; ++i) {
      off[i] = products[i * width_ + taps_] / here;
      delta[i] = pivots[i] + off[i] - mean[i];
    }
    for (int64_t i = 0; i < taps_; ++i)
      for (int64_t j = 0; j < taps_; ++j)
        sums[i * taps_ + j] += products[std::min(i, j) * width_ + std::max(i, j)] - here * off[i] * off[j] +
                               delta[i] * delta[j] * count_ * share;
    for (int64_t i = 0; i < taps_; ++i)
      mean[i] = std::isfinite(delta[i]) ? mean[i] + delta[i] * share : mean[i] + pivots[i] + off[i];
    count_ += here;
  }

  void finish() {
    double* sums = static_cast<double*>(moments.data_ptr());
    for (int64_t i = 0; i < taps_ * taps_; ++i) sums[i] /= count_;
  }

  const Tensor moments;  // rows: the covariance; the mean

 private:
  const int64_t taps_, width_;
  double count_ = 0;
};

Tensor patch_moments(Tensor x, Tensor weight, Ints conv) {
  const Block b = describe_convolution(x, weight, conv).block;
  STD_TORCH_CHECK(b.groups == 1 && b.n >= 1, "patch_moments: expected groups=1 and at least one image");
  check_offsets(b);
  const KernelTable& k = kernels();
  const int64_t taps = b.taps, width = k.patch_width(taps), lines = b.n * b.oh;
  elements("the products of all pairs of taps", {32, taps + 1, width});
  const int64_t slices = std::min<int64_t>(lines, 32), per_slice = (taps + 1) * width;
  std::vector<double> sums(slices * per_slice), pivots(slices * taps);
  for_each_item(slices, [&](int64_t slice) {
    const int64_t end = (slice + 1) * lines / slices;
    for (int64_t line = slice * lines / slices; line < end;) {
      const int64_t n = line / b.oh, row0 = line % b.oh, row1 = std::min(b.oh, row0 + end - line);
      k.patch_products(b, x.data_ptr(), n, row0, row1, pivots.data() + slice * taps, sums.data() + slice * per_slice,
                       thread_scratch(k.patch_scratch(b)));
      line += row1 - row0;
    }
  });
  PatchMoments all(x, taps, width);
  for (int64_t slice = 0; slice < slices; ++slice)
    all.add(sums.data() + slice * per_slice, pivots.data() + slice * taps);
  all.finish();
  return all.moments;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CPU, m) {
  m.impl("fold_norm", CNNLSTM_FAST_OP(fold_norm));
  m.impl("conv_norm_block", CNNLSTM_FAST_OP(conv_norm_block));
  m.impl("conv_norm_block_backward", CNNLSTM_FAST_OP(conv_norm_block_backward));
  m.impl("patch_moments", CNNLSTM_FAST_OP(patch_moments));
}

}  // namespace cnnlstm_fast
