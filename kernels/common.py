"""What several Triton kernels share: activations, argmax codes, index arithmetic, and tiles of a convolution.

These functions run inside kernels. BM, BN, BK and BC are the sizes of a tile, as in
:mod:`cnnlstm_fast.kernels.conv_block`, whose names for sizes and strides are used here too.

Kernels import them by name: inductor copies a kernel's source together with the functions that it names.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---------------------------------------------------------------- reductions, loads and rounding


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def load_float32(pointers, ok):
    """Elements as float32, zero where not ``ok``."""
    return tl.load(pointers, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def load_float64(pointers, ok, other):
    """Elements as float64, ``other`` where not ``ok``."""
    return tl.load(pointers, mask=ok, other=other).to(tl.float64)


@triton.jit
def round_to_type_of(z, pointer):
    """``z`` rounded to the element type of ``pointer``, in float32."""
    return z.to(pointer.dtype.element_ty).to(tl.float32)


# ---------------------------------------------------------------- activations


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """tanh to about 2 ulp: near zero by its series, since 1 - 2 / (exp(2x) + 1) cancels there."""
    s = x * x
    series = 0.13333333 + s * (-0.053968254 + s * (0.021869488 - s * 0.0088632355))
    near = x + x * s * (-0.33333333 + s * series)
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))
    far = tl.where(x < 0, -far, far)
    return tl.where(tl.abs(x) < 0.3, near, far)


@triton.jit
def tanh_slope(x, tanh_x):
    """1 - tanh(x)^2; near one 4e / (1 + e)^2 with e = exp(-2|x|), where the first one loses its digits."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = 2.0 / (1.0 + e)
    return tl.where(e < 0.33333333, e * far * far, 1.0 - tanh_x * tanh_x)


@triton.jit
def log1p(x):
    """ln(1 + x) for x >= 0: what 1 + x loses in rounding is added."""
    total = 1.0 + x
    y = tl.log(total) + (x - (total - 1.0)) / total
    return tl.where(total < float("inf"), y, total)


@triton.jit
def relu6(x):
    return tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))


