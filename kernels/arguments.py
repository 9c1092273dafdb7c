"""The arguments, tiles and options with which host functions launch the kernels of a block.

The arguments of a launch are one dict by parameter name, merged from the parts that the functions below give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from cnnlstm_fast.kernels.tuning import Choice
from cnnlstm_fast.spec import CODE_GROUP, NIBBLE_WINDOW

#: Tensors of this reach, or as many positions, take 64-bit offsets; 2**31 less what a last tile overhangs.
NARROW_REACH = 2**31 - 2**20

#: How many programs the sums over all positions are split into, about: a function of the shapes alone,
#: because the split decides the order of summation and so the last bits.
REDUCTION_PROGRAMS = 512

# The interpreter holds bfloat16 as raw bits, which its product would take for integers.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# ---------------------------------------------------------------- launch options and choices of tiles

#: Launch options of kernels that multiply. Without a limit on registers the assembler spills a few for
#: occupancy, each of its versions in other kernels.
PRODUCT = dict(num_warps=8, num_stages=1, maxnreg=128)
WIDE_PRODUCT = dict(num_warps=8, num_stages=1, maxnreg=255)
#: Another choice for a product: half the warps for the same tile.
FEW_WARPS = dict(num_warps=4, num_stages=1, maxnreg=255)

#: Launch options of kernels that only read, compute and write elements.
PASS = dict(num_warps=4, num_stages=1)
#: Of those that reduce their tiles too: more warps hide the wait at each barrier.
REDUCTION = dict(num_warps=8, num_stages=1, maxnreg=255)
#: Of passes of few programs, for which the assembler need not save registers. It calls a float64 root or
#: quotient, and left to itself it spills around the call: which kernels do depends on the version of Triton.
FEW_PROGRAMS = PASS | dict(maxnreg=255)


def tile_size(size: int, largest: int) -> int:
    """The power of two from 16 to ``largest`` that covers ``size`` best."""
    return min(max(triton.next_power_of_2(size), 16), largest)


def other_passes(positions: int, channels: int, bm: int, bn: int) -> list[Choice]:
    """Choices of a pass over positions by channels beside the one of ``bm`` by ``bn``."""
    return [
        Choice(triton.cdiv(positions, m) * triton.cdiv(channels, n), dict(BM=m, BN=n), PASS)
        for m, n in ((64, 16), (32, 32), (16, 64))
        if (m, n) != (bm, bn) and n <= tile_size(channels, 64)
    ]


def other_products(positions: int, tiles: int, bm: int) -> list[Choice]:
    """Choices of a product beside the one of ``bm`` positions a program, ``tiles`` programs for each of them.

    None has fewer rows than the default: Hopper's wide instructions, whose last bits are their own, want 64.
    """
    found = [Choice(triton.cdiv(positions, bm) * tiles, dict(BM=bm), FEW_WARPS)]
    if bm == 64:
        found.append(Choice(triton.cdiv(positions, 128) * tiles, dict(BM=128), WIDE_PRODUCT))
    return found


def split_sum(positions: int, bm: int, tiles: int) -> tuple[int, int]:
    """(splits, tiles of ``bm`` positions in each) of a sum over positions with ``tiles`` tiles of results."""
    m_tiles = triton.cdiv(positions, bm)
    per_split = triton.cdiv(m_tiles, max(1, min(m_tiles, REDUCTION_PROGRAMS // tiles)))
    return triton.cdiv(m_tiles, per_split), per_split


# ---------------------------------------------------------------- parts of the arguments


def over_positions(positions: int, args: dict) -> dict:
    """``args`` with M, the number of positions, and WIDE: whether offsets take 64 bits.

    They do where any tensor in ``args`` reaches too far.
    """
    wide = positions >= NARROW_REACH
    for value in args.values():
        # Asking the type of a number first is faster: most arguments are numbers.
        if type(value) not in _NUMBERS and isinstance(value, Tensor):
            wide = wide or _reaches_far(value)
    return args | dict(M=positions, WIDE=wide)


_NUMBERS = frozenset((int, bool, float))


def _reaches_far(t: Tensor) -> bool:
    """Whether the offset of its last element is beyond NARROW_REACH."""
    elements = t.numel()
    if type(elements) is int and t.is_contiguous():  # not asked of sizes that a trace leaves open
        return elements > NARROW_REACH
    reach = 0
    for size, stride in zip(t.shape, t.stride(), strict=True):
        reach += (size - 1) * stride
    return reach >= NARROW_REACH


def strides(prefix: str, values: Sequence[int], axes: str = "nchw") -> dict:
    """``values`` as arguments, those of the prefix "x" by the names x_n, x_c, x_h, x_w."""
    return {f"{prefix}_{axis}": value for axis, value in zip(axes, values, strict=True)}


def nchw_strides(t: Tensor, order: Sequence[int]) -> list[int]:
    """Strides along N, C, H, W of a tensor whose dimensions are those axes in ``order``."""
    return [t.stride(list(order).index(axis)) for axis in range(4)]


def output_sizes(conv_hw: tuple[int, int], pooled_hw: tuple[int, int]) -> dict:
    """The sizes of the convolution's output and of the pooled map."""
    return dict(OH=conv_hw[0], OW=conv_hw[1], PH=pooled_hw[0], PW=pooled_hw[1])


