"""The kernels of :mod:`cnnlstm_fast.kernels.conv_norm`, which gives their formulas and starts them.

Rows of the statistics (4, COUT), float64: the mean without the convolution's bias, the biased variance, and
the scale and shift that the norm multiplies by and adds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cnnlstm_fast.kernels.common import (
    add,
    convolve,
    group_channels,
    load_float32,
    load_float64,
    max_unpool,
    multiply_slope,
    round_to_type_of,
    split_position,
    tile_positions,
)


@triton.jit
def _scale_and_shift(
    mean,
    var,
    gamma_ptr,
    beta_ptr,
    c,
    c_ok,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    EPS: tl.constexpr,
):
    """What a norm multiplies by and adds, per channel in float64."""
    scale = 1.0 / tl.sqrt(var + EPS)
    if HAS_GAMMA:
        scale *= load_float64(gamma_ptr + c, c_ok, 1.0)
    shift = -mean * scale
    if HAS_BETA:
        shift += load_float64(beta_ptr + c, c_ok, 0.0)
    return scale, shift


@triton.jit
def _given_statistics(mean_ptr, var_ptr, bias_ptr, c, c_ok, HAS_BIAS: tl.constexpr):
    """(mean without the convolution's bias, variance) per channel in float64."""
    mean = load_float64(mean_ptr + c, c_ok, 0.0)
    var = load_float64(var_ptr + c, c_ok, 1.0)
    if HAS_BIAS:
        mean -= load_float64(bias_ptr + c, c_ok, 0.0)
    return mean, var


@triton.jit
def fold_kernel(
    w_ptr, bias_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, to_ptr, to_bias_ptr, K,
    COUT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr,
    EPS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Weights (COUT, K) times the scale of their channel; the first programs of a row write the biases."""
    TILES_N: tl.constexpr = (COUT + BN - 1) // BN
    pid = tl.program_id(0)
    c = pid % TILES_N * BN + tl.arange(0, BN)
    c_ok = c < COUT
    k = pid // TILES_N * BK + tl.arange(0, BK)
    mean, var = _given_statistics(mean_ptr, var_ptr, bias_ptr, c, c_ok, HAS_BIAS)
    scale, shift = _scale_and_shift(mean, var, gamma_ptr, beta_ptr, c, c_ok, HAS_GAMMA, HAS_BETA, EPS)
    offset = c.to(tl.int64)[:, None] * K + k[None, :]  # [BN, BK]
    ok = c_ok[:, None] & (k < K)[None, :]
    weight = load_float64(w_ptr + offset, ok, 0.0) * scale[:, None]
    # by float32, as the CPU rounds
    tl.store(to_ptr + offset, weight.to(tl.float32).to(to_ptr.dtype.element_ty), mask=ok)
    shift = shift.to(tl.float32).to(to_bias_ptr.dtype.element_ty)
    tl.store(to_bias_ptr + c, shift, mask=c_ok & (pid // TILES_N == 0))


# ---------------------------------------------------------------- forward


@triton.jit
def _load_z(
    x_ptr, w_ptr, type_ptr, n, oh, ow, m_ok, group, c, c_ok, INNER, H, W,
    x_n, x_c, x_h, x_w, w_o, w_c, w_h, w_w,
    CIN_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, CONV_SH: tl.constexpr, CONV_SW: tl.constexpr,
    CONV_PH: tl.constexpr, CONV_PW: tl.constexpr, CONV_DH: tl.constexpr, CONV_DW: tl.constexpr,
    CONVOLVES: tl.constexpr, TF32: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr, OFFSET: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """z at output positions (n, oh, ow) for channels ``c``, in float32: [BM, BN].

    With CONVOLVES it is computed from x and rounded to the type of ``type_ptr``. Otherwise ``x`` is z.
    """
    if CONVOLVES:
        z = convolve(
            x_ptr, w_ptr, n, oh, ow, m_ok, group, c, c_ok, INNER, H, W,
            x_n, x_c, x_h, x_w, w_o, w_c, w_h, w_w,
            CIN_G, KH, KW, CONV_SH, CONV_SW, CONV_PH, CONV_PW, CONV_DH, CONV_DW,
            TF32, FLOAT32_PRODUCT, OFFSET, BM, BN, BK,
        )  # fmt: skip
        z = round_to_type_of(z, type_ptr)
    else:
        offset = n * x_n + oh * x_h + ow * x_w
        z = load_float32(x_ptr + offset[:, None] + (c * x_c)[None, :], m_ok[:, None] & c_ok[None, :])
    return z


@triton.jit(do_not_specialize=["M", "INNER", "SPLITS", "TILES_PER_SPLIT"])
def statistics_kernel(
    x_ptr, w_ptr, map_ptr, partial_ptr, M, INNER, H, W, OH, OW, SPLITS, TILES_PER_SPLIT,
    x_n, x_c, x_h, x_w, w_o, w_c, w_h, w_w,
    COUT: tl.constexpr, CIN_G: tl.constexpr, GROUPS: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, CONV_SH: tl.constexpr, CONV_SW: tl.constexpr,
    CONV_PH: tl.constexpr, CONV_PW: tl.constexpr, CONV_DH: tl.constexpr, CONV_DW: tl.constexpr,
    CONVOLVES: tl.constexpr, STORE: tl.constexpr,
    TF32: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A split's number of positions, sum of z and squares about its own mean, to partial[3, SPLITS, COUT].

    With STORE also z itself, to map[M, COUT].
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    COUT_G: tl.constexpr = COUT // GROUPS
    pid = tl.program_id(0).to(OFFSET)
    c_in_group, c_ok, group, split = group_channels(pid, COUT_G, GROUPS, BN)
    c = group * COUT_G + c_in_group

    count = tl.full((BN,), 0.0, tl.float64)
    total = tl.full((BN,), 0.0, tl.float64)
    squares = tl.full((BN,), 0.0, tl.float64)
    first = split * TILES_PER_SPLIT
    for t in range(first, tl.minimum(first + TILES_PER_SPLIT, (M + BM - 1) // BM)):
        m, m_ok, n, oh, ow = tile_positions(t, M, OH, OW, BM)
        z = _load_z(
            x_ptr, w_ptr, map_ptr, n, oh, ow, m_ok, group, c, c_ok, INNER, H, W,
            x_n, x_c, x_h, x_w, w_o, w_c, w_h, w_w,
            CIN_G, KH, KW, CONV_SH, CONV_SW, CONV_PH, CONV_PW, CONV_DH, CONV_DW,
            CONVOLVES, TF32, FLOAT32_PRODUCT, OFFSET, BM, BN, BK,
        )  # fmt: skip
        if STORE:
            tl.store(
                map_ptr + (m * COUT)[:, None] + c[None, :],
                z.to(map_ptr.dtype.element_ty),
                mask=m_ok[:, None] & c_ok[None, :],
            )
        tile_count = tl.reduce(m_ok.to(tl.float32), 0, add)
        pivot = tl.reduce(tl.where(m_ok[:, None], z, 0.0), 0, add) / tile_count
        pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)
        off = tl.where(m_ok[:, None], z - pivot[None, :], 0.0)
        from_pivot = tl.reduce(off, 0, add) / tile_count  # what rounding left of the mean
        off = tl.where(m_ok[:, None], off - from_pivot[None, :], 0.0)
        # Merged as Chan et al. merge the moments of two samples.
        tile_count = tile_count.to(tl.float64)
        tile_mean = pivot.to(tl.float64) + from_pivot.to(tl.float64)
        apart = tile_mean - total / tl.maximum(count, 1.0)
        squares += tl.reduce(off * off, 0, add).to(tl.float64)
        squares += apart * apart * (count * (tile_count / (count + tile_count)))
        total += tile_mean * tile_count
        count += tile_count
    to = partial_ptr + split * COUT + c
    row = SPLITS.to(OFFSET) * COUT
    tl.store(to, count, mask=c_ok)
    tl.store(to + row, total, mask=c_ok)
    tl.store(to + 2 * row, squares, mask=c_ok)


@triton.jit
def _load_partial(partial_ptr, s0, c, c_ok, SPLITS, COUT: tl.constexpr, BM: tl.constexpr):
    """(pointers to the first row of partial[:, SPLITS, COUT] from split ``s0`` on, mask): [BM, BN]."""
    s = s0 + tl.arange(0, BM)
    ok = (s < SPLITS)[:, None] & c_ok[None, :]
    return partial_ptr + (s * COUT)[:, None] + c[None, :], ok


@triton.jit
def _merged_statistics(
    partial_ptr, c, c_ok, M, SPLITS, COUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """(mean, biased variance) per channel in float64, from what `statistics_kernel` writes of all splits."""
    row = SPLITS * COUT
    mean = tl.full((BN,), 0.0, tl.float64)
    for s0 in range(0, SPLITS, BM):
        at, ok = _load_partial(partial_ptr, s0, c, c_ok, SPLITS, COUT, BM)
        mean += tl.reduce(load_float64(at + row, ok, 0.0), 0, add)
    mean = mean / M
    var = tl.full((BN,), 0.0, tl.float64)
    for s0 in range(0, SPLITS, BM):
        at, ok = _load_partial(partial_ptr, s0, c, c_ok, SPLITS, COUT, BM)
        count = load_float64(at, ok, 1.0)
        apart = tl.where(ok, load_float64(at + row, ok, 0.0) / count - mean[None, :], 0.0)
        var += tl.reduce(load_float64(at + 2 * row, ok, 0.0) + count * apart * apart, 0, add)
    return mean, var / M


@triton.jit(do_not_specialize=["M", "SPLITS"])
def normalisation_kernel(
    partial_ptr, mean_ptr, var_ptr, bias_ptr, gamma_ptr, beta_ptr, stats_ptr, M, SPLITS,
    COUT: tl.constexpr, GIVEN: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr, EPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The statistics (4, COUT): as GIVEN, or from all splits of `statistics_kernel`."""
    c = tl.program_id(0) * BN + tl.arange(0, BN)
    c_ok = c < COUT
    if GIVEN:
        mean, var = _given_statistics(mean_ptr, var_ptr, bias_ptr, c, c_ok, HAS_BIAS)
    else:
        mean, var = _merged_statistics(partial_ptr, c, c_ok, M, SPLITS, COUT, BM, BN)
    scale, shift = _scale_and_shift(mean, var, gamma_ptr, beta_ptr, c, c_ok, HAS_GAMMA, HAS_BETA, EPS)
    tl.store(stats_ptr + c, mean, mask=c_ok)
    tl.store(stats_ptr + COUT + c, var, mask=c_ok)
    # what the other kernels multiply and add, to the bit
    tl.store(stats_ptr + 2 * COUT + c, scale.to(tl.float32).to(tl.float64), mask=c_ok)
    tl.store(stats_ptr + 3 * COUT + c, shift.to(tl.float32).to(tl.float64), mask=c_ok)


# ---------------------------------------------------------------- backward


@triton.jit
def _grad_of_argument(g, u, ACTIVATION: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """The gradient of the activation's argument ``u`` from that of its result."""
    if ACTIVATION == 1:
        g = tl.where(u <= 0, 0.0, g)
    elif ACTIVATION == 2:
        g = tl.where((u <= A) | (u >= B), 0.0, g)
    elif ACTIVATION >= 3:
        g = multiply_slope(g, u, ACTIVATION, A, B)
    return g


@triton.jit(do_not_specialize=["M", "SPLITS", "TILES_PER_SPLIT"])
def grad_norm_kernel(
    grad_ptr, z_ptr, stats_ptr, du_ptr, partial_ptr, M, PH, PW, SPLITS, TILES_PER_SPLIT,
    g_n, g_c, g_h, g_w, z_n, z_c, z_h, z_w, d_n, d_c, d_h, d_w,
    COUT: tl.constexpr, ACTIVATION: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    STORE: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A split's sums of du and of du * (z - mean) over the argmax positions, to partial[2, SPLITS, COUT].

    ``z`` is z at the argmax of every window. With STORE also scale * du, which under given statistics is the
    gradient of the convolution's output there.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    TILES_N: tl.constexpr = (COUT + BN - 1) // BN
    pid = tl.program_id(0).to(OFFSET)
    split = pid // TILES_N
    c = pid % TILES_N * BN + tl.arange(0, BN)
    c_ok = c < COUT
    mean = load_float32(stats_ptr + c, c_ok)[None, :]
    scale = load_float32(stats_ptr + 2 * COUT + c, c_ok)[None, :]
    shift = load_float32(stats_ptr + 3 * COUT + c, c_ok)[None, :]
    total = tl.full((BM, BN), 0.0, tl.float32)
    with_z = tl.full((BM, BN), 0.0, tl.float32)
    for t in range(TILES_PER_SPLIT):
        m = (split * TILES_PER_SPLIT + t) * BM + tl.arange(0, BM)
        n, ph, pw = split_position(m, PH, PW)
        ok = (m < M)[:, None] & c_ok[None, :]
        z = load_float32(z_ptr + (n * z_n + ph * z_h + pw * z_w)[:, None] + (c * z_c)[None, :], ok)
        g = load_float32(grad_ptr + (n * g_n + ph * g_h + pw * g_w)[:, None] + (c * g_c)[None, :], ok)
        du = _grad_of_argument(g, z * scale + shift, ACTIVATION, ACT_A, ACT_B)
        if STORE:
            tl.store(
                du_ptr + (n * d_n + ph * d_h + pw * d_w)[:, None] + (c * d_c)[None, :],
                (scale * du).to(du_ptr.dtype.element_ty),
                mask=ok,
            )
        total += tl.where(ok, du, 0.0)
        with_z += tl.where(ok, du * (z - mean), 0.0)
    to = partial_ptr + split * COUT + c
    tl.store(to, tl.reduce(total, 0, add), mask=c_ok)
    tl.store(to + SPLITS.to(OFFSET) * COUT, tl.reduce(with_z, 0, add), mask=c_ok)


@triton.jit(do_not_specialize=["SPLITS"])
def norm_sums_kernel(
    partial_ptr, stats_ptr, sums_ptr, SPLITS,
    COUT: tl.constexpr, EPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows of sums (2, COUT): the gradients of gamma and beta, from all splits of `grad_norm_kernel`."""
    c = tl.program_id(0) * BN + tl.arange(0, BN)
    c_ok = c < COUT
    total = tl.full((BN,), 0.0, tl.float64)
    with_z = tl.full((BN,), 0.0, tl.float64)
    for s0 in range(0, SPLITS, BM):
        at, ok = _load_partial(partial_ptr, s0, c, c_ok, SPLITS, COUT, BM)
        total += tl.reduce(load_float64(at, ok, 0.0), 0, add)
        with_z += tl.reduce(load_float64(at + SPLITS * COUT, ok, 0.0), 0, add)
    mean = load_float64(stats_ptr + c, c_ok, 0.0)
    var = load_float64(stats_ptr + COUT + c, c_ok, 1.0)
    # The splits took the mean as a float32; an infinite sum has nothing to correct.
    off = total * (mean.to(tl.float32).to(tl.float64) - mean)
    with_z += tl.where(tl.abs(total) < float("inf"), off, 0.0)
    tl.store(sums_ptr + c, with_z / tl.sqrt(var + EPS), mask=c_ok)
    tl.store(sums_ptr + COUT + c, total, mask=c_ok)


@triton.jit(do_not_specialize=["M", "INNER"])
def grad_map_kernel(
    x_ptr, w_ptr, grad_ptr, codes_ptr, stats_ptr, sums_ptr, dconv_ptr, M, INNER, H, W, OH, OW, PH, PW,
    x_n, x_c, x_h, x_w, w_o, w_c, w_h, w_w, g_n, g_c, g_h, g_w, d_n, d_c, d_h, d_w,
    COUT: tl.constexpr, CIN_G: tl.constexpr, GROUPS: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, CONV_SH: tl.constexpr, CONV_SW: tl.constexpr,
    CONV_PH: tl.constexpr, CONV_PW: tl.constexpr, CONV_DH: tl.constexpr, CONV_DW: tl.constexpr,
    POOL_KH: tl.constexpr, POOL_KW: tl.constexpr, POOL_SH: tl.constexpr, POOL_SW: tl.constexpr,
    POOL_PH: tl.constexpr, POOL_PW: tl.constexpr, POOL_DH: tl.constexpr, POOL_DW: tl.constexpr,
    ACTIVATION: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    POOLED: tl.constexpr, NIBBLES: tl.constexpr, CODE_GROUPS: tl.constexpr, EPS: tl.constexpr,
    CONVOLVES: tl.constexpr, TF32: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dz of a tile of output positions of the convolution by channels, under the batch's statistics."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    COUT_G: tl.constexpr = COUT // GROUPS
    pid = tl.program_id(0).to(OFFSET)
    c_in_group, c_ok, group, pid_m = group_channels(pid, COUT_G, GROUPS, BN)
    c = group * COUT_G + c_in_group
    _, m_ok, n, oh, ow = tile_positions(pid_m, M, OH, OW, BM)
    z = _load_z(
        x_ptr, w_ptr, dconv_ptr, n, oh, ow, m_ok, group, c, c_ok, INNER, H, W,
        x_n, x_c, x_h, x_w, w_o, w_c, w_h, w_w,
        CIN_G, KH, KW, CONV_SH, CONV_SW, CONV_PH, CONV_PW, CONV_DH, CONV_DW,
        CONVOLVES, TF32, FLOAT32_PRODUCT, OFFSET, BM, BN, BK,
    )  # fmt: skip
    if POOLED:
        g = max_unpool(
            grad_ptr, codes_ptr, n, oh, ow, m_ok, c, c_ok, PH, PW, g_n, g_c, g_h, g_w,
            POOL_KH, POOL_KW, POOL_SH, POOL_SW, POOL_PH, POOL_PW, POOL_DH, POOL_DW,
            CODE_GROUPS, NIBBLES, BM, BN,
        )  # fmt: skip
    else:
        offset = n * g_n + oh * g_h + ow * g_w
        g = load_float32(grad_ptr + offset[:, None] + (c * g_c)[None, :], m_ok[:, None] & c_ok[None, :])
    scale = load_float64(stats_ptr + 2 * COUT + c, c_ok, 0.0)
    mean_grad = load_float64(sums_ptr + COUT + c, c_ok, 0.0) / M
    from_z = load_float64(sums_ptr + c, c_ok, 0.0) / M
    from_z = from_z / tl.sqrt(load_float64(stats_ptr + COUT + c, c_ok, 1.0) + EPS)
    exact_mean = load_float64(stats_ptr + c, c_ok, 0.0)
    mean = exact_mean.to(tl.float32)
    off = from_z * (mean.to(tl.float64) - exact_mean)
    mean_grad += tl.where(tl.abs(from_z) < float("inf"), off, 0.0)
    shift = load_float32(stats_ptr + 3 * COUT + c, c_ok)
    scale = scale.to(tl.float32)
    du = _grad_of_argument(g, z * scale[None, :] + shift[None, :], ACTIVATION, ACT_A, ACT_B)
    dz = du - mean_grad.to(tl.float32)[None, :] - (z - mean[None, :]) * from_z.to(tl.float32)[None, :]
    dz *= scale[None, :]
    offset = n * d_n + oh * d_h + ow * d_w
    tl.store(
        dconv_ptr + offset[:, None] + (c * d_c)[None, :],
        dz.to(dconv_ptr.dtype.element_ty),
        mask=m_ok[:, None] & c_ok[None, :],
    )
