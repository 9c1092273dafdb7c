#include "tensors.h"

#include <torch/csrc/stable/ops.h>

#include <string>

#include "memory.h"

namespace cnnlstm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

std::string in_words(const Ints& shape) {
  std::string words = "(";
  for (size_t i = 0; i < shape.size(); ++i) words += (i ? ", " : "") + std::to_string(shape[i]);
  return words + (shape.size() == 1 ? ",)" : ")");
}

bool has_shape(const Tensor& t, const Ints& shape) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(i) == shape[i];
  return same;
}

}  // namespace

Ints sizes(const Tensor& t) {
  Ints found(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) found[i] = t.size(i);
  return found;
}

void check_argument(const char* op, const char* name, const Tensor& t, const Ints& shape,
                    std::optional<ScalarType> dtype, Memory memory) {
  const bool contiguous = memory == Memory::kContiguous;
  if (t.is_cpu() && has_shape(t, shape) && (!dtype || t.scalar_type() == *dtype) && (!contiguous || t.is_contiguous()))
    return;
  STD_TORCH_CHECK(false, op, ": ", name, " does not fit the other arguments: expected shape ", in_words(shape),
                  dtype ? " and dtype " : "", dtype ? name_of(*dtype) : "", contiguous ? ", contiguous" : "",
                  " on the CPU, got shape ", in_words(sizes(t)), " and dtype ", name_of(t.scalar_type()),
                  t.is_contiguous() ? "" : ", not contiguous", t.is_cpu() ? "" : " on another device");
}

void check_argument(const char* op, const char* name, const std::optional<Tensor>& t, const Ints& shape,
                    std::optional<ScalarType> dtype, Memory memory) {
  if (t) check_argument(op, name, *t, shape, dtype, memory);
}

bool lies_channels_last(const Tensor& x) {
  const int64_t c = x.size(1), h = x.size(2), w = x.size(3);
  return !x.is_contiguous() && x.stride(1) == 1 && x.stride(3) == c && x.stride(2) == w * c && x.stride(0) == h * w * c;
}

Tensor channels_last(const Tensor& x) {
  return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
}

Tensor view_channels_first(const Tensor& nhwc) {
  return torch::stable::transpose(torch::stable::transpose(const_cast<Tensor&>(nhwc), 2, 3), 1, 2);
}

Tensor view_channels_inside(const Tensor& nchw) {
  return torch::stable::transpose(torch::stable::transpose(const_cast<Tensor&>(nchw), 1, 2), 2, 3);
}

Tensor canonical_strides(const Tensor& weight) {
  return weight.is_contiguous() || lies_channels_last(weight) ? weight : torch::stable::contiguous(weight);
}

Tensor contiguous_strict(const Tensor& t) {
  return torch::stable::view(torch::stable::contiguous(t), sizes(t));
}

Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

Tensor as_floats(const Tensor& t) {
  return as_dtype(t, ScalarType::Float);
}

Tensor as_float_rows(const Tensor& t) {
  const Tensor floats = as_floats(t);
  const int64_t last = floats.dim() - 1;
  return floats.stride(last) == 1 || floats.size(last) <= 1 ? floats : torch::stable::contiguous(floats);
}

Tensor as_contiguous_floats(const Tensor& t) {
  return torch::stable::contiguous(as_floats(t));
}

const float* floats(const Tensor& t) {
  return static_cast<const float*>(t.data_ptr());
}

float* mutable_floats(const Tensor& t) {
  return static_cast<float*>(t.data_ptr());
}

Ints strides_by_axis(const Tensor& t, const Ints& order) {
  Ints strides(order.size());
  for (size_t i = 0; i < order.size(); ++i) strides[order[i]] = t.stride(i);
  return strides;
}

Tensor new_like_input(const Tensor& x) {
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  if (!lies_channels_last(x)) return new_output(x, Ints{n, c, h, w}, x.scalar_type());
  return view_channels_first(new_output(x, Ints{n, h, w, c}, x.scalar_type()));
}

Tensor no_elements(const Tensor& like) {
  return torch::stable::new_empty(like, Ints{0});
}

}  // namespace cnnlstm_fast
