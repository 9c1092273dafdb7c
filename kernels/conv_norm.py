"""The block op with a batch norm in Triton, ``layout(max_pool(act(norm(conv2d(x)))))``, and its gradients.

For a position ``o`` of the convolution's output z, with mean, variance, scale and shift per channel:

    u(o)   = scale * z(o) + shift,  scale = gamma / sqrt(var + eps),  shift = beta - scale * mean
    out(m) = max over the window m of act(u);   the argmax is that of act(u), not of z
    du(m)  = grad(m) * act'(u at the argmax of m)
    dbeta  = sum over m of du(m),   dgamma = sum over m of du(m) * (z at the argmax - mean) / sqrt(var + eps)
    dz(o)  = scale * (sum of du(m) over the windows m whose argmax is o)
             - scale / positions * (dbeta + dgamma * (z(o) - mean) / sqrt(var + eps))

where the statistics are the batch's; where they are given, dz ends with its first line.

What moves under the batch's statistics, in units of z, the input aside. A pool of 2x2 leaves a quarter of z.
In training codes and z at the argmax are written too.

- DIRECT: `statistics_kernel` convolves and keeps four numbers per channel and program: nothing of z
  moves. Then `forward_kernel` convolves again, a quarter written (half with what training keeps). The
  backward's `grad_map_kernel` convolves a third time to write dz: 1, and the library reads it. PyTorch's own
  operators move 7 forward: z written and read twice, the normed map written, read and written again by its
  activation, and read by the pool.
- CHUNKED: the library writes z, `statistics_kernel` reads it, `epilogue_kernel` reads it: 3, and no tile is
  convolved by us. So DIRECT is for few taps, whose products cost less than 3 maps take to move.
- Where z is kept (``keep_map``, or no pool), channels last, `statistics_kernel` writes it as it sums:
  2 in DIRECT, and 4 in CHUNKED unless the library's z is channels last already.

Statistics are those of z rounded to x's type, so that they, the argmax and the backward speak of the same
numbers. Sums are about the mean of their own tile, in float32, and merged as Chan et al. do it, in
float64: an outlier spoils no other tile's. The shapes alone decide the order: the same bits each run.
Terms are those of `kernels/conv_block.py` and of ``cnnlstm_fast/ops/conv_norm.py``.

This file holds the host functions, `conv_norm_kernels.py` the kernels that they start.
"""

from __future__ import annotations

import triton
from torch import Tensor, float32, float64, uint8

from cnnlstm_fast.kernels import conv_block
from cnnlstm_fast.kernels.arguments import (
    FEW_PROGRAMS,
    PASS,
    PRODUCT,
    REDUCTION,
    WIDE_PRODUCT,
    activation_constants,
    code_constants,
    convolve_args,
    convolve_width,
    nchw_strides,
    output_sizes,
    over_positions,
    pool_constants,
    split_sum,
    strides,
    tile_size,
    window_elements,
)
from cnnlstm_fast.kernels.checks import (
    check_block,
    check_fold,
    check_norm,
    check_norm_backward,
    check_statistics,
)
from cnnlstm_fast.kernels.conv_block import (
    CHUNKED,
    convolve_with_epilogue,
    epilogue,
    epilogue_args,
    library_backward,
    library_convolution,
)
from cnnlstm_fast.kernels.conv_norm_kernels import (
    fold_kernel,
    grad_map_kernel,
    grad_norm_kernel,
    norm_sums_kernel,
    normalisation_kernel,
    statistics_kernel,
)
from cnnlstm_fast.kernels.launching import launch
from cnnlstm_fast.spec import codes_shape, raw_shape

