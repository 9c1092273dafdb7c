#include "library_limits.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <string>
#include <tuple>

#include "cpu/conv_block/block.h"
#include "cpu/processor.h"
#include "op.h"
#include "tensors.h"

namespace cnnlstm_fast {
namespace {

using torch::headeronly::ScalarType;

// Columns of a kernel; with 15 the first calls that never end were seen.
constexpr int64_t kMostDepthwiseWidth = 12;
// Rows or columns of kernels that may be longer than the image: of 644 random ones none failed; of 8 rows some did.
constexpr int64_t kShortKernel = 3;

// Whether the library may use a set with one of these words in its name. It reads the name once, in capitals or not.
bool allowed(std::initializer_list<const char*> words) {
  const char* most = std::getenv("ONEDNN_MAX_CPU_ISA");
  if (!most) most = std::getenv("DNNL_MAX_CPU_ISA");
  std::string name = most ? most : "";
  for (char& letter : name)
    if (letter >= 'a' && letter <= 'z') letter = static_cast<char>(letter - 'a' + 'A');
  bool any = name.empty() || name == "ALL" || name == "DEFAULT";
  for (const char* word : words) any |= name.find(word) != std::string::npos;
  return any;
}

}  // namespace

bool library_has_amx() {
  static const bool has = [] {
    const char* told = std::getenv("CNNLSTM_FAST_LIBRARY_ISA");
    return (told && std::string(told) == "amx") || (cpu_has_tiles_for(TileProducts::kBFloat16) && allowed({"AMX"}));
  }();
  return has;
}

bool library_has_bfloat16() {
  static const bool has =
      library_has_amx() || (cpu_has_avx512_bf16() && allowed({"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AMX", "AVX10"}));
  return has;
}

LibraryLimits library_limits(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                             const std::vector<int64_t>& conv, int64_t out_width) {
  const bool half = x.scalar_type() == ScalarType::BFloat16;
  const bool pointwise = weight.size(2) * weight.size(3) == 1;
  const bool column = x.size(3) == 1 || out_width == 1;
  const bool beyond = half ? pointwise || conv[4] * conv[5] > 1 || conv[6] > 1
                           : pointwise && conv[0] * conv[1] > 1 && weight.size(1) < kMaxVector;
  auto longer = [&](int axis) {
    const int64_t taps = weight.size(2 + axis), padding = conv[2 + axis], dilation = conv[4 + axis];
    return dilation * (taps - 1) >= x.size(2 + axis) && (taps > kShortKernel || dilation > 1 || padding >= taps);
  };
  const bool endless = half && conv[6] > 1 && weight.size(1) == 1 && weight.size(3) > kMostDepthwiseWidth;
  return {column || endless, column || endless || beyond,
          half && (column || longer(0) || longer(1)) && library_has_amx()};
}

namespace {

std::tuple<bool, bool, bool> limits_of(torch::stable::Tensor x, torch::stable::Tensor weight, std::vector<int64_t> conv,
                                       int64_t out_width) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && conv.size() >= 7,
                  "library_limits: expected a 4-d input and weight, and the parameters of a convolution");
  for (const std::vector<int64_t>& values : {sizes(x), sizes(weight), conv})
    for (const int64_t value : values)
      STD_TORCH_CHECK(value >= 0 && value <= std::numeric_limits<int32_t>::max(), "library_limits: ", value,
                      " is out of range");
  const LibraryLimits limits = library_limits(x, weight, conv, out_width);
  return {limits.contiguous, limits.contiguous_grad, limits.as_float};
}

}  // namespace

// The last as the struct of that name.
STABLE_TORCH_LIBRARY_FRAGMENT(cnnlstm_fast, m) {
  m.def("library_has_amx() -> bool");
  m.def("library_has_bfloat16() -> bool");
  m.def("library_limits(Tensor x, Tensor weight, int[] conv, int out_width) -> (bool, bool, bool)");
}

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CompositeExplicitAutograd, m) {
  m.impl("library_has_amx", CNNLSTM_FAST_OP(library_has_amx));
  m.impl("library_has_bfloat16", CNNLSTM_FAST_OP(library_has_bfloat16));
}

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CPU, m) {
  m.impl("library_limits", CNNLSTM_FAST_OP(limits_of));
}

}  // namespace cnnlstm_fast
