"""The block op in Triton: ``layout(max_pool(act(conv2d(x) + bias)))`` and its gradients.

For a position ``m = (n, ph, pw)`` of the pooled map and an element ``e = (i, j)`` of its pool window:

    at(m, e)  = (ph * POOL_SH - POOL_PH + i * POOL_DH, pw * POOL_SW - POOL_PW + j * POOL_DW)
    y(m, e)   = act(bias + weight . patch of x under at(m, e))       one value per channel
    out(m)    = max over e of y(m, e);   code(m) = the first such e, but the last NaN's
    dbias     = sum over m of grad(m) where the code names an element
    dconv(o)  = sum of grad(m) over the windows m whose argmax is o, a position of the convolution's output
    dweight   = sum over o of dconv(o)^T . patch of x under o
    dx        = transposed convolution of dconv with weight

A program computes a tile of positions (BM of them, M in all) by channels (BN). The window is a loop inside
it, so that the convolution's output exists in registers only. A product runs BK at a time along its inner
dimension. That dimension's length INNER is an argument because the assembler unrolls constant loops until
the registers are gone. Every sum has a fixed order: the same bits each run.

Strides are in elements and named after their axis, ``x_n, x_c, x_h, x_w`` for (N, C, H, W) and
``w_o, w_c, w_h, w_w`` for the weight. Offsets take 64 bits where WIDE.

This file holds the host functions, `conv_block_kernels.py` the kernels that they start.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from cnnlstm_fast.kernels.arguments import (
    FEW_WARPS,
    PASS,
    PRODUCT,
    WIDE_PRODUCT,
    activation_constants,
    code_constants,
    conv_constants,
    convolve_args,
    convolve_width,
    nchw_strides,
    other_passes,
    other_products,
    output_sizes,
    over_positions,
    pool_constants,
    product_constants,
    split_sum,
    strides,
    tile_size,
    window_elements,
)
from cnnlstm_fast.kernels.checks import check_bias, check_block, check_block_backward
from cnnlstm_fast.kernels.conv_block_kernels import (
    epilogue_kernel,
    forward_kernel,
    grad_bias_kernel,
    grad_input_kernel,
    grad_weight_kernel,
    max_unpool_kernel,
)
from cnnlstm_fast.kernels.launching import launch
from cnnlstm_fast.kernels.tuning import Choice
from cnnlstm_fast.ops.conv_block import keeps_codes
from cnnlstm_fast.spec import CODE_GROUP, CURVED, codes_shape, raw_shape

#: The values of ``plan``; CHUNKED leaves the convolution to the library.
DIRECT, CHUNKED = 1, 2


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
        The pooled map (N, C, PH, PW) permuted by ``order``, contiguous; its argmax codes and the slopes at
        the argmax, each with no element where it is not kept.

    ``run`` is what starts kernels, see :func:`cnnlstm_fast.kernels.launching.launch`.
    """
    conv_hw, size = check_block(x, weight, conv, activation, act, pool, order, plan)
    check_bias(x, weight, bias)
    batch, channels = x.shape[0], weight.shape[0]
    out = x.new_empty(raw_shape(order, batch, channels, size))
    keep_codes = keep and keeps_codes(activation, pool)
    kept = codes_shape(window_elements(pool), batch, channels, size) if keep_codes else [0]
    codes = x.new_empty(kept, dtype=torch.uint8)
    slopes = x.new_empty(out.shape if keep and activation >= CURVED else [0])
    if out.numel() == 0:
        return out, codes, slopes

    args = epilogue_args(out, codes, slopes, order, conv_hw, size, activation, act, pool) | dict(
        b_ptr=weight if bias is None else bias,
        b_o=0 if bias is None else bias.stride(0),
        HAS_BIAS=bias is not None,
        NORMED=False,
    )
    if plan == CHUNKED:
        epilogue(library_convolution(x, weight, conv), args, run)
    else:
        convolve_with_epilogue(x, weight, conv, args, run)
    return out, codes, slopes