#: The order of a tensor (N, H, W, C), as the ops take an order.
_NHWC = (0, 2, 3, 1)


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
        The pooled map (N, C, PH, PW) permuted by ``order``, contiguous; the argmax codes, z at the argmax and
        z itself as (N, OH, OW, C), each with no element where it is not kept; and the statistics (4, C).

    ``run`` is what starts kernels, see :func:`cnnlstm_fast.kernels.launching.launch`.
    """
    conv_hw, size = check_block(x, weight, conv, activation, act, pool, order, plan)
    batch, channels = x.shape[0], weight.shape[0]
    check_norm("conv_norm_block", x, channels, bias=bias, gamma=gamma, beta=beta, mean=mean, var=var)
    positions = batch * conv_hw[0] * conv_hw[1]
    check_statistics(mean, var, positions)
    of_batch = mean is None
    out = x.new_empty(raw_shape(order, batch, channels, size))
    codes_of_pool = codes_shape(window_elements(pool), batch, channels, size) if keep and pool else [0]
    codes = x.new_empty(codes_of_pool, dtype=uint8)
    kept = x.new_empty(out.shape if keep and pool else [0])
    stored = keep and (not pool or (keep_map and of_batch))
    z_map = x.new_empty([batch, *conv_hw, channels] if stored else [0])
    y = None  # z as (N, C, OH, OW), once it is in memory
    # Under given statistics there is no pass of sums that could write z as well: the library's is kept.
    write = stored and of_batch  # in the pass of sums
    if plan == CHUNKED or (stored and not of_batch):
        y = library_convolution(x, weight, conv)
        channels_last = y.permute(0, 2, 3, 1)  # [N, OH, OW, C]
        if stored and (not of_batch or channels_last.is_contiguous()):
            z_map, write = channels_last.contiguous(), False
    partial = _statistics(x, weight, conv, conv_hw, y, z_map if write else None, run) if of_batch else None
    if stored:
        y = z_map.permute(0, 3, 1, 2)  # [N, C, OH, OW]
    norm = _norm_args(weight, bias, gamma, beta, mean, var, eps)
    stats = _normalisation(x, channels, partial, positions, norm, run)
    if out.numel() == 0:
        return out, codes, kept, z_map, stats
    args = epilogue_args(out, codes, kept, order, conv_hw, size, activation, act, pool)
    args |= dict(b_ptr=stats, b_o=1, HAS_BIAS=False, NORMED=True)
    if y is None:
        convolve_with_epilogue(x, weight, conv, args, run)
    else:
        epilogue(y, args, run)
    return out, codes, kept, z_map, stats


def _statistics(x, weight, conv, conv_hw, y, z_map, run) -> Tensor:
    """Partial sums of z: count, sum and squares about the mean [3, splits, C], by `statistics_kernel`.

    z is read from ``y`` or convolved. It is written to ``z_map`` if there is one.
    """
    positions = x.shape[0] * conv_hw[0] * conv_hw[1]
    args = _z_args(x, weight, conv, y, 128)
    tiles = _channel_tiles(args)
    splits, tiles_per_split = split_sum(positions, args["BM"], tiles)
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
    args = over_positions(positions, args)
    run(statistics_kernel, splits * tiles, args, _z_options(args))
    return partial


def _normalisation(x, channels: int, partial: Tensor | None, positions: int, norm: dict, run) -> Tensor:
    """The statistics [4, C]: merged from ``partial`` sums, or where there are none those in ``norm``."""
    stats = x.new_empty([4, channels], dtype=float64)
    args = norm | dict(
        partial_ptr=stats if partial is None else partial,
        stats_ptr=stats,
        M=positions,
        SPLITS=1 if partial is None else partial.shape[1],
        COUT=channels,
        GIVEN=partial is None,
        BM=32,
        BN=16,
    )
    run(normalisation_kernel, triton.cdiv(channels, 16), args, FEW_PROGRAMS)
    return stats


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
    z, z_strides = (kept, nchw_strides(kept, order)) if pool else (map, nchw_strides(map, _NHWC))
    sums, du = _norm_sums(grad, z, z_strides, stats, eps, activation, act, order, given and needed, run)
    if not needed:
        return x.new_empty(0), weight.new_empty(0), sums
    if given:  # a block without a norm whose gradient has passed through it
        dx, dweight, _ = conv_block.backward(
            du, x, weight, codes, conv, 0, [], pool, order, plan, need_x, need_weight, False, run=run
        )
        return dx, dweight, sums

    y = None
    if map.numel():
        y = map.permute(0, 3, 1, 2)  # [N, C, OH, OW]
    elif plan == CHUNKED:
        y = library_convolution(x, weight, conv)
    args = dict(
        grad_ptr=grad,
        codes_ptr=codes,
        stats_ptr=stats,
        sums_ptr=sums,
        **output_sizes(conv_hw, size),
        **strides("g", nchw_strides(grad, order)),
        **pool_constants(pool),
        **activation_constants(activation, act),
        **code_constants(pool, channels),
        POOLED=bool(pool),
        EPS=eps,
    )
    dconv = _grad_map(x, weight, conv, y, args, run)
    dx, dweight, _ = library_backward(dconv, x, weight, conv, [need_x, need_weight, False])
    return dx, dweight, sums


def _norm_sums(grad, z, z_strides, stats, eps, activation, act, order, store, run) -> tuple[Tensor, Tensor]:
    """(the sums [2, C], the gradient of z at the argmax under given statistics).

    ``z`` is z at the argmax, ``z_strides`` its strides along N, C, H, W. The gradient has the dimensions of
    ``grad``; it has no element without ``store``.
    """
    channels = stats.shape[1]
    positions = grad.numel() // channels
    size = [grad.shape[list(order).index(axis)] for axis in (2, 3)]
    du = grad.new_empty(grad.shape if store else [0])
    bm, bn = 64, 32
    tiles = triton.cdiv(channels, bn)
    splits, tiles_per_split = split_sum(positions, bm, tiles)
    partial = stats.new_empty([2, splits, channels], dtype=float32)
    args = dict(
        grad_ptr=grad,
        z_ptr=z,
        stats_ptr=stats,
        du_ptr=du,
        partial_ptr=partial,
        PH=size[0],
        PW=size[1],
        SPLITS=splits,
        TILES_PER_SPLIT=tiles_per_split,
        **strides("g", nchw_strides(grad, order)),
        **strides("z", z_strides),
        **strides("d", nchw_strides(du, order) if store else (0, 0, 0, 0)),
        COUT=channels,
        **activation_constants(activation, act),
        STORE=store,
        BM=bm,
        BN=bn,
    )
    run(grad_norm_kernel, splits * tiles, over_positions(positions, args), REDUCTION)
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


def _grad_map(x, weight, conv, y, args: dict, run) -> Tensor:
    """The gradient of z under the batch's statistics: [N, C, OH, OW]. z is read from ``y`` or convolved."""
    dconv = x.new_empty([x.shape[0], weight.shape[0], args["OH"], args["OW"]])
    positions = x.shape[0] * args["OH"] * args["OW"]
    args = args | _z_args(x, weight, conv, y, 32) | dict(dconv_ptr=dconv, **strides("d", dconv.stride()))
    args = over_positions(positions, args)
    programs = triton.cdiv(positions, args["BM"]) * _channel_tiles(args)
    run(grad_map_kernel, programs, args, _z_options(args))
    return dconv


