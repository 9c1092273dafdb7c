"""The op ``epilogue`` in Triton: norm, sum and activations in one pass, and their gradients.

A forward reads z and the added tensor once and writes the result; statistics of the batch take a pass before
it. A backward takes one pass, and with a norm one before it for the sums per channel. The sum exists
nowhere: what a backward reads of it is a byte per element, whether the last activation's slope is 1.

This file holds the host functions, `epilogue_kernels.py` the kernels that they start.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor, float64, uint8

from cnnlstm_fast.kernels.epilogue_kernels import backward_kernel, forward_kernel, moments_kernel
from cnnlstm_fast.kernels.launching import launch
from cnnlstm_fast.spec import ADD_STAGE, FIRST_ACTIVATION, NORM_STAGE, canonical_stages, keeps_bits

_WARPS = {"num_warps": 4}


def _map_args(z: Tensor) -> dict:
    """Sizes, strides and tiles of a map (N, C, ...), contiguous or channels-last."""
    n, c, s = z.shape[0], z.shape[1], math.prod(z.shape[2:])
    inside = s == 1 or not z.is_contiguous()
    strides = dict(s_stride=c, c_stride=1) if inside else dict(s_stride=1, c_stride=s)
    tile = dict(BM=16, BN=64) if inside else dict(BM=128, BN=8)
    return dict(POSITIONS=n * s, S=s, C=c, n_stride=c * s, **strides, **tile)


def _programs(args: dict) -> tuple[int, int]:
    """Tiles of positions, and all programs."""
    tiles = triton.cdiv(args["POSITIONS"], args["BM"])
    return tiles, tiles * triton.cdiv(args["C"], args["BN"])


def _stage_args(stages: list[int], numbers: list[float]) -> dict:
    """The stages as the kernels have them."""
    slots = canonical_stages(stages)
    if slots is None:
        raise RuntimeError(f"epilogue: stages {stages} are in an order that the CUDA kernels don't take")
    args: dict = dict(NORM=NORM_STAGE in stages, ADD=ADD_STAGE in stages, ALPHA=1.0)
    if ADD_STAGE in stages:
        args["ALPHA"] = numbers[2 * stages.index(ADD_STAGE)]
    for name, at in zip(("FIRST", "SECOND", "LAST"), slots, strict=True):
        a, b = (0.0, 0.0) if at is None else numbers[2 * at : 2 * at + 2]
        args |= {name: 0 if at is None else stages[at] - FIRST_ACTIVATION, f"{name}_A": a, f"{name}_B": b}
    return args


def _some(args: dict, names: str) -> dict:
    return {name: args[name] for name in names.split()}


_TILE = "POSITIONS S C n_stride s_stride c_stride BM BN"
_FIRST = "FIRST FIRST_A FIRST_B"


def moments(z: Tensor, stages: list[int], numbers: list[float], run=launch) -> Tensor:
    """The op ``cnnlstm_fast::epilogue_moments``: mean and biased variance per channel, float64 (2, C)."""
    args = _map_args(z) | _stage_args(stages, numbers)
    tiles, programs = _programs(args)
    partial = z.new_empty([2, tiles, z.shape[1]], dtype=float64)
    shared = _some(args, f"{_TILE} {_FIRST}")
    run(moments_kernel, programs, dict(z_ptr=z, partial_ptr=partial, TILES=tiles, **shared), _WARPS)
    # T. Chan, G. Golub and R. LeVeque, Algorithms for computing the sample variance (1983)
    positions = args["POSITIONS"]
    counts = torch.full([tiles, 1], float(args["BM"]), dtype=float64, device=z.device)
    counts[-1] = positions - (tiles - 1) * args["BM"]
    mean = (counts * partial[0]).sum(0) / positions
    squares = (partial[1] + counts * (partial[0] - mean).square()).sum(0)
    return torch.stack([mean, squares / positions])


def forward(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    found: Tensor | None,
    added: Tensor | None,
    stages: list[int],
    numbers: list[float],
    eps: float,
    keep: bool,
    run=launch,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``cnnlstm_fast::epilogue``, whose file explains the arguments; ``found`` are its ``moments``.

    ``run`` is what starts kernels, see :func:`cnnlstm_fast.kernels.launching.launch`.
    """
    args = _map_args(z) | _stage_args(stages, numbers)
    stats = z.new_empty([0], dtype=float64)
    if args["NORM"]:
        if mean is None or var is None:
            mean, var = moments(z, stages, numbers, run) if found is None else found
        mean, var = mean.double(), var.double()
        scale = (var + eps).rsqrt()
        scale = scale if gamma is None else scale * gamma
        shift = -mean * scale if beta is None else beta - mean * scale
        stats = torch.stack([mean, var, scale, shift])
    out = torch.empty_like(z)
    bits = keep and keeps_bits(stages)
    passed = z.new_empty([z.numel() if bits else 0], dtype=uint8)
    pointers = dict(
        z_ptr=z, added_ptr=z if added is None else added, out_ptr=out, passed_ptr=passed, stats_ptr=stats
    )
    run(forward_kernel, _programs(args)[1], pointers | args | dict(KEEP=bits), _WARPS)
    return out, passed, stats


def backward(
    grad: Tensor,
    z: Tensor | None,
    passed: Tensor,
    stats: Tensor,
    stages: list[int],
    numbers: list[float],
    eps: float,
    given: bool,
    need_z: bool,
    need_added: bool,
    run=launch,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``cnnlstm_fast::epilogue_backward``, whose file explains the arguments."""
    args = _map_args(grad) | _stage_args(stages, numbers)
    del args["ADD"], args["LAST_B"]
    tiles, programs = _programs(args)
    dz = torch.empty_like(grad) if need_z else grad.new_empty(0)
    dadded = torch.empty_like(grad) if need_added else grad.new_empty(0)
    sums = grad.new_empty([0], dtype=float64)
    summed = args["NORM"] and z is not None
    partial = grad.new_empty([2, tiles if summed else 0, grad.shape[1]], dtype=float64)
    args |= dict(
        grad_ptr=grad, z_ptr=grad if z is None else z, passed_ptr=passed, stats_ptr=stats, grads_ptr=stats,
        grad_z_ptr=dz, grad_added_ptr=dadded, partial_ptr=partial, TILES=tiles, READS_Z=z is not None,
        OF_BATCH=not given, BITS=keeps_bits(stages),
    )  # fmt: skip
    if summed:
        run(backward_kernel, programs, args | dict(SUMS=True, TO_Z=False, TO_ADDED=need_added), _WARPS)
        total = partial.sum(1)
        inverse = (stats[1] + eps).rsqrt()
        # The kernel took the mean as float32; an infinite sum has nothing to mend.
        off = stats[0].float().double() - stats[0]
        mend = torch.where(total[0].isfinite(), total[0] * off, 0)
        sums = torch.stack([inverse * (total[1] + mend), total[0]])
        slope = inverse * sums[0] / args["POSITIONS"]
        mend = torch.where(slope.isfinite(), slope * off, 0)
        args["grads_ptr"] = torch.stack([total[0] / args["POSITIONS"] + mend, slope])
    if need_z or (need_added and not summed):
        to_added = need_added and not summed
        run(backward_kernel, programs, args | dict(SUMS=False, TO_Z=need_z, TO_ADDED=to_added), _WARPS)
    return dz, dadded, sums
