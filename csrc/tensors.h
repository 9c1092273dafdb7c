// Shapes, strides and layouts of tensors, and what an op asks of an argument.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace cnnlstm_fast {

using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;

Ints sizes(const torch::stable::Tensor& t);

// Checks a tensor that an op was given: on the CPU, of this shape, of this dtype (any, where it is nothing) and
// contiguous where that is asked for. An argument that was not given passes.
enum class Memory { kStrided, kContiguous };
void check_argument(const char* op, const char* name, const torch::stable::Tensor& t, const Ints& shape,
                    std::optional<torch::headeronly::ScalarType> dtype, Memory memory = Memory::kStrided);
void check_argument(const char* op, const char* name, const std::optional<torch::stable::Tensor>& t, const Ints& shape,
                    std::optional<torch::headeronly::ScalarType> dtype, Memory memory = Memory::kStrided);

// Whether an image's channels are innermost in dense memory, and x is not contiguous as well.
bool lies_channels_last(const torch::stable::Tensor& x);

// x [N, C, H, W] with memory [N, H, W, C].
torch::stable::Tensor channels_last(const torch::stable::Tensor& x);

// Views of the same memory: [N, H, W, C] as [N, C, H, W], and back.
torch::stable::Tensor view_channels_first(const torch::stable::Tensor& nhwc);
torch::stable::Tensor view_channels_inside(const torch::stable::Tensor& nchw);

// A weight with the strides that its layout has in PyTorch. The library takes a weight for channels-last whatever the
// stride of a dimension of size 1, and then computes grouped convolutions wrongly and refuses to give gradients.
torch::stable::Tensor canonical_strides(const torch::stable::Tensor& weight);

// Contiguous, and with the strides of that where a size of 1 would allow others.
torch::stable::Tensor contiguous_strict(const torch::stable::Tensor& t);

torch::stable::Tensor as_dtype(const torch::stable::Tensor& t, torch::headeronly::ScalarType dtype);

// As float32: any strides; the last dimension contiguous; all contiguous.
torch::stable::Tensor as_floats(const torch::stable::Tensor& t);
torch::stable::Tensor as_float_rows(const torch::stable::Tensor& t);
torch::stable::Tensor as_contiguous_floats(const torch::stable::Tensor& t);

// The elements of a float32 tensor.
const float* floats(const torch::stable::Tensor& t);
float* mutable_floats(const torch::stable::Tensor& t);

// The strides by (N, C, H, W) of a tensor whose dimensions are those in another order.
Ints strides_by_axis(const torch::stable::Tensor& t, const Ints& order);

// A gradient of the input x, unwritten: channels-last where that is how x lies, as the library has it, else contiguous.
torch::stable::Tensor new_like_input(const torch::stable::Tensor& x);

// What an op gives in the place of a result that was not asked for.
torch::stable::Tensor no_elements(const torch::stable::Tensor& like);

}  // namespace cnnlstm_fast
