"""What the tests of the Triton kernels of blocks share; without Triton, whoever imports it is skipped."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from helpers import SEED, Block, PoolCase, as_2d, random_block
from torch import Tensor

triton = pytest.importorskip("triton", reason="needs Triton")
PLANS = {"direct": 1, "chunked": 2}
ORDERS = list(itertools.permutations(range(4)))
plans = pytest.mark.parametrize("plan", PLANS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

#: Number and numbers of every activation in tests/helpers.py, as the op takes them.
ACTIVATION_ARGS = {
    None: (0, []),
    "relu": (1, []),
    "hardtanh": (2, [-2.0, 3.0]),
    "relu6": (2, [0.0, 6.0]),
    "leaky": (3, [0.1]),
    "size": (3, [-1.0]),
    "elu": (4, [0.7]),
    "tanh": (5, []),
    "sigmoid": (6, []),
    "silu": (7, []),
    "gelu": (8, []),
    "gelu_tanh": (9, []),
    "softplus": (10, [8.0, 14.0]),
    "mish": (11, []),
    "hardswish": (12, []),
    "hardsigmoid": (13, []),
}


def _op_args(block: Block) -> tuple[list[int], int, list[float], list[int]]:
    p = block.pool
    pool = [] if p is None else [*p.kernel, *p.stride, *p.padding, *p.dilation, int(p.ceil_mode)]
    conv = [*block.stride, *block.padding, *block.dilation, block.groups]
    return conv, *ACTIVATION_ARGS[block.activation], pool


def _interpreter_steps(block: Block) -> int:
    """How many steps of a program's inner loop the interpreter takes for a block, about (ms each)."""
    block, _ = as_2d(block, {})
    _, _, *size = block.out_shape()
    taps = math.prod(block.kernel)
    c_out, c_in = block.c_out // block.groups, block.c // block.groups
    window = math.prod(block.pool.kernel) if block.pool else 1
    positions, inputs = block.n * math.prod(size), block.n * math.prod(block.size)
    forward = -(-positions // 64) * max(block.groups, -(-block.c_out // 32)) * window * -(-taps * c_in // 16)
    to_weight = -(-inputs // 32) * block.groups * -(-c_out // 64) * -(-taps * c_in // 32) * window
    to_input = -(-inputs // 64) * block.groups * -(-c_in // 64) * taps * -(-c_out // 16) * window
    return forward + to_weight + to_input


def _small_blocks(count: int, **fixed):
    rng = random.Random(f"{SEED} triton {count}")
    found = []
    while len(found) < count:
        block = random_block(rng, **fixed)
        if _interpreter_steps(block) <= 60:
            found.append(block)
    return pytest.mark.parametrize("block", found, ids=[str(i) for i in range(count)])


def _on(device: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on a device with the strides they have."""

    def moved(t):
        shape = [1 if stride == 0 else size for size, stride in zip(t.shape, t.stride(), strict=True)]
        there = torch.empty_strided(shape, t.stride(), dtype=t.dtype, device=device)
        return there.copy_(t[tuple(slice(size) for size in shape)]).expand(t.shape)

    return tensors if device == "cpu" else {name: moved(t) for name, t in tensors.items()}


def _decode(codes: Tensor, window: int, channels: int) -> Tensor:
    """Argmax codes (N, H, W, groups, bytes) as elements of windows (N, C, H, W), -1 where nothing passed."""
    codes = codes.cpu().int()
    if window <= 14:
        codes = torch.cat([codes & 15, codes >> 4], -1)
        codes = torch.where(codes == 15, -1, codes)
    else:
        assert codes.shape[-1] == 16
        codes = torch.where(codes == 255, -1, codes)
    return codes.flatten(3)[..., :channels].movedim(-1, 1)


def _window(block: Block) -> int:
    return math.prod(block.pool.kernel) if block.pool else 1


def _without_cudnn():
    """On a device `chunked` then multiplies patches, without transforms that round or spread NaNs."""
    return torch.backends.cudnn.flags(enabled=False, allow_tf32=False)


# ---------------------------------------------------------------- numbers


TUTORIAL = Block(2, 3, (5, 6), 20, (3, 3), padding=(1, 1), pool=PoolCase((2, 2), (2, 2), (0, 0), (1, 1)))

SPECIAL_BLOCKS = {
    "bare": replace(TUTORIAL, activation=None, pool=None),
    "no pool": replace(TUTORIAL, pool=None),
    "no activation": replace(TUTORIAL, activation=None, bias=False),
    "14 elements": Block(1, 2, (4, 15), 17, (1, 2), pool=PoolCase((2, 7), (1, 4), (1, 3), (1, 1))),
    "15 elements": Block(1, 2, (9, 7), 17, (2, 1), pool=PoolCase((5, 3), (3, 2), (2, 1), (1, 1), True)),
    "254 elements": Block(1, 1, (2, 128), 3, (1, 2), pool=PoolCase((2, 127), (2, 127), (0, 0), (1, 1))),
    "gaps": Block(2, 2, (9, 8), 5, (2, 2), pool=PoolCase((1, 2), (3, 3), (0, 0), (1, 1))),
    "dilated pool": Block(1, 2, (8, 9), 5, (2, 2), pool=PoolCase((2, 2), (1, 2), (0, 1), (2, 3), True)),
    "dilated strided": Block(2, 2, (11, 12), 18, (2, 3), (3, 2), (1, 2), (2, 3)),
    "depthwise": Block(1, 6, (5, 6), 6, (3, 3), padding=(1, 1), groups=6, pool=TUTORIAL.pool),
    "groups across code groups": Block(1, 6, (5, 4), 33, (2, 2), groups=3, pool=TUTORIAL.pool),
    "groups of whole code groups": Block(1, 4, (5, 4), 96, (2, 2), groups=2, pool=TUTORIAL.pool),
    "one of everything": Block(1, 1, (1, 1), 1, (1, 1), pool=PoolCase((1, 1), (1, 1), (0, 0), (1, 1))),
}


# ---------------------------------------------------------------- on a device


compiled = pytest.mark.parametrize("kernels", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
