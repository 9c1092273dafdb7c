// Products of one small matrix with windows of images, which may overlap. The schema stands in
// cnnlstm_fast/ops/conv_fft.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "cpu/dispatch.h"

namespace cnnlstm_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Multiply-adds that are not worth a second thread.
constexpr int64_t kOfOneThread = 1 << 17;

void transform_windows(Tensor x, Tensor matrix, Tensor out, bool add) {
  STD_TORCH_CHECK(x.dim() == 6 && out.dim() == 6 && matrix.dim() == 2, "transform_windows: wrong dimensions");
  for (const Tensor* t : {&x, &matrix, &out})
    STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float &&
                        (t->size(t->dim() - 1) == 1 || t->stride(t->dim() - 1) == 1),
                    "transform_windows: tensors must be float32 on the CPU, the last dimension contiguous");
  for (int64_t i : {0, 1, 2, 4, 5})
    STD_TORCH_CHECK(x.size(i) == out.size(i), "transform_windows: x and out differ in dimension ", i);
  STD_TORCH_CHECK(x.size(3) == matrix.size(0) && out.size(3) == matrix.size(1),
                  "transform_windows: the matrix does not fit the windows");
  const int64_t images = x.size(0), rows = x.size(1), windows = x.size(2);
  const Transform t{static_cast<const float*>(matrix.data_ptr()),
                    matrix.stride(0),
                    matrix.size(0),
                    matrix.size(1),
                    x.size(4),
                    x.size(5),
                    x.stride(4),
                    x.stride(3),
                    out.stride(4),
                    out.stride(3),
                    add};
  const float* from = static_cast<const float*>(x.data_ptr());
  float* to = static_cast<float*>(out.data_ptr());
  const int64_t work = windows * t.k * t.m * t.count * t.columns;
  if (!images || !rows || !work) return;
  // The windows of a row may overlap in `out`: one thread, in order.
  torch::stable::parallel_for(0, images * rows, std::max<int64_t>(1, kOfOneThread / work),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  const int64_t image = i / rows, row = i % rows;
                                  const float* x_row = from + image * x.stride(0) + row * x.stride(1);
                                  float* out_row = to + image * out.stride(0) + row * out.stride(1);
                                  for (int64_t w = 0; w < windows; ++w)
                                    transform_kernels().run(t, x_row + w * x.stride(2), out_row + w * out.stride(2));
                                }
                              });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CPU, m) {
  m.impl("transform_windows", TORCH_BOX(&transform_windows));
}

}  // namespace cnnlstm_fast
