"""The block op with a batch norm in Triton, ``layout(max_pool(act(norm(conv2d(x)))))``, and its gradients.

For a place ``o`` of the convolution's map z, with mean, variance, scale and shift per channel:

    u(o)   = scale * z(o) + shift,  scale = gamma / sqrt(var + eps),  shift = beta - scale * mean
    out(m) = max over the window m of act(u);   the pool picks winners of act(u), not of z
    du(m)  = grad(m) * act'(u at the winner of m)
    dbeta  = sum over m of du(m),   dgamma = sum over m of du(m) * (z at the winner - mean) / sqrt(var + eps)
    dz(o)  = scale * (sum of du(m) over the windows m whose winner lies at o)
             - scale / places * (dbeta + dgamma * (z(o) - mean) / sqrt(var + eps))

where the statistics are the batch's; where they are given, dz ends with its first line.

What moves under the batch's statistics, in units of the map, the input aside; a pool of 2x2 leaves a quarter
of the map, and z of the winners and codes come to it in training:

- DIRECT: `statistics_kernel` convolves and keeps four numbers per channel and program: nothing of the map
  moves. Then `forward_kernel` convolves again, a quarter written (half with what training keeps). The
  backward's `grad_map_kernel` convolves a third time to write dz: 1, and the library reads it. PyTorch's own
  operators move 7 forward: z written and read twice, the normed map written, read and written again by its
  activation, and read by the pool.
- CHUNKED: the library writes z, `statistics_kernel` reads it, `finish_kernel` reads it: 3, and no tile is
  convolved by us. So DIRECT is for few taps, whose products cost less than 3 maps take to move.
- Where the map is kept (``keep_map``, or no pool), channels last, `statistics_kernel` writes it as it sums:
  2 in DIRECT, and 4 in CHUNKED unless the library's map lies so already.

Statistics are those of z as a map of x's type holds it, so that they, the winners and the backward speak of
the same numbers. Sums are about the mean of their own tile, in float32, and merged as Chan et al. do it, in
float64: an outlier spoils nobody's. The shapes alone decide the order: the same bits each run.
Terms are those of `kernels/conv_block.py` and of ``cnnlstm_fast/ops/conv_norm.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32, float64, uint8

from cnnlstm_fast.kernels import conv_block
from cnnlstm_fast.kernels.checks import (
    check_block,
    check_fold,
    check_norm,
    check_norm_backward,
    check_statistics,
)
from cnnlstm_fast.kernels.conv_block import (
    CHUNKED,
    PASS,
    PRODUCT,
    WIDE_PRODUCT,
    _activate,
    _activation_constants,
    _add,
    _as_stored,
    _code_constants,
    _conv_grad,
    _convolve,
    _library_backward,
    _load_float32,
    _nchw_strides,
    _pool_constants,
    _product_args,
    _product_width,
    _split_place,
    _splits,
    _strides,
    _tile,
    _wide,
    _window,
    convolve_and_finish,
    finish,
    finish_args,
    library_map,
)
from cnnlstm_fast.kernels.launching import launch
from cnnlstm_fast.spec import codes_shape, raw_shape


@triton.jit
def _load_float64(pointers, ok, other):
    return tl.load(pointers, mask=ok, other=other).to(tl.float64)


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
    """What a norm multiplies and adds, per channel in float64."""
    scale = 1.0 / tl.sqrt(var + EPS)
    if HAS_GAMMA:
        scale *= _load_float64(gamma_ptr + c, c_ok, 1.0)
    shift = -mean * scale
    if HAS_BETA:
        shift += _load_float64(beta_ptr + c, c_ok, 0.0)
    return scale, shift


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
    mean = _load_float64(mean_ptr + c, c_ok, 0.0)
    var = _load_float64(var_ptr + c, c_ok, 1.0)
    if HAS_BIAS:
        mean -= _load_float64(bias_ptr + c, c_ok, 0.0)
    scale, shift = _scale_and_shift(mean, var, gamma_ptr, beta_ptr, c, c_ok, HAS_GAMMA, HAS_BETA, EPS)
    place = c.to(tl.int64)[:, None] * K + k[None, :]
    ok = c_ok[:, None] & (k < K)[None, :]
    weight = _load_float64(w_ptr + place, ok, 0.0) * scale[:, None]
    # by float32, as the CPU rounds
    tl.store(to_ptr + place, weight.to(tl.float32).to(to_ptr.dtype.element_ty), mask=ok)
    shift = shift.to(tl.float32).to(to_bias_ptr.dtype.element_ty)
    tl.store(to_bias_ptr + c, shift, mask=c_ok & (pid // TILES_N == 0))


@triton.jit
def _map_tile(
    x_ptr, w_ptr, like_ptr, n, oh, ow, m_ok, group, c, c_ok, INNER, H, W,
    x_n, x_c, x_h, x_w, w_o, w_c, w_h, w_w,
    CIN_G: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, CONV_SH: tl.constexpr, CONV_SW: tl.constexpr,
    CONV_PH: tl.constexpr, CONV_PW: tl.constexpr, CONV_DH: tl.constexpr, CONV_DW: tl.constexpr,
    CONVOLVES: tl.constexpr, TF32: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr, OFFSET: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """z at places (n, oh, ow) for channels ``c``, in float32: convolved, or read from ``x``, the map then."""
    if CONVOLVES:
        z = _convolve(
            x_ptr, w_ptr, n, oh, ow, m_ok, group, c, c_ok, INNER, H, W,
            x_n, x_c, x_h, x_w, w_o, w_c, w_h, w_w,
            CIN_G, KH, KW, CONV_SH, CONV_SW, CONV_PH, CONV_PW, CONV_DH, CONV_DW,
            TF32, FLOAT32_PRODUCT, OFFSET, BM, BN, BK,
        )  # fmt: skip
        z = _as_stored(z, like_ptr)
    else:
        place = n * x_n + oh * x_h + ow * x_w
        z = _load_float32(x_ptr + place[:, None] + (c * x_c)[None, :], m_ok[:, None] & c_ok[None, :])
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
    """A split's places, sum of z and squares about its own mean, to partial[3, SPLITS, COUT].

    With STORE also the tiles of z, to map[M, COUT].
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    COUT_G: tl.constexpr = COUT // GROUPS
    TILES_G: tl.constexpr = (COUT_G + BN - 1) // BN
    pid = tl.program_id(0).to(OFFSET)
    c_in_group = pid % TILES_G * BN + tl.arange(0, BN)
    c_ok = c_in_group < COUT_G
    pid = pid // TILES_G
    group = pid % GROUPS
    split = pid // GROUPS
    c = group * COUT_G + c_in_group

    places = tl.full((BN,), 0.0, tl.float64)
    total = tl.full((BN,), 0.0, tl.float64)
    squares = tl.full((BN,), 0.0, tl.float64)
    first = split * TILES_PER_SPLIT
    for t in range(first, tl.minimum(first + TILES_PER_SPLIT, (M + BM - 1) // BM)):
        m = t * BM + tl.arange(0, BM)
        m_ok = m < M
        n, oh, ow = _split_place(m, OH, OW)
        z = _map_tile(
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
        here = tl.reduce(m_ok.to(tl.float32), 0, _add)
        pivot = tl.reduce(tl.where(m_ok[:, None], z, 0.0), 0, _add) / here
        pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)
        off = tl.where(m_ok[:, None], z - pivot[None, :], 0.0)
        from_pivot = tl.reduce(off, 0, _add) / here  # what rounding left of the mean
        off = tl.where(m_ok[:, None], off - from_pivot[None, :], 0.0)
        here = here.to(tl.float64)
        mean_here = pivot.to(tl.float64) + from_pivot.to(tl.float64)
        apart = mean_here - total / tl.maximum(places, 1.0)
        squares += tl.reduce(off * off, 0, _add).to(tl.float64)
        squares += apart * apart * (places * (here / (places + here)))
        total += mean_here * here
        places += here
    to = partial_ptr + split * COUT + c
    row = SPLITS.to(OFFSET) * COUT
    tl.store(to, places, mask=c_ok)
    tl.store(to + row, total, mask=c_ok)
    tl.store(to + 2 * row, squares, mask=c_ok)


@triton.jit(do_not_specialize=["M", "SPLITS"])
def normalisation_kernel(
    partial_ptr, mean_ptr, var_ptr, bias_ptr, gamma_ptr, beta_ptr, stats_ptr, M, SPLITS,
    COUT: tl.constexpr, GIVEN: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GAMMA: tl.constexpr, HAS_BETA: tl.constexpr, EPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows of stats: mean without the bias, biased variance, scale and shift, as given or from all splits."""
    c = tl.program_id(0) * BN + tl.arange(0, BN)
    c_ok = c < COUT
    if GIVEN:
        mean = _load_float64(mean_ptr + c, c_ok, 0.0)
        if HAS_BIAS:
            mean -= _load_float64(bias_ptr + c, c_ok, 0.0)
        var = _load_float64(var_ptr + c, c_ok, 1.0)
    else:
        row = SPLITS * COUT
        mean = tl.full((BN,), 0.0, tl.float64)
        for s0 in range(0, SPLITS, BM):
            s = s0 + tl.arange(0, BM)
            ok = (s < SPLITS)[:, None] & c_ok[None, :]
            at = partial_ptr + (s * COUT)[:, None] + c[None, :]
            mean += tl.reduce(_load_float64(at + row, ok, 0.0), 0, _add)
        mean = mean / M
        var = tl.full((BN,), 0.0, tl.float64)
        for s0 in range(0, SPLITS, BM):
            s = s0 + tl.arange(0, BM)
            ok = (s < SPLITS)[:, None] & c_ok[None, :]
            at = partial_ptr + (s * COUT)[:, None] + c[None, :]
            places = _load_float64(at, ok, 1.0)
            apart = tl.where(ok, _load_float64(at + row, ok, 0.0) / places - mean[None, :], 0.0)
            var += tl.reduce(_load_float64(at + 2 * row, ok, 0.0) + places * apart * apart, 0, _add)
        var = var / M
    scale, shift = _scale_and_shift(mean, var, gamma_ptr, beta_ptr, c, c_ok, HAS_GAMMA, HAS_BETA, EPS)
    tl.store(stats_ptr + c, mean, mask=c_ok)
    tl.store(stats_ptr + COUT + c, var, mask=c_ok)
    # what the other kernels multiply and add, to the bit
    tl.store(stats_ptr + 2 * COUT + c, scale.to(tl.float32).to(tl.float64), mask=c_ok)
    tl.store(stats_ptr + 3 * COUT + c, shift.to(tl.float32).to(tl.float64), mask=c_ok)


@triton.jit
def _grad_of_argument(g, u, ACTIVATION: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """The gradient of the activation's argument ``u`` from that of its result."""
    if ACTIVATION == 1:
        g = tl.where(u <= 0, 0.0, g)
    elif ACTIVATION == 2:
        g = tl.where((u <= A) | (u >= B), 0.0, g)
    elif ACTIVATION >= 3:
        _, slope = _activate(u, ACTIVATION, A, B)
        g = g * slope
    return g


@triton.jit(do_not_specialize=["M", "SPLITS", "TILES_PER_SPLIT"])
def grad_norm_kernel(
    grad_ptr, z_ptr, stats_ptr, du_ptr, partial_ptr, M, PH, PW, SPLITS, TILES_PER_SPLIT,
    g_n, g_c, g_h, g_w, z_n, z_c, z_h, z_w, d_n, d_c, d_h, d_w,
    COUT: tl.constexpr, ACTIVATION: tl.constexpr, ACT_A: tl.constexpr, ACT_B: tl.constexpr,
    STORE: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A split's sums of du and of du * (z - mean) over the winners, to partial[2, SPLITS, COUT].

    With STORE also scale * du, which is the gradient of the convolution's winners under given statistics.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    TILES_N: tl.constexpr = (COUT + BN - 1) // BN
    pid = tl.program_id(0).to(OFFSET)
    split = pid // TILES_N
    c = pid % TILES_N * BN + tl.arange(0, BN)
    c_ok = c < COUT
    mean = _load_float32(stats_ptr + c, c_ok)[None, :]
    scale = _load_float32(stats_ptr + 2 * COUT + c, c_ok)[None, :]
    shift = _load_float32(stats_ptr + 3 * COUT + c, c_ok)[None, :]
    total = tl.full((BM, BN), 0.0, tl.float32)
    with_z = tl.full((BM, BN), 0.0, tl.float32)
    for t in range(TILES_PER_SPLIT):
        m = (split * TILES_PER_SPLIT + t) * BM + tl.arange(0, BM)
        n, ph, pw = _split_place(m, PH, PW)
        ok = (m < M)[:, None] & c_ok[None, :]
        z = _load_float32(z_ptr + (n * z_n + ph * z_h + pw * z_w)[:, None] + (c * z_c)[None, :], ok)
        g = _load_float32(grad_ptr + (n * g_n + ph * g_h + pw * g_w)[:, None] + (c * g_c)[None, :], ok)
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
    tl.store(to, tl.reduce(total, 0, _add), mask=c_ok)
    tl.store(to + SPLITS.to(OFFSET) * COUT, tl.reduce(with_z, 0, _add), mask=c_ok)


@triton.jit(do_not_specialize=["SPLITS"])
def norm_sums_kernel(
    partial_ptr, stats_ptr, sums_ptr, SPLITS,
    COUT: tl.constexpr, EPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows of sums: the gradients of gamma and beta, from all splits."""
    c = tl.program_id(0) * BN + tl.arange(0, BN)
    c_ok = c < COUT
    total = tl.full((BN,), 0.0, tl.float64)
    with_z = tl.full((BN,), 0.0, tl.float64)
    for s0 in range(0, SPLITS, BM):
        s = s0 + tl.arange(0, BM)
        ok = (s < SPLITS)[:, None] & c_ok[None, :]
        at = partial_ptr + (s * COUT)[:, None] + c[None, :]
        total += tl.reduce(_load_float64(at, ok, 0.0), 0, _add)
        with_z += tl.reduce(_load_float64(at + SPLITS * COUT, ok, 0.0), 0, _add)
    mean = _load_float64(stats_ptr + c, c_ok, 0.0)
    var = _load_float64(stats_ptr + COUT + c, c_ok, 1.0)
    # The splits took the mean as a float32; an infinite sum has nothing to mend.
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
    """dz of a tile of places of the convolution's map by channels, under the batch's statistics."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    COUT_G: tl.constexpr = COUT // GROUPS
    TILES_G: tl.constexpr = (COUT_G + BN - 1) // BN
    pid = tl.program_id(0).to(OFFSET)
    c_in_group = pid % TILES_G * BN + tl.arange(0, BN)
    c_ok = c_in_group < COUT_G
    pid = pid // TILES_G
    group = pid % GROUPS
    c = group * COUT_G + c_in_group
    m = pid // GROUPS * BM + tl.arange(0, BM)
    m_ok = m < M
    n, oh, ow = _split_place(m, OH, OW)
    z = _map_tile(
        x_ptr, w_ptr, dconv_ptr, n, oh, ow, m_ok, group, c, c_ok, INNER, H, W,
        x_n, x_c, x_h, x_w, w_o, w_c, w_h, w_w,
        CIN_G, KH, KW, CONV_SH, CONV_SW, CONV_PH, CONV_PW, CONV_DH, CONV_DW,
        CONVOLVES, TF32, FLOAT32_PRODUCT, OFFSET, BM, BN, BK,
    )  # fmt: skip
    if POOLED:
        g = _conv_grad(
            grad_ptr, codes_ptr, n, oh, ow, m_ok, c, c_ok, PH, PW, g_n, g_c, g_h, g_w,
            POOL_KH, POOL_KW, POOL_SH, POOL_SW, POOL_PH, POOL_PW, POOL_DH, POOL_DW,
            CODE_GROUPS, NIBBLES, BM, BN,
        )  # fmt: skip
    else:
        place = n * g_n + oh * g_h + ow * g_w
        g = _load_float32(grad_ptr + place[:, None] + (c * g_c)[None, :], m_ok[:, None] & c_ok[None, :])
    scale = _load_float64(stats_ptr + 2 * COUT + c, c_ok, 0.0)
    share = -scale / M
    constant = share * _load_float64(sums_ptr + COUT + c, c_ok, 0.0)
    slope = share * _load_float64(sums_ptr + c, c_ok, 0.0)
    slope = slope / tl.sqrt(_load_float64(stats_ptr + COUT + c, c_ok, 1.0) + EPS)
    exact_mean = _load_float64(stats_ptr + c, c_ok, 0.0)
    mean = exact_mean.to(tl.float32)
    off = slope * (mean.to(tl.float64) - exact_mean)
    constant += tl.where(tl.abs(slope) < float("inf"), off, 0.0)
    shift = _load_float32(stats_ptr + 3 * COUT + c, c_ok)
    scale = scale.to(tl.float32)
    du = _grad_of_argument(g, z * scale[None, :] + shift[None, :], ACTIVATION, ACT_A, ACT_B)
    from_mean = (z - mean[None, :]) * slope.to(tl.float32)[None, :] + constant.to(tl.float32)[None, :]
    place = n * d_n + oh * d_h + ow * d_w
    tl.store(
        dconv_ptr + place[:, None] + (c * d_c)[None, :],
        (du * scale[None, :] + from_mean).to(dconv_ptr.dtype.element_ty),
        mask=m_ok[:, None] & c_ok[None, :],
    )


#: What says how a kernel convolves, to one that does not.
_OF_CONVOLUTION = (
    "CIN_G", "KH", "KW", "CONV_SH", "CONV_SW", "CONV_PH", "CONV_PW", "CONV_DH", "CONV_DW", "GROUPS",
)  # fmt: skip

#: Launch options of passes that reduce their tiles: more of them in flight behind each barrier.
REDUCTION = dict(num_warps=8, num_stages=1, maxnreg=255)

#: Of passes of few programs, for which the assembler need not save registers. It calls a float64 root or
#: quotient, and left to itself it spills around the call: which kernels do depends on the version of Triton.
FEW_PROGRAMS = PASS | dict(maxnreg=255)


def fold(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    run=launch,
) -> tuple[Tensor, Tensor]:
    """The op ``cnnlstm_fast::fold_norm``: weight and bias of a convolution that norms by given statistics."""
    check_fold(weight)
    channels = weight.shape[0]
    check_norm("fold_norm", weight, channels, bias=bias, gamma=gamma, beta=beta, mean=mean, var=var)
    folded, shift = weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])
    weight = weight.contiguous()
    taps = weight.numel() // channels
    args = dict(
        w_ptr=weight,
        to_ptr=folded,
        to_bias_ptr=shift,
        K=taps,
        COUT=channels,
        **_norm_args(weight, bias, gamma, beta, mean, var, eps),
        BN=16,
        BK=64,
    )
    run(fold_kernel, triton.cdiv(channels, 16) * triton.cdiv(taps, 64), args, PASS)
    return folded, shift


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    conv: list[int],
    activation: int,
    act: list[float],
    pool: list[int],
    order: list[int],
    plan: int,
    keep: bool,
    keep_map: bool,
    run=launch,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op ``cnnlstm_fast::conv_norm_block``, whose file explains the arguments.

    Returns:
        The map (N, C, PH, PW) permuted by ``order``, contiguous; the winner codes, z of the winners and z of
        all places as (N, OH, OW, C), each with no element where it is not kept; and the statistics.

    ``run`` is what starts kernels, see :func:`cnnlstm_fast.kernels.launching.launch`.
    """
    conv_hw, size = check_block(x, weight, conv, activation, act, pool, order, plan)
    batch, channels = x.shape[0], weight.shape[0]
    check_norm("conv_norm_block", x, channels, bias=bias, gamma=gamma, beta=beta, mean=mean, var=var)
    places = batch * conv_hw[0] * conv_hw[1]
    check_statistics(mean, var, places)
    of_batch = mean is None
    out = x.new_empty(raw_shape(order, batch, channels, size))
    codes = x.new_empty(
        codes_shape(_window(pool), batch, channels, size) if keep and pool else [0], dtype=uint8
    )
    kept = x.new_empty(out.shape if keep and pool else [0])
    stored = keep and (not pool or (keep_map and of_batch))
    z_map = x.new_empty([batch, *conv_hw, channels] if stored else [0])
    y = None
    # Under given statistics there are no sums to take along: the library's map is as good as ours.
    write = stored and of_batch  # in the pass of sums
    if plan == CHUNKED or (stored and not of_batch):
        y = library_map(x, weight, conv)
        channels_last = y.permute(0, 2, 3, 1)
        if stored and (not of_batch or channels_last.is_contiguous()):
            z_map, write = channels_last.contiguous(), False
    partial = _statistics(x, weight, conv, conv_hw, y, z_map if write else None, run) if of_batch else None
    if stored:
        y = z_map.permute(0, 3, 1, 2)
    stats = x.new_empty([4, channels], dtype=float64)
    args = dict(
        partial_ptr=stats if partial is None else partial,
        stats_ptr=stats,
        M=places,
        SPLITS=1 if partial is None else partial.shape[1],
        COUT=channels,
        GIVEN=partial is None,
        **_norm_args(weight, bias, gamma, beta, mean, var, eps),
        BM=32,
        BN=16,
    )
    run(normalisation_kernel, triton.cdiv(channels, 16), args, FEW_PROGRAMS)
    if out.numel() == 0:
        return out, codes, kept, z_map, stats
    args = finish_args(out, codes, kept, order, conv_hw, size, activation, act, pool)
    args |= dict(b_ptr=stats, b_o=1, HAS_BIAS=False, NORMED=True)
    if y is None:
        convolve_and_finish(x, weight, conv, args, run)
    else:
        finish(y, args, run)
    return out, codes, kept, z_map, stats


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stats: Tensor,
    codes: Tensor,
    kept: Tensor,
    map: Tensor,
    eps: float,
    conv: list[int],
    activation: int,
    act: list[float],
    pool: list[int],
    order: list[int],
    plan: int,
    given: bool,
    need_x: bool,
    need_weight: bool,
    run=launch,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``cnnlstm_fast::conv_norm_block_backward``, whose file explains the arguments.

    Returns:
        The contiguous gradients of x and weight, no element where one is not needed; and the sums (2, C)
        over the gradient of the norm's result, times its normalised input and alone.

    ``run`` is what starts kernels, see :func:`cnnlstm_fast.kernels.launching.launch`.
    """
    conv_hw, size = check_block(x, weight, conv, activation, act, pool, order, plan)
    check_norm_backward(grad, x, weight, stats, codes, kept, map, pool, order, conv_hw, size)
    channels = weight.shape[0]
    needed = need_x or need_weight
    if grad.numel() == 0:
        dx, dweight = (
            t.new_zeros(t.shape if need else [0]) for t, need in ((x, need_x), (weight, need_weight))
        )
        return dx, dweight, stats.new_zeros([2, channels])
    winners, winner_strides = (kept, _nchw_strides(kept, order)) if pool else (map, _nhwc_strides(map))
    sums, du = _norm_sums(
        grad, winners, winner_strides, stats, eps, activation, act, order, given and needed, run
    )
    if not needed:
        return x.new_empty(0), weight.new_empty(0), sums
    if given:  # a block without a norm whose gradient has passed through it
        dx, dweight, _ = conv_block.backward(
            du, x, weight, codes, conv, 0, [], pool, order, plan, need_x, need_weight, False, run=run
        )
        return dx, dweight, sums

    y = None
    if map.numel():
        y = map.permute(0, 3, 1, 2)
    elif plan == CHUNKED:
        y = library_map(x, weight, conv)
    dconv = x.new_empty([x.shape[0], channels, *conv_hw])
    places = x.shape[0] * conv_hw[0] * conv_hw[1]
    args, options = _map_args(x, weight, conv, y, 32, places, grad, codes, dconv)
    args |= dict(
        grad_ptr=grad,
        codes_ptr=codes,
        stats_ptr=stats,
        sums_ptr=sums,
        dconv_ptr=dconv,
        OH=conv_hw[0],
        OW=conv_hw[1],
        PH=size[0],
        PW=size[1],
        **_strides("g", _nchw_strides(grad, order)),
        **_strides("d", dconv.stride()),
        **_pool_constants(pool),
        **_activation_constants(activation, act),
        **_code_constants(pool, channels),
        POOLED=bool(pool),
        EPS=eps,
    )
    run(grad_map_kernel, triton.cdiv(places, args["BM"]) * _channel_tiles(args), args, options)
    dx, dweight, _ = _library_backward(dconv, x, weight, conv, [need_x, need_weight, False])
    return dx, dweight, sums


def _statistics(x, weight, conv, conv_hw, y, z_map, run) -> Tensor:
    """Partial sums of z, read from ``y`` or convolved, which is then written to ``z_map`` if there is one."""
    places = x.shape[0] * conv_hw[0] * conv_hw[1]
    args, options = _map_args(x, weight, conv, y, 128, places, x if z_map is None else z_map)
    tiles = _channel_tiles(args)
    splits, tiles_per_split = _splits(triton.cdiv(places, args["BM"]), tiles)
    partial = x.new_empty([3, splits, weight.shape[0]], dtype=float64)
    args |= dict(
        map_ptr=x if z_map is None else z_map,
        partial_ptr=partial,
        OH=conv_hw[0],
        OW=conv_hw[1],
        SPLITS=splits,
        TILES_PER_SPLIT=tiles_per_split,
        STORE=z_map is not None,
    )
    run(statistics_kernel, splits * tiles, args, options)
    return partial


def _norm_sums(grad, winners, strides, stats, eps, activation, act, order, store, run):
    """(the sums (2, C), with ``store`` the gradient of z under given statistics in the order of ``grad``)."""
    channels = stats.shape[1]
    places = grad.numel() // channels
    size = [grad.shape[list(order).index(axis)] for axis in (2, 3)]
    du = grad.new_empty(grad.shape if store else [0])
    bm, bn = 64, 32
    tiles = triton.cdiv(channels, bn)
    splits, tiles_per_split = _splits(triton.cdiv(places, bm), tiles)
    partial = stats.new_empty([2, splits, channels], dtype=float32)
    args = dict(
        grad_ptr=grad,
        z_ptr=winners,
        stats_ptr=stats,
        du_ptr=du,
        partial_ptr=partial,
        M=places,
        PH=size[0],
        PW=size[1],
        SPLITS=splits,
        TILES_PER_SPLIT=tiles_per_split,
        **_strides("g", _nchw_strides(grad, order)),
        **_strides("z", strides),
        **_strides("d", _nchw_strides(du, order) if store else (0, 0, 0, 0)),
        COUT=channels,
        **_activation_constants(activation, act),
        STORE=store,
        WIDE=_wide(places, grad, winners),
        BM=bm,
        BN=bn,
    )
    run(grad_norm_kernel, splits * tiles, args, REDUCTION)
    sums = stats.new_empty([2, channels])
    args = dict(
        partial_ptr=partial,
        stats_ptr=stats,
        sums_ptr=sums,
        SPLITS=splits,
        COUT=channels,
        EPS=eps,
        BM=32,
        BN=16,
    )
    run(norm_sums_kernel, triton.cdiv(channels, 16), args, FEW_PROGRAMS)
    return sums, du


def _map_args(x, weight, conv, y, rows, places, *others) -> tuple[dict, dict]:
    """What `_map_tile` needs to read ``rows`` of z from ``y`` (N, C, OH, OW), or to convolve; launch options.

    ``others`` are tensors whose offsets have to fit too.
    """
    channels = weight.shape[0]
    if y is None:
        product = _product_args(x, weight, conv)
        bn = _product_width(x, channels // conv[6], product)
        wide = _wide(places, x, weight, *others)
        args = product | dict(COUT=channels, M=places, CONVOLVES=True, WIDE=wide, BM=32, BN=bn)
        return args, WIDE_PRODUCT if wide else PRODUCT
    args = dict(
        x_ptr=y,
        w_ptr=y,
        INNER=0,
        H=0,
        W=0,
        **_strides("x", y.stride()),
        **_strides("w", (0, 0, 0, 0), "ochw"),
        **dict.fromkeys(_OF_CONVOLUTION, 1),
        TF32=False,
        FLOAT32_PRODUCT=False,
        BK=16,
        COUT=channels,
        M=places,
        CONVOLVES=False,
        WIDE=_wide(places, y, *others),
        BM=rows,
        BN=_tile(channels, 32),
    )
    return args, REDUCTION


def _channel_tiles(args: dict) -> int:
    return args["GROUPS"] * triton.cdiv(args["COUT"] // args["GROUPS"], args["BN"])


def _norm_args(like, bias, gamma, beta, mean, var, eps) -> dict:
    """A norm's parameters, ``like`` in the place of those that it lacks."""
    given = dict(bias=bias, gamma=gamma, beta=beta, mean=mean, var=var)
    pointers = {f"{name}_ptr": like if t is None else t.contiguous() for name, t in given.items()}
    has = dict(HAS_BIAS=bias is not None, HAS_GAMMA=gamma is not None, HAS_BETA=beta is not None)
    return pointers | has | dict(EPS=eps)


def _nhwc_strides(t: Tensor) -> list[int]:
    return _nchw_strides(t, (0, 2, 3, 1))