def conv_constants(weight: Tensor, conv: Sequence[int]) -> dict:
    names = ("CONV_SH", "CONV_SW", "CONV_PH", "CONV_PW", "CONV_DH", "CONV_DW", "GROUPS")
    return dict(
        CIN_G=weight.shape[1],
        KH=weight.shape[2],
        KW=weight.shape[3],
        **dict(zip(names, conv[:7], strict=True)),
    )


def pool_constants(pool: Sequence[int]) -> dict:
    names = ("POOL_KH", "POOL_KW", "POOL_SH", "POOL_SW", "POOL_PH", "POOL_PW", "POOL_DH", "POOL_DW")
    return dict(zip(names, pool[:8] if pool else (1, 1, 1, 1, 0, 0, 1, 1), strict=True))


def window_elements(pool: Sequence[int]) -> int:
    return pool[0] * pool[1] if pool else 1


def code_constants(pool: Sequence[int], channels: int) -> dict:
    nibbles = window_elements(pool) <= NIBBLE_WINDOW
    return dict(NIBBLES=nibbles, CODE_GROUPS=triton.cdiv(channels, CODE_GROUP))


def activation_constants(activation: int, act: Sequence[float]) -> dict:
    return dict(ACTIVATION=activation, ACT_A=act[0] if act else 0.0, ACT_B=act[1] if len(act) > 1 else 0.0)


def product_constants(x: Tensor) -> dict:
    """TF32 where PyTorch's own flags allow a convolution to use it."""
    cudnn: Any = torch.backends.cudnn
    allowed = cudnn.conv.fp32_precision == "tf32"
    return dict(TF32=allowed and x.dtype == torch.float32, FLOAT32_PRODUCT=INTERPRETED)


def convolve_args(x: Tensor, weight: Tensor, conv: Sequence[int]) -> dict:
    """What :func:`cnnlstm_fast.kernels.common.convolve` needs of its caller, but for BM and BN."""
    taps = math.prod(weight.shape[1:])
    return dict(
        x_ptr=x,
        w_ptr=weight,
        INNER=taps,
        H=x.shape[2],
        W=x.shape[3],
        **strides("x", x.stride()),
        **strides("w", weight.stride(), "ochw"),
        **conv_constants(weight, conv),
        **product_constants(x),
        BK=tile_size(taps, 64 // x.element_size()),
    )


def convolve_width(x: Tensor, group_channels: int, args: dict) -> int:
    """The BN of a tile that :func:`cnnlstm_fast.kernels.common.convolve` computes with ``args``."""
    # A float32 product without tensor cores needs registers for its operands: half the width.
    widest = 32 if x.dtype == torch.float32 and not args["TF32"] else 64
    return tile_size(group_channels, widest)