#: What says how a kernel convolves, to one that does not.
_OF_CONVOLUTION = (
    "CIN_G", "KH", "KW", "CONV_SH", "CONV_SW", "CONV_PH", "CONV_PW", "CONV_DH", "CONV_DW", "GROUPS",
)  # fmt: skip


def _z_args(x: Tensor, weight: Tensor, conv, y: Tensor | None, rows: int) -> dict:
    """What a kernel needs to read ``rows`` of z from ``y`` (N, C, OH, OW), or else to convolve them."""
    channels = weight.shape[0]
    if y is None:
        args = convolve_args(x, weight, conv)
        return args | dict(
            COUT=channels, CONVOLVES=True, BM=32, BN=convolve_width(x, channels // conv[6], args)
        )
    return dict(
        x_ptr=y,
        w_ptr=y,
        INNER=0,
        H=0,
        W=0,
        **strides("x", y.stride()),
        **strides("w", (0, 0, 0, 0), "ochw"),
        **dict.fromkeys(_OF_CONVOLUTION, 1),
        TF32=False,
        FLOAT32_PRODUCT=False,
        BK=16,
        COUT=channels,
        CONVOLVES=False,
        BM=rows,
        BN=tile_size(channels, 32),
    )


def _z_options(args: dict) -> dict:
    """Launch options of a kernel that reads z or convolves it, by its arguments."""
    if not args["CONVOLVES"]:
        return REDUCTION
    return WIDE_PRODUCT if args["WIDE"] else PRODUCT


def _channel_tiles(args: dict) -> int:
    return args["GROUPS"] * triton.cdiv(args["COUT"] // args["GROUPS"], args["BN"])


def _norm_args(like, bias, gamma, beta, mean, var, eps) -> dict:
    """A norm's parameters, ``like`` for those that it lacks: kernels do not read them."""
    given = dict(bias=bias, gamma=gamma, beta=beta, mean=mean, var=var)
    pointers = {f"{name}_ptr": like if t is None else t.contiguous() for name, t in given.items()}
    has = dict(HAS_BIAS=bias is not None, HAS_GAMMA=gamma is not None, HAS_BETA=beta is not None)
    return pointers | has | dict(EPS=eps)
