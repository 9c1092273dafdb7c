"""The block op in Triton: ``layout(max_pool(act(conv2d(x) + bias)))`` and its gradients.

For a pooled output ``m = (n, ph, pw)`` and an element ``e = (i, j)`` of its pool window:

    at(m, e)  = (ph * POOL_SH - POOL_PH + i * POOL_DH, pw * POOL_SW - POOL_PW + j * POOL_DW)
    y(m, e)   = act(bias + weight . patch of x under at(m, e))       one value per channel
    out(m)    = max over e of y(m, e);   code(m) = the first such e, but the last NaN's
    dbias     = sum over m of grad(m) where the code names an element
    dconv(o)  = sum of grad(m) over the windows m whose winner lies at o, a place of the convolution's map
    dweight   = sum over o of dconv(o)^T . patch of x under o
    dx        = transposed convolution of dconv with weight

A program computes a tile of places (BM of them, M in all) by channels (BN); the window is a loop
inside it, so that the convolution's map exists in registers only; a product runs BK at a time
along its inner dimension, whose length INNER is an argument because the assembler unrolls constant
loops until the registers are gone. Every sum has a fixed order: the same bits each run.

Strides are in elements and named after their axis, ``x_n, x_c, x_h, x_w`` for (N, C, H, W) and
``w_o, w_c, w_h, w_w`` for the weight. Offsets take 64 bits where WIDE.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cnnlstm_fast.kernels.checks import check_bias, check_block, check_block_backward
from cnnlstm_fast.kernels.launching import launch
from cnnlstm_fast.kernels.tuning import Choice
from cnnlstm_fast.ops.conv_block import keeps_codes
from cnnlstm_fast.spec import CODE_GROUP, CURVED, NIBBLE_WINDOW, codes_shape, raw_shape

#: The values of ``plan``; CHUNKED leaves the convolution to the library.
DIRECT, CHUNKED = 1, 2

#: Tensors of this reach, or as many places, take 64-bit offsets; 2**31 less what a last tile overhangs.
NARROW_REACH = 2**31 - 2**20

#: How many programs the sums over all places are split into, about: a function of the shapes alone,
#: because the split decides the order of summation and so the last bits.
REDUCTION_PROGRAMS = 512

# The interpreter holds bfloat16 as raw bits, which its product would take for integers.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _load_float32(pointers, ok):
    return tl.load(pointers, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _as_stored(z, map_ptr):
    """``z`` as a map of ``map_ptr``'s type holds it: statistics, winners and gradients agree on it."""
    return z.to(map_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _split_place(m, SIZE_H, SIZE_W):
    """(n, h, w) of place ``m`` in a map of SIZE_H x SIZE_W."""
    return m // (SIZE_W * SIZE_H), m // SIZE_W % SIZE_H, m % SIZE_W


@triton.jit
def _split_tap(k, KH: tl.constexpr, KW: tl.constexpr):
    """(channel, h, w) of position ``k`` in a row of the weight."""
    return k // (KH * KW), k // KW % KH, k % KW


@triton.jit
def _load_patches(
    x_ptr, n, oh, ow, inside, ci, kh, kw, k_ok, H, W, x_n, x_c, x_h, x_w,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    """x under places (n, oh, ow) of the convolution's map, one row each, zeros outside: [BM, BK]."""
    ih = (oh * SH - PH)[:, None] + (kh * DH)[None, :]
    iw = (ow * SW - PW)[:, None] + (kw * DW)[None, :]
    ok = inside[:, None] & k_ok[None, :] & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
    return tl.load(x_ptr + (n * x_n)[:, None] + (ci * x_c)[None, :] + ih * x_h + iw * x_w, mask=ok, other=0.0)


@triton.jit
def _load_code(codes_ptr, m, c, ok, CODE_GROUPS: tl.constexpr, NIBBLES: tl.constexpr):
    """Winner codes of channels ``c`` at places ``m``; masked ones name no element."""
    if NIBBLES:
        byte = tl.load(codes_ptr + m * (CODE_GROUPS * 8) + (c // 16 * 8 + c % 8), mask=ok, other=255)
        code = (byte.to(tl.int32) >> (c % 16 // 8 * 4).to(tl.int32)) & 15
    else:
        code = tl.load(codes_ptr + m * (CODE_GROUPS * 16) + c, mask=ok, other=255).to(tl.int32)
    return code


@triton.jit
def _tanh(x):
    """tanh to about 2 ulp: near zero by its series, since 1 - 2 / (exp(2x) + 1) cancels there."""
    s = x * x
    series = 0.13333333 + s * (-0.053968254 + s * (0.021869488 - s * 0.0088632355))
    near = x + x * s * (-0.33333333 + s * series)
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))
    far = tl.where(x < 0, -far, far)
    return tl.where(tl.abs(x) < 0.3, near, far)


@triton.jit
def _activate(y, ACTIVATION: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """(the activation of ``y``, its slope there if it is a curved one), as PyTorch defines them."""
    slope = y
    if ACTIVATION == 1:  # ReLU
        y = tl.where(y <= 0, 0.0, y)
    elif ACTIVATION == 2:  # Hardtanh
        y = tl.where(y < A, A, tl.where(y > B, B, y))
    elif ACTIVATION == 3:  # LeakyReLU
        slope = tl.where(y > 0, 1.0, A)
        y = tl.where(y > 0, y, y * A)
    elif ACTIVATION == 4:  # ELU
        grown = tl.exp(y)
        slope = tl.where(y > 0, 1.0, A * grown)
        # exp(y) - 1, without its cancellation
        y = tl.where(y > 0, y, A * (_tanh(0.5 * y) * (grown + 1.0)))
    elif ACTIVATION == 5:
        y = _tanh(y)
        slope = 1.0 - y * y
    elif ACTIVATION == 6:
        y = 1.0 / (1.0 + tl.exp(-y))
        slope = y * (1.0 - y)
    elif ACTIVATION == 7:  # SiLU
        share = 1.0 / (1.0 + tl.exp(-y))
        slope = share * (1.0 + y * (1.0 - share))
        y = y * share
    elif ACTIVATION == 8:  # GELU; y * 2**-0.5, exp(-y**2 / 2) / (2 pi)**0.5
        share = 0.5 * (1.0 + tl.erf(y * 0.70710678))
        slope = share + y * (0.39894228 * tl.exp(-0.5 * y * y))
        y = y * share
    elif ACTIVATION == 9:  # GELU by tanh of (2 / pi)**0.5 (y + 0.044715 y**3)
        bent = _tanh(0.79788456 * (y + 0.044715 * y * y * y))
        slope = 0.5 * (1.0 + bent) + 0.5 * y * (1.0 - bent * bent) * 0.79788456 * (1.0 + 0.134145 * y * y)
        y = 0.5 * y * (1.0 + bent)
    return y, slope


@triton.jit
def _argument(z, b_ptr, b_o, c, c_ok, COUT: tl.constexpr, HAS_BIAS: tl.constexpr, NORMED: tl.constexpr):
    """What enters the activation: ``z`` and its bias or, NORMED, scaled and shifted by the stats there."""
    if NORMED:
        scale = _load_float32(b_ptr + 2 * COUT + c, c_ok)
        z = z * scale[None, :] + _load_float32(b_ptr + 3 * COUT + c, c_ok)[None, :]
    elif HAS_BIAS:
        z += _load_float32(b_ptr + c * b_o, c_ok)[None, :]
    return z


@triton.jit
def _keep_max(
    best, code, kept, z, y, valid, e, NORMED: tl.constexpr,
    ACTIVATION: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Let element ``e`` of the windows compete for the maximum, by the activation of ``y`` where ``valid``.

    ``kept`` is of the winner: NORMED its ``z``, else the slope of a curved activation.
    """
    y, slope = _activate(y, ACTIVATION, A, B)
    wins = valid & ((y > best) | (y != y) | (code < 0))
    if NORMED:
        kept = tl.where(wins, z, kept)
    elif ACTIVATION >= 3:
        kept = tl.where(wins, slope, kept)
    return tl.where(wins, y, best), tl.where(wins, e, code), kept


@triton.jit
def _store_pooled(
    out_ptr, codes_ptr, kept_ptr, best, code, kept, m, m_ok, n, ph, pw, c0, c_end, o_n, o_c, o_h, o_w,
    ACTIVATION: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    KEEP: tl.constexpr, KEEP_WINNERS: tl.constexpr, NIBBLES: tl.constexpr, CODE_GROUPS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write a tile of pooled values, ``kept`` and packed codes; ``c0`` is a multiple of 16 with KEEP."""
    c = c0 + tl.arange(0, BN)
    place = (n * o_n + ph * o_h + pw * o_w)[:, None] + (c * o_c)[None, :]
    ok = m_ok[:, None] & (c < c_end)[None, :]
    tl.store(out_ptr + place, best.to(out_ptr.dtype.element_ty), mask=ok)
    if KEEP_WINNERS:
        tl.store(kept_ptr + place, kept.to(kept_ptr.dtype.element_ty), mask=ok)
    if KEEP:
        nothing = code < 0
        if ACTIVATION == 1:
            nothing = nothing | (best <= 0)
        elif ACTIVATION == 2:
            nothing = nothing | (best <= ACT_A) | (best >= ACT_B)
        code = tl.where(nothing, 255, code)
        if NIBBLES:
            halves = tl.permute(tl.reshape(code & 15, (BM, BN // 16, 2, 8)), (0, 1, 3, 2))
            low, high = tl.split(halves)
            packed = tl.reshape(low | (high << 4), (BM, BN // 2))
            b = c0 // 2 + tl.arange(0, BN // 2)
            b_end = (c_end + 15) // 16 * 8
            row = CODE_GROUPS * 8
        else:
            packed = code
            b = c
            b_end = (c_end + 15) // 16 * 16
            row = CODE_GROUPS * 16
        tl.store(
            codes_ptr + (m * row)[:, None] + b[None, :],
            packed.to(tl.uint8),
            mask=m_ok[:, None] & (b < b_end)[None, :],
        )


@triton.jit
def _window_over(
    o, candidate, SIZE, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr
):
    """A pool window that may hold place ``o`` of one axis: (window, element there, whether it does).

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
def _conv_grad(
    grad_ptr, codes_ptr, n, oh, ow, inside, c, c_ok, PH, PW, g_n, g_c, g_h, g_w,
    POOL_KH: tl.constexpr, POOL_KW: tl.constexpr, POOL_SH: tl.constexpr, POOL_SW: tl.constexpr,
    POOL_PH: tl.constexpr, POOL_PW: tl.constexpr, POOL_DH: tl.constexpr, POOL_DW: tl.constexpr,
    CODE_GROUPS: tl.constexpr, NIBBLES: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dconv at places (n, oh, ow) of the convolution's map for channels ``c``, in float32: [BM, BC]."""
    CANDIDATES_H: tl.constexpr = (POOL_KH + POOL_SH - 1) // POOL_SH if POOL_DH == 1 else POOL_KH
    CANDIDATES_W: tl.constexpr = (POOL_KW + POOL_SW - 1) // POOL_SW if POOL_DW == 1 else POOL_KW
    total = tl.full((BM, BC), 0.0, tl.float32)
    for candidate in range(CANDIDATES_H * CANDIDATES_W):
        ph, i, h_ok = _window_over(oh, candidate // CANDIDATES_W, PH, POOL_KH, POOL_SH, POOL_PH, POOL_DH)
        pw, j, w_ok = _window_over(ow, candidate % CANDIDATES_W, PW, POOL_KW, POOL_SW, POOL_PW, POOL_DW)
        ok = (inside & h_ok & w_ok)[:, None] & c_ok[None, :]
        m = (n * PH + ph) * PW + pw
        code = _load_code(codes_ptr, m[:, None], c[None, :], ok, CODE_GROUPS, NIBBLES)
        won = ok & (code == (i * POOL_KW + j)[:, None])
        place = n * g_n + ph * g_h + pw * g_w
        total += _load_float32(grad_ptr + place[:, None] + (c * g_c)[None, :], won)
    return total


@triton.jit
def _convolve(
    x_ptr, w_ptr, n, oh, ow, inside, group, c, c_ok, INNER, H, W, x_n, x_c, x_h, x_w, w_o, w_c, w_h, w_w,
    CIN_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    TF32: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr, OFFSET: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The convolution at places (n, oh, ow) for channels ``c``, from one group's input: [BM, BN]."""
    acc = tl.full((BM, BN), 0.0, tl.float32)
    for k0 in range(0, INNER, BK):
        k = (k0 + tl.arange(0, BK)).to(OFFSET)
        k_ok = k < INNER
        ci, kh, kw = _split_tap(k, KH, KW)
        patch = _load_patches(
            x_ptr, n, oh, ow, inside, group * CIN_G + ci, kh, kw, k_ok, H, W, x_n, x_c, x_h, x_w,
            SH, SW, PH, PW, DH, DW,
        )  # fmt: skip
        taps = tl.load(
            w_ptr + (ci * w_c + kh * w_h + kw * w_w)[:, None] + (c * w_o)[None, :],
            mask=k_ok[:, None] & c_ok[None, :],
            other=0.0,
        )
        if FLOAT32_PRODUCT:
            patch = patch.to(tl.float32)
            taps = taps.to(tl.float32)
        acc = tl.dot(patch, taps, acc, input_precision="tf32" if TF32 else "ieee")
    return acc


@triton.jit(do_not_specialize=["M", "INNER"])
def forward_kernel(
    x_ptr, w_ptr, b_ptr, out_ptr, codes_ptr, kept_ptr, M, INNER, H, W, OH, OW, PH, PW,
    x_n, x_c, x_h, x_w, w_o, w_c, w_h, w_w, b_o, o_n, o_c, o_h, o_w,
    COUT: tl.constexpr, CIN_G: tl.constexpr, GROUPS: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, CONV_SH: tl.constexpr, CONV_SW: tl.constexpr,
    CONV_PH: tl.constexpr, CONV_PW: tl.constexpr, CONV_DH: tl.constexpr, CONV_DW: tl.constexpr,
    POOL_KH: tl.constexpr, POOL_KW: tl.constexpr, POOL_SH: tl.constexpr, POOL_SW: tl.constexpr,
    POOL_PH: tl.constexpr, POOL_PW: tl.constexpr, POOL_DH: tl.constexpr, POOL_DW: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORMED: tl.constexpr,
    ACTIVATION: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    KEEP: tl.constexpr, KEEP_WINNERS: tl.constexpr,
    NIBBLES: tl.constexpr, CODE_GROUPS: tl.constexpr,
    TF32: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out and code of a tile of pooled outputs by channels."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    COUT_G: tl.constexpr = COUT // GROUPS
    # Codes come in groups of 16 channels that one program must own, so a tile stays within one
    # convolution group only where those groups are made of whole code groups.
    ALIGNED: tl.constexpr = GROUPS == 1 or COUT_G % 16 == 0
    TILES_G: tl.constexpr = (COUT_G + BN - 1) // BN
    TILES_N: tl.constexpr = GROUPS * TILES_G if ALIGNED else (COUT + BN - 1) // BN
    pid = tl.program_id(0).to(OFFSET)
    tile = pid % TILES_N
    if ALIGNED:
        first = tile // TILES_G
        last = first
        c0 = first * COUT_G + tile % TILES_G * BN
        c_end = first * COUT_G + COUT_G
    else:
        c0 = tile * BN
        c_end = tl.minimum(c0 * 0 + COUT, c0 + BN)
        first = c0 // COUT_G
        last = (c_end - 1) // COUT_G
    c = c0 + tl.arange(0, BN)
    c_ok = c < c_end
    m = pid // TILES_N * BM + tl.arange(0, BM)
    m_ok = m < M
    n, ph, pw = _split_place(m, PH, PW)

    best = tl.full((BM, BN), float("-inf"), tl.float32)
    code = tl.full((BM, BN), -1, tl.int32)
    kept = tl.full((BM, BN), 0.0, tl.float32)
    for e in range(POOL_KH * POOL_KW):
        oh = ph * POOL_SH - POOL_PH + e // POOL_KW * POOL_DH
        ow = pw * POOL_SW - POOL_PW + e % POOL_KW * POOL_DW
        valid = m_ok & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
        if ALIGNED:
            z = _convolve(
                x_ptr, w_ptr, n, oh, ow, valid, first, c, c_ok, INNER, H, W,
                x_n, x_c, x_h, x_w, w_o, w_c, w_h, w_w,
                CIN_G, KH, KW, CONV_SH, CONV_SW, CONV_PH, CONV_PW, CONV_DH, CONV_DW,
                TF32, FLOAT32_PRODUCT, OFFSET, BM, BN, BK,
            )  # fmt: skip
        else:
            z = tl.full((BM, BN), 0.0, tl.float32)
            for group in range(first, last + 1):
                z_group = _convolve(
                    x_ptr, w_ptr, n, oh, ow, valid, group, c, c_ok, INNER, H, W,
                    x_n, x_c, x_h, x_w, w_o, w_c, w_h, w_w,
                    CIN_G, KH, KW, CONV_SH, CONV_SW, CONV_PH, CONV_PW, CONV_DH, CONV_DW,
                    TF32, FLOAT32_PRODUCT, OFFSET, BM, BN, BK,
                )  # fmt: skip
                z = tl.where((c // COUT_G == group)[None, :], z_group, z)
        if NORMED:
            z = _as_stored(z, out_ptr)
        y = _argument(z, b_ptr, b_o, c, c_ok, COUT, HAS_BIAS, NORMED)
        best, code, kept = _keep_max(
            best, code, kept, z, y, valid[:, None], e, NORMED, ACTIVATION, ACT_A, ACT_B
        )
    _store_pooled(
        out_ptr, codes_ptr, kept_ptr, best, code, kept, m, m_ok, n, ph, pw, c0, c_end, o_n, o_c, o_h, o_w,
        ACTIVATION, ACT_A, ACT_B, KEEP, KEEP_WINNERS, NIBBLES, CODE_GROUPS, BM, BN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def finish_kernel(
    y_ptr, b_ptr, out_ptr, codes_ptr, kept_ptr, M, OH, OW, PH, PW,
    y_n, y_c, y_h, y_w, b_o, o_n, o_c, o_h, o_w,
    COUT: tl.constexpr,
    POOL_KH: tl.constexpr, POOL_KW: tl.constexpr, POOL_SH: tl.constexpr, POOL_SW: tl.constexpr,
    POOL_PH: tl.constexpr, POOL_PW: tl.constexpr, POOL_DH: tl.constexpr, POOL_DW: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORMED: tl.constexpr,
    ACTIVATION: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    KEEP: tl.constexpr, KEEP_WINNERS: tl.constexpr,
    NIBBLES: tl.constexpr, CODE_GROUPS: tl.constexpr,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out and code of a tile, from a convolution's map without bias."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    TILES_N: tl.constexpr = (COUT + BN - 1) // BN
    pid = tl.program_id(0).to(OFFSET)
    c0 = pid % TILES_N * BN
    c = c0 + tl.arange(0, BN)
    c_ok = c < COUT
    m = pid // TILES_N * BM + tl.arange(0, BM)
    m_ok = m < M
    n, ph, pw = _split_place(m, PH, PW)

    best = tl.full((BM, BN), float("-inf"), tl.float32)
    code = tl.full((BM, BN), -1, tl.int32)
    kept = tl.full((BM, BN), 0.0, tl.float32)
    for e in range(POOL_KH * POOL_KW):
        oh = ph * POOL_SH - POOL_PH + e // POOL_KW * POOL_DH
        ow = pw * POOL_SW - POOL_PW + e % POOL_KW * POOL_DW
        valid = (m_ok & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW))[:, None]
        place = n * y_n + oh * y_h + ow * y_w
        z = _load_float32(y_ptr + place[:, None] + (c * y_c)[None, :], valid & c_ok[None, :])
        y = _argument(z, b_ptr, b_o, c, c_ok, COUT, HAS_BIAS, NORMED)
        best, code, kept = _keep_max(best, code, kept, z, y, valid, e, NORMED, ACTIVATION, ACT_A, ACT_B)
    _store_pooled(
        out_ptr, codes_ptr, kept_ptr, best, code, kept, m, m_ok, n, ph, pw, c0, COUT, o_n, o_c, o_h, o_w,
        ACTIVATION, ACT_A, ACT_B, KEEP, KEEP_WINNERS, NIBBLES, CODE_GROUPS, BM, BN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "TILES_PER_SPLIT"])
def grad_bias_kernel(
    grad_ptr, codes_ptr, partial_ptr, M, PH, PW, TILES_PER_SPLIT, g_n, g_c, g_h, g_w,
    COUT: tl.constexpr, NIBBLES: tl.constexpr, CODE_GROUPS: tl.constexpr,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A split's share of dbias, to partial[split, COUT]."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    TILES_N: tl.constexpr = (COUT + BN - 1) // BN
    NOTHING: tl.constexpr = 15 if NIBBLES else 255
    pid = tl.program_id(0).to(OFFSET)
    split = pid // TILES_N
    c = pid % TILES_N * BN + tl.arange(0, BN)
    c_ok = c < COUT
    total = tl.full((BM, BN), 0.0, tl.float32)
    for t in range(TILES_PER_SPLIT):
        m = (split * TILES_PER_SPLIT + t) * BM + tl.arange(0, BM)
        n, ph, pw = _split_place(m, PH, PW)
        ok = (m < M)[:, None] & c_ok[None, :]
        code = _load_code(codes_ptr, m[:, None], c[None, :], ok, CODE_GROUPS, NIBBLES)
        place = n * g_n + ph * g_h + pw * g_w
        passed = ok & (code != NOTHING)
        total += _load_float32(grad_ptr + place[:, None] + (c * g_c)[None, :], passed)
    tl.store(partial_ptr + split * COUT + c, tl.reduce(total, 0, _add), mask=c_ok)


@triton.jit(do_not_specialize=["M", "TILES_PER_SPLIT"])
def grad_weight_kernel(
    grad_ptr, x_ptr, codes_ptr, partial_ptr, M, H, W, OH, OW, PH, PW, TILES_PER_SPLIT,
    g_n, g_c, g_h, g_w, x_n, x_c, x_h, x_w,
    COUT: tl.constexpr, CIN_G: tl.constexpr, GROUPS: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, CONV_SH: tl.constexpr, CONV_SW: tl.constexpr,
    CONV_PH: tl.constexpr, CONV_PW: tl.constexpr, CONV_DH: tl.constexpr, CONV_DW: tl.constexpr,
    POOL_KH: tl.constexpr, POOL_KW: tl.constexpr, POOL_SH: tl.constexpr, POOL_SW: tl.constexpr,
    POOL_PH: tl.constexpr, POOL_PW: tl.constexpr, POOL_DH: tl.constexpr, POOL_DW: tl.constexpr,
    NIBBLES: tl.constexpr, CODE_GROUPS: tl.constexpr,
    TF32: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A split's share of dweight for BN output channels of a group by BK taps, to partial[split, COUT, K].

    Places are those of the convolution's map: a place that wins several windows enters the product
    once, with the sum of their gradients, so that infinities in x meet what they meet in PyTorch.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    COUT_G: tl.constexpr = COUT // GROUPS
    K: tl.constexpr = CIN_G * KH * KW
    TILES_K: tl.constexpr = (K + BK - 1) // BK
    TILES_G: tl.constexpr = (COUT_G + BN - 1) // BN
    pid = tl.program_id(0).to(OFFSET)
    k = pid % TILES_K * BK + tl.arange(0, BK)
    k_ok = k < K
    ci, kh, kw = _split_tap(k, KH, KW)
    pid = pid // TILES_K
    c_in_group = pid % TILES_G * BN + tl.arange(0, BN)
    c_ok = c_in_group < COUT_G
    pid = pid // TILES_G
    group = pid % GROUPS
    split = pid // GROUPS
    c = group * COUT_G + c_in_group

    acc = tl.full((BN, BK), 0.0, tl.float32)
    for t in range(TILES_PER_SPLIT):
        m = (split * TILES_PER_SPLIT + t) * BM + tl.arange(0, BM)
        m_ok = m < M
        n, oh, ow = _split_place(m, OH, OW)
        dconv = _conv_grad(
            grad_ptr, codes_ptr, n, oh, ow, m_ok, c, c_ok, PH, PW, g_n, g_c, g_h, g_w,
            POOL_KH, POOL_KW, POOL_SH, POOL_SW, POOL_PH, POOL_PW, POOL_DH, POOL_DW,
            CODE_GROUPS, NIBBLES, BM, BN,
        )  # fmt: skip
        patch = _load_patches(
            x_ptr, n, oh, ow, m_ok, group * CIN_G + ci, kh, kw, k_ok, H, W, x_n, x_c, x_h, x_w,
            CONV_SH, CONV_SW, CONV_PH, CONV_PW, CONV_DH, CONV_DW,
        )  # fmt: skip
        if FLOAT32_PRODUCT:
            patch = patch.to(tl.float32)
        else:
            dconv = dconv.to(patch.dtype)
        acc = tl.dot(tl.trans(dconv), patch, acc, input_precision="tf32" if TF32 else "ieee")
    row = split * COUT + c
    tl.store(partial_ptr + (row * K)[:, None] + k[None, :], acc, mask=c_ok[:, None] & k_ok[None, :])


@triton.jit(do_not_specialize=["M", "INNER"])
def grad_input_kernel(
    grad_ptr, w_ptr, codes_ptr, dx_ptr, M, INNER, H, W, OH, OW, PH, PW,
    g_n, g_c, g_h, g_w, w_o, w_c, w_h, w_w, d_n, d_c, d_h, d_w,
    COUT: tl.constexpr, CIN_G: tl.constexpr, GROUPS: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, CONV_SH: tl.constexpr, CONV_SW: tl.constexpr,
    CONV_PH: tl.constexpr, CONV_PW: tl.constexpr, CONV_DH: tl.constexpr, CONV_DW: tl.constexpr,
    POOL_KH: tl.constexpr, POOL_KW: tl.constexpr, POOL_SH: tl.constexpr, POOL_SW: tl.constexpr,
    POOL_PH: tl.constexpr, POOL_PW: tl.constexpr, POOL_DH: tl.constexpr, POOL_DW: tl.constexpr,
    NIBBLES: tl.constexpr, CODE_GROUPS: tl.constexpr,
    TF32: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dx of a tile of input places by input channels of one group."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    COUT_G: tl.constexpr = COUT // GROUPS
    TILES_G: tl.constexpr = (CIN_G + BN - 1) // BN
    pid = tl.program_id(0).to(OFFSET)
    ci = pid % TILES_G * BN + tl.arange(0, BN)
    ci_ok = ci < CIN_G
    pid = pid // TILES_G
    group = pid % GROUPS
    m = pid // GROUPS * BM + tl.arange(0, BM)
    m_ok = m < M
    n, ih, iw = _split_place(m, H, W)

    acc = tl.full((BM, BN), 0.0, tl.float32)
    for tap in range(KH * KW):
        kh = tap // KW
        kw = tap % KW
        from_h = ih + CONV_PH - kh * CONV_DH
        from_w = iw + CONV_PW - kw * CONV_DW
        oh = from_h // CONV_SH
        ow = from_w // CONV_SW
        inside = m_ok & (from_h >= 0) & (from_h % CONV_SH == 0) & (oh < OH)
        inside = inside & (from_w >= 0) & (from_w % CONV_SW == 0) & (ow < OW)
        for k0 in range(0, INNER, BK):
            c_in_group = k0 + tl.arange(0, BK)
            c_ok = c_in_group < INNER
            c = group * COUT_G + c_in_group
            dconv = _conv_grad(
                grad_ptr, codes_ptr, n, oh, ow, inside, c, c_ok, PH, PW, g_n, g_c, g_h, g_w,
                POOL_KH, POOL_KW, POOL_SH, POOL_SW, POOL_PH, POOL_PW, POOL_DH, POOL_DW,
                CODE_GROUPS, NIBBLES, BM, BK,
            )  # fmt: skip
            taps = tl.load(
                w_ptr + (c * w_o)[:, None] + (ci * w_c)[None, :] + (kh * w_h + kw * w_w),
                mask=c_ok[:, None] & ci_ok[None, :],
                other=0.0,
            )
            if FLOAT32_PRODUCT:
                taps = taps.to(tl.float32)
            else:
                dconv = dconv.to(taps.dtype)
            acc = tl.dot(dconv, taps, acc, input_precision="tf32" if TF32 else "ieee")
    place = n * d_n + ih * d_h + iw * d_w
    channel = (group * CIN_G + ci) * d_c
    tl.store(
        dx_ptr + place[:, None] + channel[None, :],
        acc.to(dx_ptr.dtype.element_ty),
        mask=m_ok[:, None] & ci_ok[None, :],
    )


@triton.jit(do_not_specialize=["M"])
def unpool_kernel(
    grad_ptr, codes_ptr, dconv_ptr, M, OH, OW, PH, PW, g_n, g_c, g_h, g_w, d_n, d_c, d_h, d_w,
    COUT: tl.constexpr,
    POOL_KH: tl.constexpr, POOL_KW: tl.constexpr, POOL_SH: tl.constexpr, POOL_SW: tl.constexpr,
    POOL_PH: tl.constexpr, POOL_PW: tl.constexpr, POOL_DH: tl.constexpr, POOL_DW: tl.constexpr,
    NIBBLES: tl.constexpr, CODE_GROUPS: tl.constexpr,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dconv of a tile of places of the convolution's map by channels."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    TILES_N: tl.constexpr = (COUT + BN - 1) // BN
    pid = tl.program_id(0).to(OFFSET)
    c = pid % TILES_N * BN + tl.arange(0, BN)
    c_ok = c < COUT
    m = pid // TILES_N * BM + tl.arange(0, BM)
    m_ok = m < M
    n, oh, ow = _split_place(m, OH, OW)
    dconv = _conv_grad(
        grad_ptr, codes_ptr, n, oh, ow, m_ok, c, c_ok, PH, PW, g_n, g_c, g_h, g_w,
        POOL_KH, POOL_KW, POOL_SH, POOL_SW, POOL_PH, POOL_PW, POOL_DH, POOL_DW,
        CODE_GROUPS, NIBBLES, BM, BN,
    )  # fmt: skip
    place = n * d_n + oh * d_h + ow * d_w
    tl.store(
        dconv_ptr + place[:, None] + (c * d_c)[None, :],
        dconv.to(dconv_ptr.dtype.element_ty),
        mask=m_ok[:, None] & c_ok[None, :],
    )


#: Launch options of kernels that multiply, and of those that only pass over memory. Without a limit
#: on registers the assembler spills a few for occupancy, each of its versions in other kernels.
PRODUCT = dict(num_warps=8, num_stages=1, maxnreg=128)
WIDE_PRODUCT = dict(num_warps=8, num_stages=1, maxnreg=255)
PASS = dict(num_warps=4, num_stages=1)
#: Products of other choices: of the same tile by half the warps, and of twice the height. None is lower than
#: its default, since Hopper's wide instructions, whose last bits are their own, want 64 rows.
FEW_WARPS = dict(num_warps=4, num_stages=1, maxnreg=255)


def _other_passes(places: int, channels: int, bm: int, bn: int) -> list[Choice]:
    """Choices of a pass over places by channels beside the one of ``bm`` by ``bn``."""
    return [
        Choice(triton.cdiv(places, m) * triton.cdiv(channels, n), dict(BM=m, BN=n), PASS)
        for m, n in ((64, 16), (32, 32), (16, 64))
        if (m, n) != (bm, bn) and n <= _tile(channels, 64)
    ]


def _other_products(places: int, tiles: int, bm: int) -> list[Choice]:
    """Choices of a product beside the one of ``bm`` places a program, ``tiles`` programs for each of them."""
    found = [Choice(triton.cdiv(places, bm) * tiles, dict(BM=bm), FEW_WARPS)]
    if bm == 64:
        found.append(Choice(triton.cdiv(places, 128) * tiles, dict(BM=128), WIDE_PRODUCT))
    return found


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: list[int],
    activation: int,
    act: list[float],
    pool: list[int],
    order: list[int],
    plan: int,
    keep: bool,
    run=launch,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``cnnlstm_fast::conv_block``, whose file explains the arguments.

    Returns:
        The map (N, C, PH, PW) permuted by ``order``, contiguous; its winner codes and the slopes at the
        winners, each with no element where it is not kept.

    ``run`` is what starts kernels, see :func:`cnnlstm_fast.kernels.launching.launch`.
    """
    conv_hw, size = check_block(x, weight, conv, activation, act, pool, order, plan)
    check_bias(x, weight, bias)
    batch, channels = x.shape[0], weight.shape[0]
    out = x.new_empty(raw_shape(order, batch, channels, size))
    keep_codes = keep and keeps_codes(activation, pool)
    kept = codes_shape(_window(pool), batch, channels, size) if keep_codes else [0]
    codes = x.new_empty(kept, dtype=torch.uint8)
    slopes = x.new_empty(out.shape if keep and activation >= CURVED else [0])
    if out.numel() == 0:
        return out, codes, slopes

    args = finish_args(out, codes, slopes, order, conv_hw, size, activation, act, pool) | dict(
        b_ptr=weight if bias is None else bias,
        b_o=0 if bias is None else bias.stride(0),
        HAS_BIAS=bias is not None,
        NORMED=False,
    )
    if plan == CHUNKED:
        finish(library_map(x, weight, conv), args, run)
    else:
        convolve_and_finish(x, weight, conv, args, run)
    return out, codes, slopes


def finish_args(out, codes, kept, order, conv_hw, size, activation, act, pool) -> dict:
    """The arguments of a kernel that ends in a block's result, but for those that say what it starts from.

    ``kept`` is what is kept of the winners; it and ``codes`` have no element where they are not kept.
    """
    channels = out.shape[list(order).index(1)]
    return dict(
        out_ptr=out,
        codes_ptr=codes,
        kept_ptr=kept,
        M=out.numel() // channels,
        OH=conv_hw[0],
        OW=conv_hw[1],
        PH=size[0],
        PW=size[1],
        **_strides("o", _nchw_strides(out, order)),
        COUT=channels,
        **_pool_constants(pool),
        **_code_constants(pool, channels),
        **_activation_constants(activation, act),
        KEEP=codes.numel() > 0,
        KEEP_WINNERS=kept.numel() > 0,
    )


def library_map(x: Tensor, weight: Tensor, conv) -> Tensor:
    """The convolution's map (N, C, OH, OW) as PyTorch's library computes it, without a bias."""
    return torch.ops.aten.convolution.default(
        _padded_after(x, conv), weight, None, conv[0:2], conv[2:4], conv[4:6], False, [0, 0], conv[6]
    )


def finish(y: Tensor, args: dict, run) -> None:
    """From a convolution's map (N, C, OH, OW) of any strides to what ``args`` (:func:`finish_args`) name."""
    places, channels = args["M"], args["COUT"]
    args = args | dict(
        y_ptr=y,
        **_strides("y", y.stride()),
        WIDE=_wide(places, y, args["out_ptr"], args["codes_ptr"]),
        BM=32,
        BN=32,
    )
    programs = triton.cdiv(places, 32) * triton.cdiv(channels, 32)
    run(finish_kernel, programs, args, PASS, _other_passes(places, channels, 32, 32))


def convolve_and_finish(x: Tensor, weight: Tensor, conv, args: dict, run) -> None:
    """The whole block by one kernel; ``args`` are those of :func:`finish_args`."""
    places, channels = args["M"], args["COUT"]
    groups = conv[6]
    group_channels = channels // groups
    whole_code_groups = groups == 1 or group_channels % CODE_GROUP == 0
    product = _product_args(x, weight, conv)
    # What a norm's training keeps of the winners takes registers: half the height.
    bm = 32 if args["NORMED"] and args["KEEP_WINNERS"] else 64
    bn = _product_width(x, group_channels, product) if whole_code_groups else CODE_GROUP
    tiles = groups * triton.cdiv(group_channels, bn) if whole_code_groups else triton.cdiv(channels, bn)
    wide = _wide(places, x, weight, args["out_ptr"], args["codes_ptr"])
    args = args | product | dict(WIDE=wide, BM=bm, BN=bn)
    curved = args["KEEP_WINNERS"] and args["ACTIVATION"] >= CURVED
    options = WIDE_PRODUCT if wide or curved else PRODUCT
    others = _other_products(places, tiles, bm)
    run(forward_kernel, triton.cdiv(places, bm) * tiles, args, options, others)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    conv: list[int],
    activation: int,
    act: list[float],
    pool: list[int],
    order: list[int],
    plan: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    run=launch,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``cnnlstm_fast::conv_block_backward``, whose file explains the arguments.

    Returns:
        The contiguous gradients of x, weight and bias; no element where one is not needed.

    ``run`` is what starts kernels, see :func:`cnnlstm_fast.kernels.launching.launch`.
    """
    conv_hw, size = check_block(x, weight, conv, activation, act, pool, order, plan)
    check_block_backward(grad, x, weight, codes, activation, pool, order, size)
    needs = [need_x, need_weight, need_bias]
    shapes = [list(x.shape), list(weight.shape), [weight.shape[0]]]
    if grad.numel() == 0:
        dx, dweight, dbias = (
            x.new_zeros(shape if need else [0]) for shape, need in zip(shapes, needs, strict=True)
        )
        return dx, dweight, dbias
    if not keeps_codes(activation, pool):
        dconv = grad.permute([order.index(axis) for axis in range(4)])
        return _library_backward(dconv, x, weight, conv, needs)

    channels = weight.shape[0]
    args = dict(
        grad_ptr=grad,
        codes_ptr=codes,
        PH=size[0],
        PW=size[1],
        **_strides("g", _nchw_strides(grad, order)),
        COUT=channels,
        **_code_constants(pool, channels),
    )
    args_over_map = args | dict(OH=conv_hw[0], OW=conv_hw[1], **_pool_constants(pool))
    if plan == CHUNKED and (need_x or need_weight):
        dconv = _unpool(grad, x, codes, channels, conv_hw, args_over_map, run)
        return _library_backward(dconv, x, weight, conv, needs)

    args_of_product = args_over_map | dict(
        H=x.shape[2], W=x.shape[3], **_conv_constants(weight, conv), **_product_constants(x)
    )
    places = x.shape[0] * size[0] * size[1]
    dx, dweight, dbias = (x.new_empty(0) for _ in needs)
    if need_x:
        dx = _grad_input(grad, x, weight, codes, conv[6], args_of_product, run)
    if need_weight:
        dweight = _grad_weight(grad, x, weight, codes, conv[6], conv_hw, args_of_product, run)
    if need_bias:
        dbias = _grad_bias(grad, weight, codes, places, args, run)
    return dx, dweight, dbias


def _grad_input(grad, x, weight, codes, groups, args, run) -> Tensor:
    dx = x.new_empty(x.shape)
    group_channels = weight.shape[1]
    bm, bn, bk = 64, _tile(group_channels, 64), 16
    places = x.shape[0] * x.shape[2] * x.shape[3]
    args = args | dict(
        w_ptr=weight,
        dx_ptr=dx,
        M=places,
        INNER=weight.shape[0] // groups,
        **_strides("w", weight.stride(), "ochw"),
        **_strides("d", dx.stride()),
        WIDE=_wide(places, grad, weight, codes, dx),
        BM=bm,
        BN=bn,
        BK=bk,
    )
    tiles = groups * triton.cdiv(group_channels, bn)
    others = _other_products(places, tiles, bm)
    run(grad_input_kernel, triton.cdiv(places, bm) * tiles, args, PRODUCT, others)
    return dx


def _grad_weight(grad, x, weight, codes, groups, conv_hw, args, run) -> Tensor:
    places = x.shape[0] * conv_hw[0] * conv_hw[1]
    taps = math.prod(weight.shape[1:])
    group_channels = weight.shape[0] // groups
    bm, bn, bk = 32, _tile(group_channels, 64), _tile(taps, 32)
    tiles = groups * triton.cdiv(group_channels, bn) * triton.cdiv(taps, bk)
    splits, tiles_per_split = _splits(triton.cdiv(places, bm), tiles)
    partial = weight.new_empty([splits, *weight.shape], dtype=torch.float32)
    args = args | dict(
        x_ptr=x,
        partial_ptr=partial,
        M=places,
        TILES_PER_SPLIT=tiles_per_split,
        **_strides("x", x.stride()),
        WIDE=_wide(places, grad, x, codes, partial),
        BM=bm,
        BN=bn,
        BK=bk,
    )
    run(grad_weight_kernel, splits * tiles, args, PRODUCT, [Choice(splits * tiles, {}, FEW_WARPS)])
    return partial.sum(0).to(weight.dtype)


def _grad_bias(grad, weight, codes, places, args, run) -> Tensor:
    channels = weight.shape[0]
    tiles = triton.cdiv(channels, 16)
    splits, tiles_per_split = _splits(triton.cdiv(places, 64), tiles)
    partial = weight.new_empty([splits, channels], dtype=torch.float32)
    args = args | dict(
        partial_ptr=partial,
        M=places,
        TILES_PER_SPLIT=tiles_per_split,
        WIDE=_wide(places, grad, codes),
        BM=64,
        BN=16,
    )
    run(grad_bias_kernel, splits * tiles, args, PASS)
    return partial.sum(0).to(weight.dtype)


def _unpool(grad, x, codes, channels, conv_hw, args, run) -> Tensor:
    dconv = x.new_empty([x.shape[0], channels, *conv_hw])
    places = x.shape[0] * conv_hw[0] * conv_hw[1]
    args = args | dict(
        dconv_ptr=dconv,
        M=places,
        **_strides("d", dconv.stride()),
        WIDE=_wide(places, grad, codes, dconv),
        BM=64,
        BN=16,
    )
    programs = triton.cdiv(places, 64) * triton.cdiv(channels, 16)
    run(unpool_kernel, programs, args, PASS, _other_passes(places, channels, 64, 16))
    return dconv


def _library_backward(dconv, x, weight, conv, needs) -> tuple[Tensor, Tensor, Tensor]:
    padded = _padded_after(x, conv)
    dx, *others = torch.ops.aten.convolution_backward.default(
        dconv,
        padded,
        weight,
        [weight.shape[0]],
        conv[0:2],
        conv[2:4],
        conv[4:6],
        False,
        [0, 0],
        conv[6],
        needs,
    )
    if padded is not x and needs[0]:
        dx = dx.narrow(2, 0, x.shape[2]).narrow(3, 0, x.shape[3])
    grads = zip((dx, *others), needs, strict=True)
    return tuple(g.contiguous() if need else x.new_empty(0) for g, need in grads)


def _padded_after(x: Tensor, conv) -> Tensor:
    """x with the zeros after its last row and column for which the library has no argument."""
    return torch.nn.functional.pad(x, (0, conv[8], 0, conv[7])) if len(conv) > 7 else x


def _window(pool) -> int:
    return pool[0] * pool[1] if pool else 1


def _tile(size: int, largest: int) -> int:
    """The power of two from 16 to ``largest`` that covers ``size`` best."""
    return min(max(triton.next_power_of_2(size), 16), largest)


def _splits(m_tiles: int, tiles: int) -> tuple[int, int]:
    """How many parts the sum over ``m_tiles`` is done in beside ``tiles`` results, and tiles per part."""
    per_split = triton.cdiv(m_tiles, max(1, min(m_tiles, REDUCTION_PROGRAMS // tiles)))
    return triton.cdiv(m_tiles, per_split), per_split


def _strides(prefix: str, strides, axes: str = "nchw") -> dict:
    return {f"{prefix}_{axis}": stride for axis, stride in zip(axes, strides, strict=True)}


def _nchw_strides(t: Tensor, order) -> list[int]:
    """Strides along N, C, H, W of a tensor whose dimensions are those axes in ``order``."""
    return [t.stride(list(order).index(axis)) for axis in range(4)]


def _wide(places: int, *tensors: Tensor) -> bool:
    return places >= NARROW_REACH or any(
        sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) >= NARROW_REACH
        for t in tensors
    )


def _conv_constants(weight: Tensor, conv) -> dict:
    names = ("CONV_SH", "CONV_SW", "CONV_PH", "CONV_PW", "CONV_DH", "CONV_DW", "GROUPS")
    return dict(
        CIN_G=weight.shape[1],
        KH=weight.shape[2],
        KW=weight.shape[3],
        **dict(zip(names, conv[:7], strict=True)),
    )


def _pool_constants(pool) -> dict:
    names = ("POOL_KH", "POOL_KW", "POOL_SH", "POOL_SW", "POOL_PH", "POOL_PW", "POOL_DH", "POOL_DW")
    return dict(zip(names, pool[:8] if pool else (1, 1, 1, 1, 0, 0, 1, 1), strict=True))


def _code_constants(pool, channels: int) -> dict:
    return dict(NIBBLES=_window(pool) <= NIBBLE_WINDOW, CODE_GROUPS=triton.cdiv(channels, CODE_GROUP))


def _activation_constants(activation: int, act) -> dict:
    return dict(ACTIVATION=activation, ACT_A=act[0] if act else 0.0, ACT_B=act[1] if len(act) > 1 else 0.0)


def _product_args(x: Tensor, weight: Tensor, conv) -> dict:
    """What `_convolve` needs of its caller, but for the tile."""
    taps = math.prod(weight.shape[1:])
    return dict(
        x_ptr=x,
        w_ptr=weight,
        INNER=taps,
        H=x.shape[2],
        W=x.shape[3],
        **_strides("x", x.stride()),
        **_strides("w", weight.stride(), "ochw"),
        **_conv_constants(weight, conv),
        **_product_constants(x),
        BK=_tile(taps, 64 // x.element_size()),
    )


def _product_width(x: Tensor, group_channels: int, product: dict) -> int:
    """Channels of a tile of products that `_convolve` computes."""
    # A float32 product without tensor cores needs registers for its operands: half the width.
    widest = 32 if x.dtype == torch.float32 and not product["TF32"] else 64
    return _tile(group_channels, widest)


def _product_constants(x: Tensor) -> dict:
    """TF32 where PyTorch's own flags allow a convolution to use it."""
    cudnn: Any = torch.backends.cudnn
    allowed = cudnn.conv.fp32_precision == "tf32"
    return dict(TF32=allowed and x.dtype == torch.float32, FLOAT32_PRODUCT=INTERPRETED)
