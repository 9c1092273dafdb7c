"""The kernels of :mod:`cnnlstm_fast.kernels.conv_block`, which gives their formulas and starts them.

POOL_* are 1, 1, 1, 1, 0, 0, 1, 1 without a pool: every window then has one element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cnnlstm_fast.kernels.common import (
    activate,
    add,
    convolve,
    group_channels,
    load_codes,
    load_float32,
    load_patches,
    max_unpool,
    round_to_type_of,
    split_position,
    split_tap,
    tile_positions,
)

# ---------------------------------------------------------------- forward


@triton.jit
def _convolve_groups(
    x_ptr, w_ptr, n, oh, ow, inside, first_group, last_group, c, c_ok, INNER, H, W,
    x_n, x_c, x_h, x_w, w_o, w_c, w_h, w_w,
    CIN_G: tl.constexpr, COUT_G: tl.constexpr, ONE_GROUP: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TF32: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr, OFFSET: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """As :func:`convolve`, for channels ``c`` that belong to groups ``first_group`` to ``last_group``."""
    if ONE_GROUP:
        z = convolve(
            x_ptr, w_ptr, n, oh, ow, inside, first_group, c, c_ok, INNER, H, W,
            x_n, x_c, x_h, x_w, w_o, w_c, w_h, w_w,
            CIN_G, KH, KW, SH, SW, PH, PW, DH, DW, TF32, FLOAT32_PRODUCT, OFFSET, BM, BN, BK,
        )  # fmt: skip
    else:
        z = tl.full((BM, BN), 0.0, tl.float32)
        for group in range(first_group, last_group + 1):
            z_group = convolve(
                x_ptr, w_ptr, n, oh, ow, inside, group, c, c_ok, INNER, H, W,
                x_n, x_c, x_h, x_w, w_o, w_c, w_h, w_w,
                CIN_G, KH, KW, SH, SW, PH, PW, DH, DW, TF32, FLOAT32_PRODUCT, OFFSET, BM, BN, BK,
            )  # fmt: skip
            z = tl.where((c // COUT_G == group)[None, :], z_group, z)
    return z


@triton.jit
def _no_maximum(BM: tl.constexpr, BN: tl.constexpr):
    """(maximum, argmax, what is kept of it) of windows without an element, each [BM, BN]."""
    best = tl.full((BM, BN), float("-inf"), tl.float32)
    code = tl.full((BM, BN), -1, tl.int32)
    kept = tl.full((BM, BN), 0.0, tl.float32)
    return best, code, kept


@triton.jit
def _window_element(
    e, ph, pw, m_ok, OH, OW,
    POOL_KW: tl.constexpr, POOL_SH: tl.constexpr, POOL_SW: tl.constexpr,
    POOL_PH: tl.constexpr, POOL_PW: tl.constexpr, POOL_DH: tl.constexpr, POOL_DW: tl.constexpr,
):  # fmt: skip
    """Element ``e`` of windows (ph, pw): (its row, its column, whether the convolution's output has it)."""
    oh = ph * POOL_SH - POOL_PH + e // POOL_KW * POOL_DH
    ow = pw * POOL_SW - POOL_PW + e % POOL_KW * POOL_DW
    return oh, ow, m_ok & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)


@triton.jit
def _activation_argument(
    z, b_ptr, b_o, c, c_ok, COUT: tl.constexpr, HAS_BIAS: tl.constexpr, NORMED: tl.constexpr
):
    """``z`` and its bias; with NORMED, z times scale plus shift of the statistics (4, COUT) at ``b_ptr``."""
    if NORMED:
        scale = load_float32(b_ptr + 2 * COUT + c, c_ok)
        z = z * scale[None, :] + load_float32(b_ptr + 3 * COUT + c, c_ok)[None, :]
    elif HAS_BIAS:
        z += load_float32(b_ptr + c * b_o, c_ok)[None, :]
    return z


