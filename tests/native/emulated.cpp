// The kernels without PyTorch, against plain loops in double: what can be run of them for another processor under
// an emulator. Prints the largest error of each case and exits with 1 if one is too large.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/dispatch.h"

using namespace cnnlstm_fast;

namespace {

std::vector<float> random_values(size_t count, float scale) {
  static uint32_t state = 12345;
  std::vector<float> values(count);
  for (float& v : values) {
    state = state * 1664525u + 1013904223u;
    v = (static_cast<float>(state >> 8) / (1 << 23) - 1) * scale;
  }
  return values;
}

// Memory as the host code hands it out: a whole number of cache lines.
struct Floats {
  explicit Floats(int64_t count) {
    const size_t bytes = (count * sizeof(float) + 127) / 64 * 64;
    data = static_cast<float*>(std::aligned_alloc(64, bytes));
    std::memset(data, 0, bytes);
  }
  Floats(const Floats&) = delete;
  ~Floats() { std::free(data); }
  float* data;
};

double activate(int activation, const float* act, double z) {
  const double root = std::sqrt(0.5), tanh_of = std::sqrt(2 / std::acos(-1.0)) * (z + 0.044715 * z * z * z);
  switch (activation) {
    case kReLU:
      return std::max(z, 0.0);
    case kHardtanh:
      return std::min(std::max<double>(z, act[0]), static_cast<double>(act[1]));
    case kLeakyReLU:
      return z > 0 ? z : z * act[0];
    case kELU:
      return z > 0 ? z : act[0] * std::expm1(z);
    case kTanh:
      return std::tanh(z);
    case kSigmoid:
      return 1 / (1 + std::exp(-z));
    case kSiLU:
      return z / (1 + std::exp(-z));
    case kGELU:
      return z * 0.5 * (1 + std::erf(z * root));
    case kGELUTanh:
      return z * 0.5 * (1 + std::tanh(tanh_of));
    case kSoftplus:
      return act[0] * z > act[1] ? z : std::log1p(std::exp(act[0] * z)) / act[0];
    case kMish:
      return z * std::tanh(std::log1p(std::exp(z)));
    case kHardswish:
      return z * std::min(std::max(z + 3, 0.0), 6.0) / 6;
    case kHardsigmoid:
      return std::min(std::max(z + 3, 0.0), 6.0) / 6;
    default:
      return z;
  }
}

int64_t length(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  return (size + 2 * padding - kernel) / stride + 1;
}

// A block with a pool of `window` x `window` by the forward kernel; its codes by max_unpool.
double block_error(int activation, int64_t c, int64_t co, int64_t kernel, int64_t window) {
  Block b{};
  b.n = 2, b.c = c, b.h = 9, b.w = 11, b.co = co, b.kh = b.kw = kernel;
  b.sh = b.sw = b.dh = b.dw = b.groups = 1, b.ph = b.pw = kernel / 2;
  b.oh = length(b.h, kernel, 1, b.ph), b.ow = length(b.w, kernel, 1, b.pw);
  b.pool_kh = b.pool_kw = b.pool_sh = b.pool_sw = window, b.pool_dh = b.pool_dw = 1;
  b.out_h = length(b.oh, window, window, 0), b.out_w = length(b.ow, window, window, 0);
  b.pooled = b.coded = window > 1;
  b.activation = activation, b.dtype = kFloat32, b.act[0] = 0.2f, b.act[1] = 0.9f;
  const int64_t x_stride[4] = {c * b.h * b.w, b.h * b.w, b.w, 1};
  const int64_t out_stride[4] = {co * b.out_h * b.out_w, 1, b.out_w * co, co};
  std::copy_n(x_stride, 4, b.x_stride), std::copy_n(out_stride, 4, b.out_stride);
  b.code_bytes = window * window <= kNibbleWindow ? 8 : 16, b.code_groups = (co + kCodeGroup - 1) / kCodeGroup;
  b.padded_h = b.h + 2 * b.ph, b.padded_w = b.w + 2 * b.pw, b.taps = c * kernel * kernel;

  const std::vector<float> x = random_values(b.n * c * b.h * b.w, 1);
  const std::vector<float> weight = random_values(co * b.taps, 1 / std::sqrt(static_cast<float>(b.taps)));
  const KernelTable& k = kernels();
  const int64_t padded = k.packed_channels(co);
  Floats packed(padded * b.taps), bias(padded), scratch(k.forward_scratch(b, b.n, b.out_h));
  k.pack_weight(b, weight.data(), true, packed.data, 0, (padded + k.block_width - 1) / k.block_width);
  const std::vector<float> added = random_values(co, 0.5f);
  std::copy(added.begin(), added.end(), bias.data);
  std::vector<float> out(b.n * co * b.out_h * b.out_w);
  k.forward(b, x.data(), packed.data, bias.data, {out.data(), nullptr, nullptr}, 0, b.n, 0, b.out_h, scratch.data);

  double worst = 0;
  for (int64_t n = 0; n < b.n; ++n)
    for (int64_t o = 0; o < co; ++o)
      for (int64_t row = 0; row < b.out_h; ++row)
        for (int64_t col = 0; col < b.out_w; ++col) {
          double best = -1e300;
          for (int64_t e = 0; e < window * window; ++e) {
            double z = added[o];
            for (int64_t t = 0; t < b.taps; ++t) {
              const int64_t i = row * window + e / window + t / kernel % kernel - b.ph;
              const int64_t j = col * window + e % window + t % kernel - b.pw;
              if (i < 0 || i >= b.h || j < 0 || j >= b.w) continue;
              z += static_cast<double>(x[((n * c + t / (kernel * kernel)) * b.h + i) * b.w + j]) *
                   weight[o * b.taps + t];
            }
            best = std::max(best, activate(activation, b.act, z));
          }
          const float got = out[n * out_stride[0] + row * out_stride[2] + col * out_stride[3] + o];
          worst = std::max(worst, std::fabs(got - best));
        }
  return worst;
}

// Some steps of a layer as a stream takes them.
double layer_error(RecurrentMode mode, int64_t inputs, int64_t hidden, int64_t batch) {
  const RecurrentTable& k = recurrent_kernels();
  const int64_t gates = mode == kLSTM ? 4 : 3, padded = (hidden + kUnitGroup - 1) / kUnitGroup * kUnitGroup;
  const float scale = 1 / std::sqrt(static_cast<float>(hidden));
  const std::vector<float> w_ih = random_values(gates * hidden * inputs, scale),
                           w_hh = random_values(gates * hidden * hidden, scale),
                           b_ih = random_values(gates * hidden, 0.5f), b_hh = random_values(gates * hidden, 0.5f);
  static constexpr int32_t kAsTheyAre[4] = {0, 1, 2, 3}, kNewFirst[3] = {2, 0, 1};
  Floats packed_x(padded * gates * inputs), packed_h(padded * gates * hidden), bias(4 * padded),
      zeros(std::max(padded, inputs + kUnitGroup)), h(2 * batch * padded), c(batch * padded);
  k.pack_gates(w_ih.data(), inputs, hidden, inputs, gates, mode == kGRU ? kNewFirst : kAsTheyAre, packed_x.data, 0,
               padded);
  k.pack_gates(w_hh.data(), hidden, hidden, hidden, gates, kAsTheyAre, packed_h.data, 0, padded);
  for (int64_t u = 0; u < hidden; ++u) {
    float* to = bias.data + u / k.lanes * 4 * k.lanes + u % k.lanes;
    for (int64_t g = 0; g < gates; ++g) {
      const float x = b_ih[g * hidden + u], y = b_hh[g * hidden + u];
      if (mode == kLSTM)
        to[g * k.lanes] = x + y;
      else if (g < 2)
        to[(1 + g) * k.lanes] = x + y;
      else
        to[0] = x, to[3 * k.lanes] = y;
    }
  }
  const int64_t starts[3] = {0, batch, 2 * batch};
  RecurrentLayer l{};
  l.mode = mode, l.steps = 2, l.batch = batch, l.inputs = inputs, l.hidden = l.width = hidden;
  l.padded_hidden = l.padded_width = padded, l.x_sequence = inputs, l.out_sequence = hidden;
  l.packed_x = packed_x.data, l.packed_h = packed_h.data, l.bias = bias.data, l.zeros = zeros.data;
  l.h = h.data, l.c = c.data, l.starts = starts;
  std::vector<float> out(batch * hidden);
  l.out = out.data();
  Floats scratch(k.forward_scratch(l));

  std::vector<double> state(batch * hidden), cell(batch * hidden);
  double worst = 0;
  for (int64_t t = 0; t < 6; ++t) {
    const std::vector<float> x = random_values(batch * inputs, 1);
    l.x = x.data();
    k.forward_step(l, t % 2, 0, batch, 0, padded, scratch.data);
    const std::vector<double> before = state;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t u = 0; u < hidden; ++u) {
        double of_x[4], of_h[4];
        for (int64_t g = 0; g < gates; ++g) {
          const int64_t row = g * hidden + u;
          of_x[g] = b_ih[row], of_h[g] = b_hh[row];
          for (int64_t i = 0; i < inputs; ++i)
            of_x[g] += static_cast<double>(w_ih[row * inputs + i]) * x[b * inputs + i];
          for (int64_t i = 0; i < hidden; ++i)
            of_h[g] += static_cast<double>(w_hh[row * hidden + i]) * before[b * hidden + i];
        }
        auto sigmoid = [](double z) { return 1 / (1 + std::exp(-z)); };
        const int64_t at = b * hidden + u;
        if (mode == kLSTM) {
          cell[at] = sigmoid(of_x[1] + of_h[1]) * cell[at] + sigmoid(of_x[0] + of_h[0]) * std::tanh(of_x[2] + of_h[2]);
          state[at] = sigmoid(of_x[3] + of_h[3]) * std::tanh(cell[at]);
        } else {
          const double r = sigmoid(of_x[0] + of_h[0]), z = sigmoid(of_x[1] + of_h[1]);
          state[at] = (1 - z) * std::tanh(of_x[2] + r * of_h[2]) + z * before[at];
        }
        worst = std::max(worst, std::fabs(out[at] - state[at]));
      }
  }
  return worst;
}

int failed = 0;

void say(const char* what, int64_t number, double error) {
  std::printf("%s %lld: off by %.1e\n", what, static_cast<long long>(number), error);
  if (!(error < 2e-5)) failed = 1;
}

}  // namespace

int main() {
  std::printf("%s\n", kernels().name);
  for (int activation = kNone; activation < kActivations; ++activation) {
    say("block", activation, block_error(activation, 3, 20, 3, 2));
    say("block of one map", activation, block_error(activation, 5, 33, 1, 1));
  }
  for (int64_t hidden : {1, 16, 33})
    for (RecurrentMode mode : {kLSTM, kGRU})
      say(mode == kLSTM ? "LSTM" : "GRU", hidden, layer_error(mode, 5, hidden, 3));
  return failed;
}