@triton.jit
def activate(y, ACTIVATION: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """(activation of ``y``, slope there) as PyTorch defines them; ACTIVATION is a number of spec.ACTIVATIONS.

    The slope is right from LeakyReLU on only: no kernel asks for that of the clamping activations.
    """
    slope = y
    if ACTIVATION == 1:  # ReLU
        y = tl.where(y <= 0, 0.0, y)
    elif ACTIVATION == 2:  # Hardtanh
        y = tl.where(y < A, A, tl.where(y > B, B, y))
    elif ACTIVATION == 3:  # LeakyReLU
        slope = tl.where(y > 0, 1.0, A)
        y = tl.where(y > 0, y, y * A)
    elif ACTIVATION == 4:  # ELU
        exp_y = tl.exp(y)
        slope = tl.where(y > 0, 1.0, A * exp_y)
        # exp(y) - 1, without its cancellation
        y = tl.where(y > 0, y, A * (tanh(0.5 * y) * (exp_y + 1.0)))
    elif ACTIVATION == 5:  # Tanh
        y = tanh(y)
        slope = 1.0 - y * y
    elif ACTIVATION == 6:  # Sigmoid
        y = sigmoid(y)
        slope = y * (1.0 - y)
    elif ACTIVATION == 7:  # SiLU
        gate = sigmoid(y)
        slope = gate * (1.0 + y * (1.0 - gate))
        y = y * gate
    elif ACTIVATION == 8:  # GELU; y * 2**-0.5, exp(-y**2 / 2) / (2 pi)**0.5
        gate = 0.5 * (1.0 + tl.erf(y * 0.70710678))
        slope = gate + y * (0.39894228 * tl.exp(-0.5 * y * y))
        y = y * gate
    elif ACTIVATION == 9:  # GELU by tanh of (2 / pi)**0.5 (y + 0.044715 y**3)
        t = tanh(0.79788456 * (y + 0.044715 * y * y * y))
        slope = 0.5 * (1.0 + t) + 0.5 * y * (1.0 - t * t) * 0.79788456 * (1.0 + 0.134145 * y * y)
        y = 0.5 * y * (1.0 + t)
    elif ACTIVATION == 10:  # Softplus
        scaled = y * A
        exp_y = tl.exp(scaled)
        slope = tl.where(scaled > B, 1.0, exp_y / (exp_y + 1.0))
        y = tl.where(scaled > B, y, log1p(exp_y) / A)
    elif ACTIVATION == 11:  # Mish: tanh(ln(1 + e)) = n / (n + 2); above 40 it is 1
        e = tl.exp(tl.where(y > 40, 40.0, y))
        n = e * (e + 2.0)
        inverse = 1.0 / (n + 2.0)
        gate = n * inverse
        slope = gate + y * (4.0 * (n - e) * (inverse * inverse))
        y = y * gate
    elif ACTIVATION == 12:  # Hardswish
        slope = tl.where(y <= -3, 0.0, tl.where(y >= 3, 1.0, y / 3.0 + 0.5))
        y = y * relu6(y + 3.0) / 6.0
    elif ACTIVATION == 13:  # Hardsigmoid
        slope = tl.where((y > -3) & (y < 3), 0.16666667, 0.0)
        y = relu6(y + 3.0) / 6.0
    return y, slope


@triton.jit
def multiply_slope(grad, y, ACTIVATION: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """The gradient of a curved activation's argument ``y``.

    A slope of zero of Hardswish and Hardsigmoid stops infinite gradients and NaN too, as in PyTorch.
    """
    _, slope = activate(y, ACTIVATION, A, B)
    product = grad * slope
    if ACTIVATION == 12 or ACTIVATION == 13:
        product = tl.where(slope == 0, 0.0, product)
    return product


# ---------------------------------------------------------------- index arithmetic


@triton.jit
def split_position(m, SIZE_H, SIZE_W):
    """(n, h, w) of position ``m`` in maps of SIZE_H x SIZE_W."""
    return m // (SIZE_W * SIZE_H), m // SIZE_W % SIZE_H, m % SIZE_W


@triton.jit
def split_tap(k, KH: tl.constexpr, KW: tl.constexpr):
    """(input channel, h, w) of element ``k`` in a row of the weight."""
    return k // (KH * KW), k // KW % KH, k % KW


@triton.jit
def tile_positions(tile, M, SIZE_H, SIZE_W, BM: tl.constexpr):
    """The BM of M positions that are number ``tile``'s: (position, whether there is such a one, n, h, w)."""
    m = tile * BM + tl.arange(0, BM)
    m_ok = m < M
    n, h, w = split_position(m, SIZE_H, SIZE_W)
    return m, m_ok, n, h, w


@triton.jit
def group_channels(pid, COUT_G: tl.constexpr, GROUPS: tl.constexpr, BN: tl.constexpr):
    """The BN of a group's COUT_G channels that are program ``pid``'s.

    Returns (channel in the group, whether it has such a one, group, number among the programs of this tile).
    """
    TILES_G: tl.constexpr = (COUT_G + BN - 1) // BN
    c_in_group = pid % TILES_G * BN + tl.arange(0, BN)
    c_ok = c_in_group < COUT_G
    pid = pid // TILES_G
    group = pid % GROUPS
    return c_in_group, c_ok, group, pid // GROUPS


# ---------------------------------------------------------------- a convolution's tile


@triton.jit
def load_patches(
    x_ptr, n, oh, ow, inside, ci, kh, kw, k_ok, H, W, x_n, x_c, x_h, x_w,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    """What taps (ci, kh, kw) read of x at output positions (n, oh, ow), zeros outside x: [BM, BK]."""
    ih = (oh * SH - PH)[:, None] + (kh * DH)[None, :]
    iw = (ow * SW - PW)[:, None] + (kw * DW)[None, :]
    ok = inside[:, None] & k_ok[None, :] & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
    return tl.load(x_ptr + (n * x_n)[:, None] + (ci * x_c)[None, :] + ih * x_h + iw * x_w, mask=ok, other=0.0)


@triton.jit
def convolve(
    x_ptr, w_ptr, n, oh, ow, inside, group, c, c_ok, INNER, H, W, x_n, x_c, x_h, x_w, w_o, w_c, w_h, w_w,
    CIN_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    TF32: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr, OFFSET: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The convolution at output positions (n, oh, ow) for channels ``c`` of one group: [BM, BN]."""
    acc = tl.full((BM, BN), 0.0, tl.float32)
    for k0 in range(0, INNER, BK):
        k = (k0 + tl.arange(0, BK)).to(OFFSET)
        k_ok = k < INNER
        ci, kh, kw = split_tap(k, KH, KW)
        patch = load_patches(
            x_ptr, n, oh, ow, inside, group * CIN_G + ci, kh, kw, k_ok, H, W, x_n, x_c, x_h, x_w,
            SH, SW, PH, PW, DH, DW,
        )  # fmt: skip
        taps = tl.load(  # [BK, BN]
            w_ptr + (ci * w_c + kh * w_h + kw * w_w)[:, None] + (c * w_o)[None, :],
            mask=k_ok[:, None] & c_ok[None, :],
            other=0.0,
        )
        if FLOAT32_PRODUCT:
            patch = patch.to(tl.float32)
            taps = taps.to(tl.float32)
        acc = tl.dot(patch, taps, acc, input_precision="tf32" if TF32 else "ieee")
    return acc


# ---------------------------------------------------------------- argmax codes and max unpooling


@triton.jit
def load_codes(codes_ptr, m, c, ok, CODE_GROUPS: tl.constexpr, NIBBLES: tl.constexpr):
    """Argmax codes of channels ``c`` at positions ``m`` of the pooled map, 15 or 255 where not ``ok``."""
    if NIBBLES:
        byte = tl.load(codes_ptr + m * (CODE_GROUPS * 8) + (c // 16 * 8 + c % 8), mask=ok, other=255)
        code = (byte.to(tl.int32) >> (c % 16 // 8 * 4).to(tl.int32)) & 15
    else:
        code = tl.load(codes_ptr + m * (CODE_GROUPS * 16) + c, mask=ok, other=255).to(tl.int32)
    return code


@triton.jit
def _window_over(
    o, candidate, SIZE, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr
):
    """A pool window that may hold position ``o`` of one axis: (window, element there, whether it does).

    Without dilation only every STRIDE-th element can lie at ``o``, so ceil(KERNEL / STRIDE)
    candidates cover all windows; with dilation each of the KERNEL elements is a candidate.
    """
    if DILATION == 1:
        i = (o + PAD) % STRIDE + candidate * STRIDE
    else:
        i = o * 0 + candidate
    start = o + PAD - i * DILATION
    window = start // STRIDE
    return window, i, (i < KERNEL) & (start >= 0) & (start % STRIDE == 0) & (window < SIZE)


@triton.jit
def max_unpool(
    grad_ptr, codes_ptr, n, oh, ow, inside, c, c_ok, PH, PW, g_n, g_c, g_h, g_w,
    POOL_KH: tl.constexpr, POOL_KW: tl.constexpr, POOL_SH: tl.constexpr, POOL_SW: tl.constexpr,
    POOL_PH: tl.constexpr, POOL_PW: tl.constexpr, POOL_DH: tl.constexpr, POOL_DW: tl.constexpr,
    CODE_GROUPS: tl.constexpr, NIBBLES: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dconv at output positions (n, oh, ow) of the convolution for channels ``c``, in float32: [BM, BC]."""
    CANDIDATES_H: tl.constexpr = (POOL_KH + POOL_SH - 1) // POOL_SH if POOL_DH == 1 else POOL_KH
    CANDIDATES_W: tl.constexpr = (POOL_KW + POOL_SW - 1) // POOL_SW if POOL_DW == 1 else POOL_KW
    total = tl.full((BM, BC), 0.0, tl.float32)
    for candidate in range(CANDIDATES_H * CANDIDATES_W):
        ph, i, h_ok = _window_over(oh, candidate // CANDIDATES_W, PH, POOL_KH, POOL_SH, POOL_PH, POOL_DH)
        pw, j, w_ok = _window_over(ow, candidate % CANDIDATES_W, PW, POOL_KW, POOL_SW, POOL_PW, POOL_DW)
        ok = (inside & h_ok & w_ok)[:, None] & c_ok[None, :]
        m = (n * PH + ph) * PW + pw
        code = load_codes(codes_ptr, m[:, None], c[None, :], ok, CODE_GROUPS, NIBBLES)
        is_argmax = ok & (code == (i * POOL_KW + j)[:, None])
        offset = n * g_n + ph * g_h + pw * g_w
        total += load_float32(grad_ptr + offset[:, None] + (c * g_c)[None, :], is_argmax)
    return total
