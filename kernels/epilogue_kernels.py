"""The kernels of the op ``epilogue``; ``epilogue.py`` has the host functions that start them.

A program is up to five stages, in this order: an activation (FIRST), a norm, an activation (SECOND), a sum
and an activation (LAST). An activation of 0 is none. An instance works on a tile of BM positions and BN
channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cnnlstm_fast.kernels.common import activate, add, load_float32, multiply_slope


@triton.jit
def tile_offsets(POSITIONS, S, C, n_stride, s_stride, c_stride, BM: tl.constexpr, BN: tl.constexpr):
    """This instance's tile: (offsets [BM, BN], whether there is such an element, channels, number)."""
    tiles_c = (C + BN - 1) // BN
    pid = tl.program_id(0)
    tile = pid // tiles_c
    m = (tile * BM + tl.arange(0, BM)).to(tl.int64)
    c = pid % tiles_c * BN + tl.arange(0, BN)
    ok = (m < POSITIONS)[:, None] & (c < C)[None, :]
    at = (m // S * n_stride + m % S * s_stride)[:, None] + (c.to(tl.int64) * c_stride)[None, :]
    return at, ok, c, tile


@triton.jit
def load_parameter(stats_ptr, row, c, C):
    """A row of the statistics (4, C), or of the gradients' (2, C), as float32 [1, BN]."""
    return tl.load(stats_ptr + row * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def before_sum(
    z, c, C, stats_ptr, NORM: tl.constexpr, FIRST: tl.constexpr, FIRST_A: tl.constexpr, FIRST_B: tl.constexpr
):
    """(the norm's argument, the second activation's)."""
    u, _ = activate(z, FIRST, FIRST_A, FIRST_B)
    v = u
    if NORM:
        v = u * load_parameter(stats_ptr, 2, c, C) + load_parameter(stats_ptr, 3, c, C)
    return u, v


@triton.jit
def passes(v, ACTIVATION: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Whether the slope of an activation of two slopes is 1; NaN passes those that clamp."""
    passed = v > 0
    if ACTIVATION == 1:
        passed = (v <= 0) == 0
    elif ACTIVATION == 2:
        passed = ((v <= A) | (v >= B)) == 0
    return passed


@triton.jit
def grad_by_bits(grad, passed, ACTIVATION: tl.constexpr, A: tl.constexpr):
    stopped = 0.0
    if ACTIVATION == 3:
        stopped = grad * A
    return tl.where(passed, grad, stopped)


@triton.jit
def grad_through(grad, v, ACTIVATION: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """The gradient of an activation's argument ``v``; clamping ones select, the curved ones multiply."""
    if ACTIVATION == 1 or ACTIVATION == 2:
        grad = tl.where(passes(v, ACTIVATION, A, B), grad, 0.0)
    elif ACTIVATION > 0:
        grad = multiply_slope(grad, v, ACTIVATION, A, B)
    return grad


@triton.jit
def moments_kernel(
    z_ptr, partial_ptr, POSITIONS, S, C, TILES, n_stride, s_stride, c_stride,
    FIRST: tl.constexpr, FIRST_A: tl.constexpr, FIRST_B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Mean and squares about it of a tile's positions, per channel: partial [2, TILES, C] in float64."""
    at, ok, c, tile = tile_offsets(POSITIONS, S, C, n_stride, s_stride, c_stride, BM, BN)
    u, _ = activate(load_float32(z_ptr + at, ok), FIRST, FIRST_A, FIRST_B)
    count = tl.minimum(BM, POSITIONS - tile * BM)
    mean = tl.reduce(tl.where(ok, u, 0.0), 0, add) / count
    off = tl.where(ok, u - mean[None, :], 0.0)
    # The mean's rounding is taken off again.
    mend = tl.reduce(off, 0, add) / count
    squares = tl.reduce(off * off, 0, add) - mend * mend * count
    to = partial_ptr + tile.to(tl.int64) * C + c
    tl.store(to, mean.to(tl.float64) + mend, mask=c < C)
    tl.store(to + TILES.to(tl.int64) * C, squares.to(tl.float64), mask=c < C)


@triton.jit
def forward_kernel(
    z_ptr, added_ptr, out_ptr, passed_ptr, stats_ptr, POSITIONS, S, C, n_stride, s_stride, c_stride,
    NORM: tl.constexpr, ADD: tl.constexpr, ALPHA: tl.constexpr, KEEP: tl.constexpr,
    FIRST: tl.constexpr, FIRST_A: tl.constexpr, FIRST_B: tl.constexpr,
    SECOND: tl.constexpr, SECOND_A: tl.constexpr, SECOND_B: tl.constexpr,
    LAST: tl.constexpr, LAST_A: tl.constexpr, LAST_B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    at, ok, c, _ = tile_offsets(POSITIONS, S, C, n_stride, s_stride, c_stride, BM, BN)
    z = load_float32(z_ptr + at, ok)
    _, v = before_sum(z, c, C, stats_ptr, NORM, FIRST, FIRST_A, FIRST_B)
    v, _ = activate(v, SECOND, SECOND_A, SECOND_B)
    if ADD:
        v += ALPHA * load_float32(added_ptr + at, ok)
    if KEEP:
        tl.store(passed_ptr + at, passes(v, LAST, LAST_A, LAST_B).to(tl.uint8), mask=ok)
    v, _ = activate(v, LAST, LAST_A, LAST_B)
    tl.store(out_ptr + at, v.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def backward_kernel(
    grad_ptr, z_ptr, passed_ptr, stats_ptr, grads_ptr, grad_z_ptr, grad_added_ptr, partial_ptr,
    POSITIONS, S, C, TILES, n_stride, s_stride, c_stride,
    READS_Z: tl.constexpr, NORM: tl.constexpr, OF_BATCH: tl.constexpr, BITS: tl.constexpr,
    TO_Z: tl.constexpr, TO_ADDED: tl.constexpr, SUMS: tl.constexpr, ALPHA: tl.constexpr,
    FIRST: tl.constexpr, FIRST_A: tl.constexpr, FIRST_B: tl.constexpr,
    SECOND: tl.constexpr, SECOND_A: tl.constexpr, SECOND_B: tl.constexpr,
    LAST: tl.constexpr, LAST_A: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of z and of the added tensor; or, with SUMS, the sums of du and of du * (u - mean) of a tile.

    ``grads_ptr`` has the mean of du and the slope of the gradient along u - mean (2, C). Sums are partial
    [2, TILES, C] in float64.
    """
    at, ok, c, tile = tile_offsets(POSITIONS, S, C, n_stride, s_stride, c_stride, BM, BN)
    grad = load_float32(grad_ptr + at, ok)
    z = grad
    if READS_Z:
        z = load_float32(z_ptr + at, ok)
    u, v = before_sum(z, c, C, stats_ptr, NORM, FIRST, FIRST_A, FIRST_B)
    if BITS:
        grad = grad_by_bits(grad, tl.load(passed_ptr + at, mask=ok, other=0) != 0, LAST, LAST_A)
    if TO_ADDED:
        tl.store(grad_added_ptr + at, (ALPHA * grad).to(grad_added_ptr.dtype.element_ty), mask=ok)
    grad = grad_through(grad, v, SECOND, SECOND_A, SECOND_B)
    if SUMS:
        off = u - load_parameter(stats_ptr, 0, c, C)
        du = tl.where(ok, grad, 0.0)
        to = partial_ptr + tile.to(tl.int64) * C + c
        tl.store(to, tl.reduce(du.to(tl.float64), 0, add), mask=c < C)
        with_u = tl.where(ok, grad * off, 0.0).to(tl.float64)
        tl.store(to + TILES.to(tl.int64) * C, tl.reduce(with_u, 0, add), mask=c < C)
    if TO_Z:
        if NORM:
            if OF_BATCH:
                off = u - load_parameter(stats_ptr, 0, c, C)
                grad = grad - load_parameter(grads_ptr, 0, c, C) - off * load_parameter(grads_ptr, 1, c, C)
            grad = grad * load_parameter(stats_ptr, 2, c, C)
        grad = grad_through(grad, z, FIRST, FIRST_A, FIRST_B)
        tl.store(grad_z_ptr + at, grad.to(grad_z_ptr.dtype.element_ty), mask=ok)