def epilogue_args(out, codes, kept, order, conv_hw, size, activation, act, pool) -> dict:
    """The arguments of a kernel that ends in a block's result, but for those that say what it starts from.

    ``kept`` is what is kept of every argmax. It and ``codes`` have no element where they are not kept.
    """
    channels = out.shape[list(order).index(1)]
    return dict(
        out_ptr=out,
        codes_ptr=codes,
        kept_ptr=kept,
        **output_sizes(conv_hw, size),
        **strides("o", nchw_strides(out, order)),
        COUT=channels,
        **pool_constants(pool),
        **code_constants(pool, channels),
        **activation_constants(activation, act),
        KEEP_CODES=codes.numel() > 0,
        KEEP_AT_ARGMAX=kept.numel() > 0,
    )


def library_convolution(x: Tensor, weight: Tensor, conv) -> Tensor:
    """The convolution's output (N, C, OH, OW) as PyTorch's library computes it, without a bias."""
    return torch.ops.aten.convolution.default(
        _padded_after(x, conv), weight, None, conv[0:2], conv[2:4], conv[4:6], False, [0, 0], conv[6]
    )


def epilogue(y: Tensor, args: dict, run) -> None:
    """Compute the block from a convolution's output (N, C, OH, OW) of any strides.

    ``args`` are those of :func:`epilogue_args` and of the bias.
    """
    channels = args["COUT"]
    positions = args["out_ptr"].numel() // channels
    args = over_positions(positions, args | dict(y_ptr=y, **strides("y", y.stride()), BM=32, BN=32))
    programs = triton.cdiv(positions, 32) * triton.cdiv(channels, 32)
    run(epilogue_kernel, programs, args, PASS, other_passes(positions, channels, 32, 32))


def convolve_with_epilogue(x: Tensor, weight: Tensor, conv, args: dict, run) -> None:
    """Compute the block from x by one kernel; ``args`` are those of :func:`epilogue_args` and of the bias."""
    channels = args["COUT"]
    positions = args["out_ptr"].numel() // channels
    groups = conv[6]
    group_channels = channels // groups
    whole_code_groups = groups == 1 or group_channels % CODE_GROUP == 0
    args = args | convolve_args(x, weight, conv)
    # What a norm's training keeps of the argmax takes registers: half the height.
    bm = 32 if args["NORMED"] and args["KEEP_AT_ARGMAX"] else 64
    bn = convolve_width(x, group_channels, args) if whole_code_groups else CODE_GROUP
    tiles = groups * triton.cdiv(group_channels, bn) if whole_code_groups else triton.cdiv(channels, bn)
    args = over_positions(positions, args | dict(BM=bm, BN=bn))
    curved = args["KEEP_AT_ARGMAX"] and args["ACTIVATION"] >= CURVED
    options = WIDE_PRODUCT if args["WIDE"] or curved else PRODUCT
    others = other_products(positions, tiles, bm)
    run(forward_kernel, triton.cdiv(positions, bm) * tiles, args, options, others)


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
    if grad.numel() == 0:
        shapes = [list(x.shape), list(weight.shape), [weight.shape[0]]]
        dx, dweight, dbias = (
            x.new_zeros(shape if need else [0]) for shape, need in zip(shapes, needs, strict=True)
        )
        return dx, dweight, dbias
    if not keeps_codes(activation, pool):
        dconv = grad.permute([order.index(axis) for axis in range(4)])  # [N, CO, OH, OW]
        return library_backward(dconv, x, weight, conv, needs)

    channels = weight.shape[0]
    args = dict(
        grad_ptr=grad,
        codes_ptr=codes,
        PH=size[0],
        PW=size[1],
        **strides("g", nchw_strides(grad, order)),
        COUT=channels,
        **code_constants(pool, channels),
    )
    unpool_args = args | output_sizes(conv_hw, size) | pool_constants(pool)
    if plan == CHUNKED and (need_x or need_weight):
        dconv = _max_unpool(x, channels, conv_hw, unpool_args, run)
        return library_backward(dconv, x, weight, conv, needs)

    sizes = dict(H=x.shape[2], W=x.shape[3])
    product_args = unpool_args | sizes | conv_constants(weight, conv) | product_constants(x)
    dx, dweight, dbias = (x.new_empty(0) for _ in needs)
    if need_x:
        dx = _grad_input(x, weight, product_args, run)
    if need_weight:
        dweight = _grad_weight(x, weight, product_args, run)
    if need_bias:
        dbias = _grad_bias(weight, x.shape[0] * size[0] * size[1], args, run)
    return dx, dweight, dbias


