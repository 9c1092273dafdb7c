// The kernels of convolutions by Fourier transforms: products of one small matrix with windows of images, which may
// overlap, and the products that give the gradient of a weight's spectra. The schemas, and the ops conv_fft and its
// backward that call these, stand in cnnlstm_fast/ops/conv_fft.py.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "cpu/dispatch.h"
#include "limits.h"
#include "memory.h"
#include "op.h"
#include "threads.h"

namespace cnnlstm_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Multiply-adds that are not worth a second thread.
const int64_t kOfOneThread = limit("TRANSFORM_WORK", 1 << 17, 1);

void check_rows(const char* op, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors)
    STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float &&
                        (t->size(t->dim() - 1) == 1 || t->stride(t->dim() - 1) == 1),
                    op, ": tensors must be float32 on the CPU, the last dimension contiguous");
}

void transform_windows(Tensor x, Tensor matrix, Tensor out, bool add) {
  STD_TORCH_CHECK(x.dim() == 6 && out.dim() == 6 && matrix.dim() == 2, "transform_windows: wrong dimensions");
  check_rows("transform_windows", {&x, &matrix, &out});
  for (int64_t i : {0, 1, 2, 4, 5})
    STD_TORCH_CHECK(x.size(i) == out.size(i), "transform_windows: x and out differ in dimension ", i);
  STD_TORCH_CHECK(x.size(3) == matrix.size(0) && out.size(3) == matrix.size(1),
                  "transform_windows: the matrix does not fit the windows");
  for (const Tensor* t : {&x, &matrix, &out}) elements("an argument of transform_windows", *t);
  elements("the work of transform_windows", {x.size(1), x.size(2), x.size(3), x.size(4), x.size(5), matrix.size(1)});
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
  in_parallel(0, images * rows, std::max<int64_t>(1, kOfOneThread / work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / rows, row = i % rows;
      const float* x_row = from + image * x.stride(0) + row * x.stride(1);
      float* out_row = to + image * out.stride(0) + row * out.stride(1);
      for (int64_t w = 0; w < windows; ++w)
        transform_kernels().run(t, x_row + w * x.stride(2), out_row + w * out.stride(2));
    }
  });
}

// Floats of both factors that one thread copies side by side: what a second-level cache holds.
const int64_t kFactors = limit("PRODUCT_FLOATS", 64 * 1024, 1);
// Products that are summed in one chain, and the fewest that are worth copying.
const int64_t kChain = limit("PRODUCT_CHAIN", 1024, 1), kFewProducts = limit("PRODUCTS", 16, 1);

void add_products(Tensor grad, Tensor x, Tensor out) {
  STD_TORCH_CHECK(grad.dim() == 3 && x.dim() == 3 && out.dim() == 4, "add_products: wrong dimensions");
  check_rows("add_products", {&grad, &x, &out});
  const int64_t rows = out.size(0), outputs = out.size(1), taps = out.size(2), channels = out.size(3);
  const int64_t positions = grad.size(0);
  STD_TORCH_CHECK(grad.size(1) == rows && grad.size(2) == outputs && x.size(0) == positions + taps - 1 &&
                      x.size(1) == rows && x.size(2) == channels,
                  "add_products: expected a gradient (positions, ", rows, ", ", outputs, ") and windows (positions + ",
                  taps - 1, ", ", rows, ", ", channels, ")");
  for (const Tensor* t : {&grad, &x, &out}) elements("an argument of add_products", *t);
  for (int64_t i = 0; i < 4; ++i)
    STD_TORCH_CHECK(out.size(i) <= 1 || out.stride(i) != 0, "add_products: positions of out overlap");
  if (!rows || !outputs || !taps || !channels || !positions) return;
  const int64_t most = std::max(kFewProducts, std::min(kChain, kFactors / (outputs + channels)));
  const float* grad_data = static_cast<const float*>(grad.data_ptr());
  const float* x_data = static_cast<const float*>(x.data_ptr());
  float* to = static_cast<float*>(out.data_ptr());
  auto copy = [](const float* from, int64_t step, int64_t count, int64_t width, float* side_by_side) {
    for (int64_t i = 0; i < count; ++i) std::copy_n(from + i * step, width, side_by_side + i * width);
  };
  for_each_item(rows, [&](int64_t row) {
    float* grads = thread_scratch(most * outputs + (most + taps - 1) * channels);
    float* windows = grads + most * outputs;
    for (int64_t at = 0; at < positions; at += most) {
      const int64_t count = std::min(most, positions - at);
      copy(grad_data + at * grad.stride(0) + row * grad.stride(1), grad.stride(0), count, outputs, grads);
      copy(x_data + at * x.stride(0) + row * x.stride(1), x.stride(0), count + taps - 1, channels, windows);
      const Transform t{grads, outputs, count, outputs, 1, channels, 0, channels, 0, out.stride(1), true};
      for (int64_t tap = 0; tap < taps; ++tap)
        transform_kernels().run(t, windows + tap * channels, to + row * out.stride(0) + tap * out.stride(2));
    }
  });
}

Tensor new_spectra(Tensor like, std::vector<int64_t> size) {
  elements("the result of new_spectra", size);
  STD_TORCH_CHECK(!size.empty() && like.is_cpu() && like.scalar_type() == ScalarType::Float,
                  "new_spectra: expected a float32 tensor on the CPU and sizes");
  return new_temporary(like, size, ScalarType::Float);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cnnlstm_fast, CPU, m) {
  m.impl("transform_windows", CNNLSTM_FAST_OP(transform_windows));
  m.impl("add_products", CNNLSTM_FAST_OP(add_products));
  m.impl("new_spectra", CNNLSTM_FAST_OP(new_spectra));
}

}  // namespace cnnlstm_fast