@triton.jit
def _update_maximum(
    best, code, kept, z, y, valid, e, NORMED: tl.constexpr,
    ACTIVATION: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """(maximum, argmax, kept) after element ``e`` of the windows, whose value is the activation of ``y``.

    A NaN always is the maximum, as in PyTorch. ``kept`` is ``z`` at the argmax with NORMED, and otherwise the
    slope of a curved activation there.
    """
    y, slope = activate(y, ACTIVATION, A, B)
    is_max = valid & ((y > best) | (y != y) | (code < 0))
    if NORMED:
        kept = tl.where(is_max, z, kept)
    elif ACTIVATION >= 3:
        kept = tl.where(is_max, slope, kept)
    return tl.where(is_max, y, best), tl.where(is_max, e, code), kept


@triton.jit
def _store_pooled(
    out_ptr, codes_ptr, kept_ptr, best, code, kept, m, m_ok, n, ph, pw, c0, c_end, o_n, o_c, o_h, o_w,
    ACTIVATION: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    KEEP_CODES: tl.constexpr, KEEP_AT_ARGMAX: tl.constexpr, NIBBLES: tl.constexpr, CODE_GROUPS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store a tile's maxima, ``kept`` and packed codes; ``c0`` is a multiple of 16 with KEEP_CODES."""
    c = c0 + tl.arange(0, BN)
    offset = (n * o_n + ph * o_h + pw * o_w)[:, None] + (c * o_c)[None, :]
    ok = m_ok[:, None] & (c < c_end)[None, :]
    tl.store(out_ptr + offset, best.to(out_ptr.dtype.element_ty), mask=ok)
    if KEEP_AT_ARGMAX:
        tl.store(kept_ptr + offset, kept.to(kept_ptr.dtype.element_ty), mask=ok)
    if KEEP_CODES:
        no_gradient = code < 0
        if ACTIVATION == 1:
            no_gradient = no_gradient | (best <= 0)
        elif ACTIVATION == 2:
            no_gradient = no_gradient | (best <= ACT_A) | (best >= ACT_B)
        code = tl.where(no_gradient, 255, code)
        if NIBBLES:  # channels 0 to 7 of a group are the low halves of its 8 bytes, 8 to 15 the high ones
            halves = tl.permute(tl.reshape(code & 15, (BM, BN // 16, 2, 8)), (0, 1, 3, 2))
            low, high = tl.split(halves)  # [BM, BN / 16, 8]
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
    KEEP_CODES: tl.constexpr, KEEP_AT_ARGMAX: tl.constexpr,
    NIBBLES: tl.constexpr, CODE_GROUPS: tl.constexpr,
    TF32: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The block's result and argmax codes, from x: a tile of positions of the result by channels."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    COUT_G: tl.constexpr = COUT // GROUPS
    # Codes come in groups of 16 channels that one program must own, so a tile stays within one
    # convolution group only where those groups are made of whole code groups.
    ONE_GROUP: tl.constexpr = GROUPS == 1 or COUT_G % 16 == 0
    TILES_G: tl.constexpr = (COUT_G + BN - 1) // BN
    TILES_N: tl.constexpr = GROUPS * TILES_G if ONE_GROUP else (COUT + BN - 1) // BN
    pid = tl.program_id(0).to(OFFSET)
    tile = pid % TILES_N
    if ONE_GROUP:
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
    m, m_ok, n, ph, pw = tile_positions(pid // TILES_N, M, PH, PW, BM)

    best, code, kept = _no_maximum(BM, BN)
    for e in range(POOL_KH * POOL_KW):
        oh, ow, valid = _window_element(
            e, ph, pw, m_ok, OH, OW, POOL_KW, POOL_SH, POOL_SW, POOL_PH, POOL_PW, POOL_DH, POOL_DW
        )
        z = _convolve_groups(
            x_ptr, w_ptr, n, oh, ow, valid, first, last, c, c_ok, INNER, H, W,
            x_n, x_c, x_h, x_w, w_o, w_c, w_h, w_w, CIN_G, COUT_G, ONE_GROUP,
            KH, KW, CONV_SH, CONV_SW, CONV_PH, CONV_PW, CONV_DH, CONV_DW,
            TF32, FLOAT32_PRODUCT, OFFSET, BM, BN, BK,
        )  # fmt: skip
        if NORMED:
            z = round_to_type_of(z, out_ptr)
        y = _activation_argument(z, b_ptr, b_o, c, c_ok, COUT, HAS_BIAS, NORMED)
        best, code, kept = _update_maximum(
            best, code, kept, z, y, valid[:, None], e, NORMED, ACTIVATION, ACT_A, ACT_B
        )
    _store_pooled(
        out_ptr, codes_ptr, kept_ptr, best, code, kept, m, m_ok, n, ph, pw, c0, c_end, o_n, o_c, o_h, o_w,
        ACTIVATION, ACT_A, ACT_B, KEEP_CODES, KEEP_AT_ARGMAX, NIBBLES, CODE_GROUPS, BM, BN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def epilogue_kernel(
    y_ptr, b_ptr, out_ptr, codes_ptr, kept_ptr, M, OH, OW, PH, PW,
    y_n, y_c, y_h, y_w, b_o, o_n, o_c, o_h, o_w,
    COUT: tl.constexpr,
    POOL_KH: tl.constexpr, POOL_KW: tl.constexpr, POOL_SH: tl.constexpr, POOL_SW: tl.constexpr,
    POOL_PH: tl.constexpr, POOL_PW: tl.constexpr, POOL_DH: tl.constexpr, POOL_DW: tl.constexpr,
    HAS_BIAS: tl.constexpr, NORMED: tl.constexpr,
    ACTIVATION: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    KEEP_CODES: tl.constexpr, KEEP_AT_ARGMAX: tl.constexpr,
    NIBBLES: tl.constexpr, CODE_GROUPS: tl.constexpr,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The block's result and argmax codes of a tile, from a convolution's output without a bias."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    TILES_N: tl.constexpr = (COUT + BN - 1) // BN
    pid = tl.program_id(0).to(OFFSET)
    c0 = pid % TILES_N * BN
    c = c0 + tl.arange(0, BN)
    c_ok = c < COUT
    m, m_ok, n, ph, pw = tile_positions(pid // TILES_N, M, PH, PW, BM)

    best, code, kept = _no_maximum(BM, BN)
    for e in range(POOL_KH * POOL_KW):
        oh, ow, valid = _window_element(
            e, ph, pw, m_ok, OH, OW, POOL_KW, POOL_SH, POOL_SW, POOL_PH, POOL_PW, POOL_DH, POOL_DW
        )
        valid = valid[:, None]
        offset = n * y_n + oh * y_h + ow * y_w
        z = load_float32(y_ptr + offset[:, None] + (c * y_c)[None, :], valid & c_ok[None, :])
        y = _activation_argument(z, b_ptr, b_o, c, c_ok, COUT, HAS_BIAS, NORMED)
        best, code, kept = _update_maximum(best, code, kept, z, y, valid, e, NORMED, ACTIVATION, ACT_A, ACT_B)
    _store_pooled(
        out_ptr, codes_ptr, kept_ptr, best, code, kept, m, m_ok, n, ph, pw, c0, COUT, o_n, o_c, o_h, o_w,
        ACTIVATION, ACT_A, ACT_B, KEEP_CODES, KEEP_AT_ARGMAX, NIBBLES, CODE_GROUPS, BM, BN,
    )  # fmt: skip


# ---------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["M", "TILES_PER_SPLIT"])
def grad_bias_kernel(
    grad_ptr, codes_ptr, partial_ptr, M, PH, PW, TILES_PER_SPLIT, g_n, g_c, g_h, g_w,
    COUT: tl.constexpr, NIBBLES: tl.constexpr, CODE_GROUPS: tl.constexpr,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A split's share of dbias, to partial[split, COUT]."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    TILES_N: tl.constexpr = (COUT + BN - 1) // BN
    NO_ELEMENT: tl.constexpr = 15 if NIBBLES else 255
    pid = tl.program_id(0).to(OFFSET)
    split = pid // TILES_N
    c = pid % TILES_N * BN + tl.arange(0, BN)
    c_ok = c < COUT
    total = tl.full((BM, BN), 0.0, tl.float32)
    for t in range(TILES_PER_SPLIT):
        m = (split * TILES_PER_SPLIT + t) * BM + tl.arange(0, BM)
        n, ph, pw = split_position(m, PH, PW)
        ok = (m < M)[:, None] & c_ok[None, :]
        code = load_codes(codes_ptr, m[:, None], c[None, :], ok, CODE_GROUPS, NIBBLES)
        offset = n * g_n + ph * g_h + pw * g_w
        passed = ok & (code != NO_ELEMENT)
        total += load_float32(grad_ptr + offset[:, None] + (c * g_c)[None, :], passed)
    tl.store(partial_ptr + split * COUT + c, tl.reduce(total, 0, add), mask=c_ok)


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

    Positions are those of the convolution's output. One that is the argmax of several windows enters the
    product once, with the sum of their gradients, so that infinities in x meet what they meet in PyTorch.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    COUT_G: tl.constexpr = COUT // GROUPS
    K: tl.constexpr = CIN_G * KH * KW
    TILES_K: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0).to(OFFSET)
    k = pid % TILES_K * BK + tl.arange(0, BK)
    k_ok = k < K
    ci, kh, kw = split_tap(k, KH, KW)
    c_in_group, c_ok, group, split = group_channels(pid // TILES_K, COUT_G, GROUPS, BN)
    c = group * COUT_G + c_in_group

    acc = tl.full((BN, BK), 0.0, tl.float32)
    for t in range(TILES_PER_SPLIT):
        _, m_ok, n, oh, ow = tile_positions(split * TILES_PER_SPLIT + t, M, OH, OW, BM)
        dconv = max_unpool(  # [BM, BN]
            grad_ptr, codes_ptr, n, oh, ow, m_ok, c, c_ok, PH, PW, g_n, g_c, g_h, g_w,
            POOL_KH, POOL_KW, POOL_SH, POOL_SW, POOL_PH, POOL_PW, POOL_DH, POOL_DW,
            CODE_GROUPS, NIBBLES, BM, BN,
        )  # fmt: skip
        patch = load_patches(  # [BM, BK]
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
    """dx of a tile of positions of x by input channels of one group: a transposed convolution."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    COUT_G: tl.constexpr = COUT // GROUPS
    pid = tl.program_id(0).to(OFFSET)
    ci, ci_ok, group, pid_m = group_channels(pid, CIN_G, GROUPS, BN)
    _, m_ok, n, ih, iw = tile_positions(pid_m, M, H, W, BM)

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
            dconv = max_unpool(  # [BM, BK]
                grad_ptr, codes_ptr, n, oh, ow, inside, c, c_ok, PH, PW, g_n, g_c, g_h, g_w,
                POOL_KH, POOL_KW, POOL_SH, POOL_SW, POOL_PH, POOL_PW, POOL_DH, POOL_DW,
                CODE_GROUPS, NIBBLES, BM, BK,
            )  # fmt: skip
            taps = tl.load(  # [BK, BN]
                w_ptr + (c * w_o)[:, None] + (ci * w_c)[None, :] + (kh * w_h + kw * w_w),
                mask=c_ok[:, None] & ci_ok[None, :],
                other=0.0,
            )
            if FLOAT32_PRODUCT:
                taps = taps.to(tl.float32)
            else:
                dconv = dconv.to(taps.dtype)
            acc = tl.dot(dconv, taps, acc, input_precision="tf32" if TF32 else "ieee")
    offset = n * d_n + ih * d_h + iw * d_w
    channel = (group * CIN_G + ci) * d_c
    tl.store(
        dx_ptr + offset[:, None] + channel[None, :],
        acc.to(dx_ptr.dtype.element_ty),
        mask=m_ok[:, None] & ci_ok[None, :],
    )


@triton.jit(do_not_specialize=["M"])
def max_unpool_kernel(
    grad_ptr, codes_ptr, dconv_ptr, M, OH, OW, PH, PW, g_n, g_c, g_h, g_w, d_n, d_c, d_h, d_w,
    COUT: tl.constexpr,
    POOL_KH: tl.constexpr, POOL_KW: tl.constexpr, POOL_SH: tl.constexpr, POOL_SW: tl.constexpr,
    POOL_PH: tl.constexpr, POOL_PW: tl.constexpr, POOL_DH: tl.constexpr, POOL_DW: tl.constexpr,
    NIBBLES: tl.constexpr, CODE_GROUPS: tl.constexpr,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dconv of a tile of positions of the convolution's output by channels."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    TILES_N: tl.constexpr = (COUT + BN - 1) // BN
    pid = tl.program_id(0).to(OFFSET)
    c = pid % TILES_N * BN + tl.arange(0, BN)
    c_ok = c < COUT
    _, m_ok, n, oh, ow = tile_positions(pid // TILES_N, M, OH, OW, BM)
    dconv = max_unpool(
        grad_ptr, codes_ptr, n, oh, ow, m_ok, c, c_ok, PH, PW, g_n, g_c, g_h, g_w,
        POOL_KH, POOL_KW, POOL_SH, POOL_SW, POOL_PH, POOL_PW, POOL_DH, POOL_DW,
        CODE_GROUPS, NIBBLES, BM, BN,
    )  # fmt: skip
    offset = n * d_n + oh * d_h + ow * d_w
    tl.store(
        dconv_ptr + offset[:, None] + (c * d_c)[None, :],
        dconv.to(dconv_ptr.dtype.element_ty),
        mask=m_ok[:, None] & c_ok[None, :],
    )