def _grad_input(x: Tensor, weight: Tensor, args: dict, run) -> Tensor:
    dx = x.new_empty(x.shape)
    groups, group_channels = args["GROUPS"], weight.shape[1]
    bm, bn = 64, tile_size(group_channels, 64)
    positions = x.shape[0] * x.shape[2] * x.shape[3]
    args = args | dict(
        w_ptr=weight,
        dx_ptr=dx,
        INNER=weight.shape[0] // groups,
        **strides("w", weight.stride(), "ochw"),
        **strides("d", dx.stride()),
        BM=bm,
        BN=bn,
        BK=16,
    )
    tiles = groups * triton.cdiv(group_channels, bn)
    programs, others = triton.cdiv(positions, bm) * tiles, other_products(positions, tiles, bm)
    run(grad_input_kernel, programs, over_positions(positions, args), PRODUCT, others)
    return dx


def _grad_weight(x: Tensor, weight: Tensor, args: dict, run) -> Tensor:
    positions = x.shape[0] * args["OH"] * args["OW"]
    taps = math.prod(weight.shape[1:])
    groups, group_channels = args["GROUPS"], weight.shape[0] // args["GROUPS"]
    bm, bn, bk = 32, tile_size(group_channels, 64), tile_size(taps, 32)
    tiles = groups * triton.cdiv(group_channels, bn) * triton.cdiv(taps, bk)
    splits, tiles_per_split = split_sum(positions, bm, tiles)
    partial = weight.new_empty([splits, *weight.shape], dtype=torch.float32)
    args = args | dict(
        x_ptr=x,
        partial_ptr=partial,
        TILES_PER_SPLIT=tiles_per_split,
        **strides("x", x.stride()),
        BM=bm,
        BN=bn,
        BK=bk,
    )
    others = [Choice(splits * tiles, {}, FEW_WARPS)]
    run(grad_weight_kernel, splits * tiles, over_positions(positions, args), PRODUCT, others)
    return partial.sum(0).to(weight.dtype)


def _grad_bias(weight: Tensor, positions: int, args: dict, run) -> Tensor:
    channels = weight.shape[0]
    bm, bn = 64, 16
    tiles = triton.cdiv(channels, bn)
    splits, tiles_per_split = split_sum(positions, bm, tiles)
    partial = weight.new_empty([splits, channels], dtype=torch.float32)
    args = args | dict(partial_ptr=partial, TILES_PER_SPLIT=tiles_per_split, BM=bm, BN=bn)
    run(grad_bias_kernel, splits * tiles, over_positions(positions, args), PASS)
    return partial.sum(0).to(weight.dtype)


def _max_unpool(x: Tensor, channels: int, conv_hw: tuple[int, int], args: dict, run) -> Tensor:
    """The gradient of the convolution's output: [N, CO, OH, OW]."""
    dconv = x.new_empty([x.shape[0], channels, *conv_hw])
    positions = x.shape[0] * conv_hw[0] * conv_hw[1]
    bm, bn = 64, 16
    args = args | dict(dconv_ptr=dconv, **strides("d", dconv.stride()), BM=bm, BN=bn)
    programs = triton.cdiv(positions, bm) * triton.cdiv(channels, bn)
    others = other_passes(positions, channels, bm, bn)
    run(max_unpool_kernel, programs, over_positions(positions, args), PASS, others)
    return dconv


def library_backward(dconv, x, weight, conv, needs) -> tuple[Tensor, Tensor, Tensor]:
    """The contiguous gradients of x, weight and bias by PyTorch's library; no element where not needed."""
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
