"""What the tests of the block share: random blocks, PyTorch's own ways, and the numbers rule.

Everything expected here is computed without the package: convolutions and pools by PyTorch,
layouts by indexing, winners by gathering windows.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forked import run_forked
from torch import Tensor, nn

import cnnlstm_fast
from cnnlstm_fast import _ext
from cnnlstm_fast.functional import conv_block
from cnnlstm_fast.planning.rates import library_has_amx

SEED = int(os.environ["CNNLSTM_FAST_SEED"])  # conftest.py sets it

FUSED = ("direct", "chunked")
PLANS = (*FUSED, "reference", "auto")
LAYOUTS = (
    "channels_first", "channels_last", "locations", "locations_time_major", "features",
    "columns", "columns_time_major", "rows", "rows_time_major", "columns_channels_last",
    "columns_channels_last_time_major", "rows_channels_last", "rows_channels_last_time_major",
)  # fmt: skip

#: The processor's unit for bfloat16, or what the environment puts in its place; "" where there is none.
UNIT = torch.ops.cnnlstm_fast.bfloat16_unit() if _ext.loaded else ""
needs_extension = pytest.mark.skipif(not _ext.loaded, reason=f"needs the compiled kernels: {_ext.error}")
plans = pytest.mark.parametrize(
    "plan", [pytest.param(p, marks=needs_extension if p in FUSED else ()) for p in PLANS]
)
fused_plans = pytest.mark.parametrize("plan", [pytest.param(p, marks=needs_extension) for p in FUSED])
floats = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


# ---------------------------------------------------------------- blocks


@dataclass(frozen=True)
class PoolCase:
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False


POOL_2X2 = PoolCase((2, 2), (2, 2), (0, 0), (1, 1))


@dataclass(frozen=True)
class Activation:
    """An activation, where its slope jumps, and the values of z beyond which it has none."""

    module: nn.Module
    kinks: tuple[float, ...] = ()
    flat_below: float = -math.inf
    flat_above: float = math.inf


ACTIVATIONS = {
    None: Activation(nn.Identity()),
    "relu": Activation(nn.ReLU(), (0.0,), 0.0),
    "hardtanh": Activation(nn.Hardtanh(-2.0, 3.0), (-2.0, 3.0), -2.0, 3.0),
    "relu6": Activation(nn.ReLU6(), (0.0, 6.0), 0.0, 6.0),
    "leaky": Activation(nn.LeakyReLU(0.1), (0.0,)),
    "size": Activation(nn.LeakyReLU(-1), (0.0,)),  # |z|: exact in whole numbers, and in no order
    "elu": Activation(nn.ELU(0.7), (0.0,)),
    "tanh": Activation(nn.Tanh()),
    "sigmoid": Activation(nn.Sigmoid()),
    "silu": Activation(nn.SiLU()),
    "gelu": Activation(nn.GELU()),
    "gelu_tanh": Activation(nn.GELU(approximate="tanh")),
    "softplus": Activation(nn.Softplus(8, 14)),  # straight above 1.75, an eps away from the curve
    "mish": Activation(nn.Mish()),
    "hardswish": Activation(nn.Hardswish(), (-3.0, 3.0)),
    "hardsigmoid": Activation(nn.Hardsigmoid(), (-3.0, 3.0)),
}
CURVED = tuple(ACTIVATIONS)[4:]


def activate(block: Block, y: Tensor) -> Tensor:
    return ACTIVATIONS[block.activation].module(y)


@dataclass(frozen=True)
class Block:
    """A block and the size of its input; all tuples have one entry per spatial dimension."""

    n: int
    c: int
    size: tuple[int, ...]
    c_out: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    bias: bool = True
    activation: str | None = "relu"  # a key of ACTIVATIONS
    pool: PoolCase | None = None

    @property
    def rank(self) -> int:
        return 2 + len(self.size)

    def pool_module(self) -> nn.Module | None:
        if self.pool is None:
            return None
        p = self.pool
        kind = nn.MaxPool2d if self.rank == 4 else nn.MaxPool1d
        return kind(p.kernel, p.stride, p.padding, p.dilation, ceil_mode=p.ceil_mode)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {
            "x": (self.n, self.c, *self.size),
            "weight": (self.c_out, self.c // self.groups, *self.kernel),
        }
        return shapes | {"bias": (self.c_out,)} if self.bias else shapes

    def out_shape(self) -> tuple[int, ...] | None:
        """Shape that PyTorch gives, or None where PyTorch refuses."""
        tensors = {k: torch.empty(s, device="meta") for k, s in self.shapes().items()}
        try:
            return tuple(torch_block(self, **tensors).shape)
        except RuntimeError:
            return None


def torch_block(block: Block, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The block as PyTorch writes it, in channels-first shape."""
    two_d = weight.dim() == 4
    conv, max_pool = (F.conv2d, F.max_pool2d) if two_d else (F.conv1d, F.max_pool1d)
    options = block.stride, block.padding, block.dilation, block.groups
    if faulty_in_bfloat16(block, x):
        given = [None if t is None else t.float() for t in (x, weight, bias)]
        y = conv(*given, *options).to(x.dtype)
    else:
        y = conv(x, weight, bias, *options)
    y = activate(block, y)
    p = block.pool
    return y if p is None else max_pool(y, p.kernel, p.stride, p.padding, p.dilation, p.ceil_mode)


def faulty_in_bfloat16(block: Block, x: Tensor) -> bool:
    """Whether PyTorch's own convolution reads unwritten memory here, or crashes: AMX has such shapes."""
    if x.dtype != torch.bfloat16 or not x.is_cpu or not _ext.loaded or not library_has_amx():
        return False
    sides = [*zip(block.size, block.kernel, block.dilation, block.padding, block.stride, strict=True)]
    longer = any(d * (k - 1) >= size and (k > 3 or d > 1 or pad >= k) for size, k, d, pad, _ in sides)
    size, k, d, pad, stride = sides[-1]
    return longer or 1 in (size, (size + 2 * pad - d * (k - 1) - 1) // stride + 1)


def our_activation(block: Block) -> str | nn.Module | None:
    """The activation as functional.conv_block takes it: the plainest form there is."""
    plain = block.activation in (
        None, "relu", "tanh", "sigmoid", "silu", "gelu", "relu6", "mish", "hardswish", "hardsigmoid",
    )  # fmt: skip
    return block.activation if plain else ACTIVATIONS[block.activation].module


def our_block(block: Block, x, weight, bias=None, *, plan: str, layout: str = "channels_first") -> Tensor:
    return conv_block(
        x, weight, bias, stride=block.stride, padding=block.padding, dilation=block.dilation,
        groups=block.groups, activation=our_activation(block), pool=block.pool_module(), layout=layout,
        plan=plan,
    )  # fmt: skip


def refusal(block: Block, plan: str, dtype: torch.dtype = torch.float32) -> str | None:
    """A word of the sentence by which a plan refuses this block; None where it has to run."""
    if plan not in (*FUSED, "winograd", "fft"):
        return None
    if has_empty_window(block) or (block.pool is not None and math.prod(block.pool.kernel) > 254):
        return "window"
    if plan == "fft" and dtype != torch.float32:
        return str(dtype)[6:]
    if plan == "fft" and (block.groups > 1 or max(block.dilation) > 1):
        return "groups"
    if plan == "winograd" and any(getattr(block, name) != value for name, value in WINOGRAD.items()):
        return "winograd"
    return None


_CHANNELS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 24, 31, 32, 33, 64, 65, 130)
# kernel, stride, padding, dilation, ceil_mode of one spatial dimension pair; windows of 14 and 15
# elements lie on both sides of the half-byte limit of the winner codes.
_POOLS = (
    None,
    None,
    PoolCase((2, 2), (2, 2), (0, 0), (1, 1)),
    PoolCase((2, 2), (2, 2), (0, 0), (1, 1)),
    PoolCase((2, 2), (2, 2), (0, 0), (1, 1), True),
    PoolCase((2, 2), (2, 1), (0, 1), (1, 1)),
    PoolCase((3, 3), (2, 2), (0, 0), (1, 1)),
    PoolCase((3, 3), (2, 2), (1, 1), (1, 1), True),
    PoolCase((3, 3), (1, 1), (1, 1), (1, 1)),
    PoolCase((2, 1), (2, 1), (0, 0), (1, 1)),
    PoolCase((1, 2), (1, 2), (0, 0), (1, 1)),
    PoolCase((1, 4), (1, 4), (0, 0), (1, 1)),
    PoolCase((2, 3), (3, 2), (1, 1), (1, 1), True),
    PoolCase((2, 2), (1, 2), (0, 1), (2, 3)),
    PoolCase((3, 2), (4, 3), (0, 0), (1, 1)),  # leaves gaps
    PoolCase((2, 7), (2, 3), (0, 2), (1, 1)),
    PoolCase((5, 3), (2, 2), (1, 0), (1, 1)),
    PoolCase((4, 4), (4, 4), (0, 0), (1, 1)),
    PoolCase((1, 1), (2, 2), (0, 0), (1, 1)),
)


#: What the plan `winograd` takes.
WINOGRAD = dict(kernel=(3, 3), stride=(1, 1), dilation=(1, 1), groups=1)


def random_block(rng: random.Random, **fixed) -> Block:
    """A block from the shapes of the field and their odd neighbours, at least 32 results large."""
    while True:
        rank = 2 + len(fixed["kernel"]) if "kernel" in fixed else rng.choice((4, 4, 4, 3))
        dims = rank - 2

        def each(choices, dims=dims):
            same = rng.choice(choices)
            return tuple(same if rng.random() < 0.6 else rng.choice(choices) for _ in range(dims))

        kernel = each((1, 2, 3, 3, 3, 4, 5, 7, 8))
        c, c_out, groups = rng.choice(_CHANNELS), rng.choice(_CHANNELS), 1
        if rng.random() < 0.25:
            groups = rng.choice([g for g in (2, 3, 5, 8, 16, 17) if g <= max(c, 2)])
            c, c_out = groups * max(1, c // groups), groups * max(1, c_out // groups)
        pool = rng.choice(_POOLS)
        if pool is not None and dims == 1:
            pool = replace(
                pool, kernel=pool.kernel[1:], stride=pool.stride[1:], padding=pool.padding[1:],
                dilation=pool.dilation[1:],
            )  # fmt: skip
        block = Block(
            n=rng.choice((1, 2, 3, 5)),
            c=c,
            size=tuple(rng.choice((1, 2, 3, 5, 7, 8, 11, 14, 16, 19, 28)) for _ in range(dims)),
            c_out=c_out,
            kernel=kernel,
            stride=each((1, 1, 1, 2, 3, 4)),
            padding=tuple(rng.choice((0, k // 2, k // 2, k - 1, k)) for k in kernel),
            dilation=each((1, 1, 1, 1, 2, 3)),
            groups=groups,
            bias=rng.random() < 0.8,
            activation=rng.choice(("relu", "relu", "relu", None)),
            pool=pool,
        )
        if math.prod(block.kernel) == 1 and max(block.stride) > 1 and c % 16:
            # PyTorch 2.13's bfloat16 weight gradient of such a block (oneDNN, channels last) writes out
            # of bounds; test_pointwise_strided has these in a process of their own
            block = replace(block, c=16, groups=1)
        block = replace(block, **fixed)
        out = block.out_shape()
        if out is None or 0 in out[1:] or has_empty_window(block) or has_idle_tap(block):
            continue
        per_frame = math.prod(out[1:])
        if fixed.get("n") is None:
            block = replace(block, n=max(block.n, -(-32 // per_frame)))
        work = block.n * per_frame * math.prod(block.shapes()["weight"][1:])
        if pool is not None:
            work *= math.prod(pool.stride)
        if work < 6e6:
            return block


def has_empty_window(block: Block) -> bool:
    """Whether dilation carries some window past the whole map.

    PyTorch's own backward of such a pool writes out of bounds.
    """
    shapes = replace(block, n=1, activation=None, pool=None)
    y = torch.zeros(shapes.out_shape())
    return not windows(*as_2d_map(block, y))[1].any(-1).all()


def has_idle_tap(block: Block) -> bool:
    """Whether some column of a strided kernel meets nothing but padding.

    There PyTorch 2.13's bfloat16 weight gradient (oneDNN) reads memory that nobody wrote.
    """
    size, kernel, stride, padding, dilation = (
        t[-1] for t in (block.size, block.kernel, block.stride, block.padding, block.dilation)
    )
    steps = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    meets = [
        any(0 <= i * stride - padding + tap * dilation < size for i in range(steps)) for tap in range(kernel)
    ]
    return stride > 1 and not all(meets)


def random_blocks(count: int, **fixed):
    """Parametrize ``block`` over ``count`` random blocks, the same for every plan and dtype."""
    rng = random.Random(f"{SEED} {count} {sorted(fixed)}")
    return pytest.mark.parametrize(
        "block", [pytest.param(random_block(rng, **fixed), id=f"{i}") for i in range(count)]
    )


#: The first two blocks of a CRNN, the tutorial's block, an Atari and a video block, small.
FIELD_BLOCKS = {
    "tutorial": Block(3, 3, (28, 28), 64, (3, 3), padding=(1, 1), pool=_POOLS[2]),
    "crnn": Block(2, 24, (8, 13), 40, (3, 3), padding=(1, 1), pool=_POOLS[5]),
    "crnn_last": Block(2, 32, (2, 26), 64, (2, 2)),
    "atari": Block(2, 4, (44, 44), 32, (8, 8), stride=(4, 4)),
    "video": Block(2, 3, (31, 40), 24, (5, 5), stride=(2, 2), bias=False),
    "speech": Block(2, 1, (47, 33), 32, (41, 11), stride=(2, 2), padding=(0, 10)),
    "signal": Block(4, 9, (64,), 64, (5,), (1,), (2,), (1,), pool=PoolCase((2,), (2,), (0,), (1,))),
    "depthwise": Block(2, 33, (9, 12), 33, (3, 3), padding=(1, 1), groups=33, pool=_POOLS[2]),
}
field_blocks = pytest.mark.parametrize("block", FIELD_BLOCKS.values(), ids=FIELD_BLOCKS)


# ---------------------------------------------------------------- values


def normal_tensors(block: Block, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs and parameters off zero, so that sums do not cancel and relative errors mean something."""
    fan_in = math.prod(block.shapes()["weight"][1:])
    scale = {"x": 1.0, "weight": max(fan_in, 1) ** -0.5, "bias": 0.5}
    return {k: ((torch.randn(s) + 0.2) * scale[k]).to(dtype) for k, s in block.shapes().items()}


def _sparse_integers(shape, top: int, density: float) -> Tensor:
    values = torch.randint(-top, top + 1, shape)
    return (values * (torch.rand(shape) < density)).double()


def integer_tensors(block: Block, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Small whole numbers, full of ties, and a gradient, such that no order of adding ever rounds.

    Every sum of absolute products stays within the whole numbers that ``dtype`` holds exactly.
    """
    limit, top = (256, 1) if dtype == torch.bfloat16 else (2**24, 3)
    density = 1.0
    while True:
        tensors = {
            k: _sparse_integers(s, top, density if k == "weight" else 1.0) for k, s in block.shapes().items()
        }
        plain = replace(block, activation=None, pool=None)
        size = torch_block(plain, **{k: t.abs() for k, t in tensors.items()})
        if not size.numel() or size.max() <= limit:
            break
        density /= 2
    density = 1.0
    while True:
        conv = torch_block(plain, **tensors).requires_grad_()
        out = after_conv(block, conv)
        grad = _sparse_integers(out.shape, min(top, 2), density)
        (routed,) = torch.autograd.grad(out, conv, grad.abs())
        leaves = {k: t.abs().requires_grad_() for k, t in tensors.items()}
        sums = torch.autograd.grad(torch_block(plain, **leaves), list(leaves.values()), routed)
        if all(not s.numel() or s.max() <= limit for s in sums):
            return {k: t.to(dtype) for k, t in tensors.items()}, grad.to(dtype)
        density /= 2


def after_conv(block: Block, y: Tensor) -> Tensor:
    """Activation and pool alone: the rest of the block behind a 1x1 convolution that changes nothing."""
    y = activate(block, y) if block.activation else y * 1
    module = block.pool_module()
    return y if module is None else module(y)


STRIDED = ("sliced", "transposed", "channels_last", "expanded", "offset", "backwards_dims")


def strided(t: Tensor, how: str) -> Tensor:
    """The shape and, but for "expanded", the values of ``t`` in another memory."""
    if how == "sliced":  # every second element of the last two dimensions of a larger tensor
        big = torch.full([*t.shape[:-2], *(2 * s + 3 for s in t.shape[-2:])], math.nan, dtype=t.dtype)
        view = big[..., 1 : 1 + 2 * t.shape[-2] : 2, 2 : 2 + 2 * t.shape[-1] : 2]
        return view.copy_(t)
    if how == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "channels_last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == "expanded":  # every sample the first one: stride 0
        return t[:1].expand(t.shape)
    if how == "offset":  # contiguous, but one element off any alignment
        flat = torch.full([t.numel() + 1], math.nan, dtype=t.dtype)
        return flat[1:].view(t.shape).copy_(t)
    if how == "backwards_dims":  # the first dimension lies fastest
        dims = tuple(reversed(range(t.dim())))
        return t.permute(dims).contiguous().permute(dims)
    raise AssertionError(how)


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    """Run ``code`` in a process of its own, where a crash is a result like any other."""
    root = Path(cnnlstm_fast.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(root)} | env, cwd=root,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


# ---------------------------------------------------------------- what is expected


#: Of the kernels' instruction sets those of the library (oneDNN) and of PyTorch's own kernels.
_OTHERS_SETS = {
    "baseline": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
}


def repeat_with_instruction_set(isa: str, *pytest_args: str) -> None:
    """Run the marked tests in a process whose kernels, and the library's, are those of ``isa``.

    Skip where there are none.
    """
    if forced := os.environ.get("CNNLSTM_FAST_ISA"):
        pytest.skip(f"this run is itself forced to {forced}")
    root = Path(cnnlstm_fast.__file__).parents[1]
    # glibc fills what malloc returns: the kernels' scratch memory is poisoned as well as tensors
    env = os.environ | {"CNNLSTM_FAST_ISA": isa, "PYTHONPATH": str(root), "MALLOC_PERTURB_": "128"}
    env |= _OTHERS_SETS[isa] | {"CNNLSTM_FAST_SHARE": os.environ.get("CNNLSTM_FAST_SHARE", "10")}
    asked = run_forked(
        "import cnnlstm_fast, torch; print(torch.ops.cnnlstm_fast.isa())", CNNLSTM_FAST_ISA=isa
    )
    if asked.stdout.strip() != isa:
        assert isa != "baseline", f"{asked.stdout}{asked.stderr}"
        pytest.skip(f"this machine or build has no {isa}, the kernels say {asked.stdout.strip()}")
    # Under `make test` malloc is poisoned and these kernels the run's own: the same tests, already run, but
    # for those in bfloat16, where the library has arithmetic of its own above this set.
    if isa == torch.ops.cnnlstm_fast.isa() and os.environ.get("MALLOC_PERTURB_"):
        chosen = pytest_args.index("-k") + 1 if "-k" in pytest_args else None
        also = "bfloat16" if chosen is None else f"bfloat16 and ({pytest_args[chosen]})"
        rest = [a for i, a in enumerate(pytest_args) if chosen is None or i not in (chosen - 1, chosen)]
        pytest_args = ("-k", also, *rest)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider",
         "-m", "instruction_sets", *pytest_args],
        env=env, cwd=root, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    nothing = ran.returncode == pytest.ExitCode.NO_TESTS_COLLECTED and "-k" in pytest_args
    assert ran.returncode == 0 or nothing, f"{isa}: {ran.stdout[-4000:]}{ran.stderr[-2000:]}"


def in_layout(y: Tensor, layout: str) -> Tensor:
    """A map (N, C, H, W) or (N, C, L) in the shape of ``layout``, by indexing, as contract.md draws it."""
    if layout in ("channels_first", "channels_last"):
        return y
    if layout == "features":
        return torch.stack([sample.reshape(-1) for sample in y]) if y.shape[0] else y.flatten(1)
    if y.dim() == 3:
        y = y[:, :, None]
    h, w = y.shape[2:]
    name, time_major = layout.removesuffix("_time_major"), layout.endswith("_time_major")
    n = y.shape[0]
    if name.endswith("_channels_last"):
        name = name.removesuffix("_channels_last")
        axis = 3 if name == "columns" else 2
        steps = [y.select(axis, i).transpose(1, 2).flatten(1) for i in range(y.shape[axis])]
    elif name == "locations":
        steps = [y[:, :, i, j] for i, j in itertools.product(range(h), range(w))]
    elif name == "columns":
        steps = [y[:, :, :, j].reshape(n, y.shape[1] * h) for j in range(w)]
    else:
        steps = [y[:, :, i, :].reshape(n, y.shape[1] * w) for i in range(h)]
    return torch.stack(steps, 0 if time_major else 1)


def windows(block: Block, y: Tensor) -> tuple[Tensor, Tensor]:
    """The pool's windows over the convolution's map ``y`` (N, C, H, W): (values, whether inside).

    Values are (N, C, PH, PW, KH * KW) with -inf outside the map; the other is (PH, PW, KH * KW).
    """
    p = block.pool or PoolCase((1, 1), (1, 1), (0, 0), (1, 1))
    height, width = (after_conv(block, y) if block.pool else y).shape[2:]
    rows, cols = (
        torch.arange(out)[:, None] * p.stride[i] - p.padding[i] + torch.arange(p.kernel[i]) * p.dilation[i]
        for i, out in enumerate((height, width))
    )
    row_in, col_in = ((at >= 0) & (at < y.shape[2 + i]) for i, at in enumerate((rows, cols)))
    inside = (row_in[:, None, :, None] & col_in[None, :, None, :]).flatten(2)
    at_rows, at_cols = (at.clamp(0, y.shape[2 + i] - 1) for i, at in enumerate((rows, cols)))
    values = y[:, :, at_rows[:, None, :, None], at_cols[None, :, None, :]].flatten(4)
    return values.masked_fill(~inside, -math.inf), inside


def winners(block: Block, y: Tensor) -> Tensor:
    """Place of each window's winner in its window, -1 where the activation passes nothing.

    The first of the largest; where there are NaNs the last of them. (N, C, PH, PW).
    """
    values, inside = windows(block, y)
    before = values
    values = torch.where(inside, activate(block, values), values)
    count = values.shape[-1]
    place = torch.arange(count).expand(values.shape)
    nan = values.isnan()
    top = values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).amax(-1, keepdim=True)
    first = place.where(inside & (values == top), torch.tensor(count)).amin(-1)
    last_nan = place.where(nan, torch.tensor(-1)).amax(-1)
    place = torch.where(nan.any(-1), last_nan, first)
    kind = ACTIVATIONS[block.activation]
    won = before.gather(-1, place[..., None])[..., 0]
    below, above = (
        bound if math.isfinite(bound) else math.nan for bound in (kind.flat_below, kind.flat_above)
    )
    stopped = (won <= below) | (won >= above)
    return place.where(~stopped, torch.tensor(-1))


def decided(block: Block, tensors: dict[str, Tensor]) -> Tensor:
    """Where rounding in the tensors' dtype cannot change which element of a window wins, or passes.

    Elsewhere PyTorch's own ways send the gradient to different places, and tests send none.
    """
    dtype, signal = tensors["x"].dtype, block.rank == 3
    block, tensors = as_2d(block, tensors)
    plain = replace(block, activation=None, pool=None)
    true = {k: t.double() for k, t in tensors.items()}
    y = torch_block(plain, **true)
    size = torch_block(plain, **{k: t.abs() for k, t in true.items()})
    slack = 16 * torch.finfo(torch.float32).eps * size + 2 * torch.finfo(dtype).eps * y.abs()
    clear = clear_winners(block, y, slack, 4 * torch.finfo(dtype).eps)
    return clear.squeeze(2) if signal else clear


def clear_winners(block: Block, y: Tensor, slack: Tensor, eps: float) -> Tensor:
    """Where an error of ``slack`` in the activation's argument ``y`` changes no winner and no slope.

    ``eps`` is the relative error of the activation itself. All in 2-d form.
    """
    kind = ACTIVATIONS[block.activation]
    slack = windows(block, slack)[0].amax(-1)
    z, inside = windows(block, y)
    values = torch.where(inside, activate(block, z), -math.inf)
    top, place = values.topk(min(2, values.shape[-1]), dim=-1)
    won = z.gather(-1, place[..., :1])[..., 0]
    # no activation here is steeper than 1.5
    apart = 1.5 * slack + eps * top[..., 0].abs()
    clear = top[..., 0] - top[..., -1] > apart if values.shape[-1] > 1 else torch.ones_like(slack).bool()
    for kink in kind.kinks:
        clear &= (won - kink).abs() > slack
    if kind.kinks:
        highest = z.amax(-1)
        clear |= (highest < kind.flat_below - slack) | (highest > kind.flat_above + slack)
    return clear


def as_2d_map(block: Block, y: Tensor) -> tuple[Block, Tensor]:
    """As :func:`as_2d`, for a convolution's map."""
    return as_2d(block, {})[0], y if y.dim() == 4 else y.unsqueeze(2)


def as_2d(block: Block, tensors: dict[str, Tensor]) -> tuple[Block, dict[str, Tensor]]:
    """A block over signals as the same block over images of height 1; a block over images as it is."""
    if block.rank == 4:
        return block, tensors
    pool = block.pool and PoolCase(
        (1, *block.pool.kernel), (1, *block.pool.stride), (0, *block.pool.padding),
        (1, *block.pool.dilation), block.pool.ceil_mode,
    )  # fmt: skip
    block = replace(
        block, size=(1, *block.size), kernel=(1, *block.kernel), stride=(1, *block.stride),
        padding=(0, *block.padding), dilation=(1, *block.dilation), pool=pool,
    )  # fmt: skip
    return block, {k: t.unsqueeze(2) if t.dim() == 3 else t for k, t in tensors.items()}


# ---------------------------------------------------------------- comparing


def evaluate(fn, tensors: dict[str, Tensor], grad: Tensor | None, needs=("x", "weight", "bias")):
    """``fn(**tensors)`` and its gradients: {"out": ..., "x": ..., "weight": ..., "bias": ...}."""
    leaves = {k: t.detach().requires_grad_(grad is not None and k in needs) for k, t in tensors.items()}
    out = fn(**leaves)
    wanted = [k for k, t in leaves.items() if t.requires_grad]
    found = torch.autograd.grad(out, [leaves[k] for k in wanted], grad) if wanted else ()
    return {"out": out.detach(), **dict(zip(wanted, found, strict=True))}


def torch_ways(block: Block, tensors: dict[str, Tensor], grad: Tensor | None, needs=("x", "weight", "bias")):
    """PyTorch's own results: [contiguous, channels_last] in the tensors' dtype, and in float64."""

    def way(convert):
        converted = {k: convert(t) for k, t in tensors.items()}
        g = None if grad is None else convert(grad)
        return evaluate(lambda **t: torch_block(block, **t), converted, g, needs)

    ways = [
        way(torch.Tensor.contiguous),
        way(lambda t: strided(t, "channels_last") if t.dim() == block.rank else t.contiguous()),
    ]
    return ways, way(lambda t: t.double().contiguous())


def assert_close_as_torch(ours: Tensor, torch_ways, true: Tensor, what: str = "") -> None:
    """The numbers rule: as near to the truth as PyTorch.

    The norm of our error against ``true`` (float64) is at most twice the worst of PyTorch's own
    (``torch_ways``: its results for the same values) plus 16 eps of the true norm. NaNs and
    infinities stand where one of PyTorch's ways, float64 included, puts them: its bfloat16
    channels-last convolution multiplies a NaN beyond the window by a padding zero.
    """
    ways = [torch_ways] if isinstance(torch_ways, Tensor) else list(torch_ways)
    for way in ways:
        assert ours.shape == way.shape == true.shape, (
            f"{what}: shape {tuple(ours.shape)}, PyTorch's {tuple(way.shape)}, true {tuple(true.shape)}"
        )
        assert ours.dtype == way.dtype, f"{what}: dtype {ours.dtype}, PyTorch's {way.dtype}"
    assert true.dtype == torch.float64, f"{what}: the truth is {true.dtype}, not float64"
    eps = torch.finfo(ours.dtype).eps
    ours, ways = ours.detach().double(), [way.detach().double() for way in ways]

    def kinds(t):  # 0 finite, 1 NaN, 2 and 3 the infinities
        return t.isnan() + 2 * (t == math.inf) + 3 * (t == -math.inf)

    alien = torch.stack([kinds(ours) != kinds(way) for way in (*ways, true)]).all(0)
    assert not alien.any(), (
        f"{what}: {alien.sum().item()} elements are finite, NaN, +inf or -inf as in none of PyTorch's ways, "
        f"the first at {alien.nonzero()[0].tolist()}: {ours[alien][0].item()}, PyTorch's "
        f"{[way[alien][0].item() for way in (*ways, true)]}"
    )
    finite = ours.isfinite() & true.isfinite()
    for way in ways:
        finite &= way.isfinite()
    ours, true = ours[finite], true[finite]
    error = (ours - true).norm().item()
    own = max((way[finite] - true).norm().item() for way in ways)
    # float64 rounds too: the tail of GELU is the difference of nearly equal numbers.
    bound = 2 * own + 16 * eps * true.norm().item() + 1e-17 * true.numel() ** 0.5
    assert error <= bound, (
        f"{what}: error {error:.3e} against float64, PyTorch's own {own:.3e}, allowed {bound:.3e} "
        f"(true norm {true.norm().item():.3e}, {true.numel()} elements, largest error "
        f"{(ours - true).abs().max().item():.3e})"
    )


def assert_block(
    block: Block,
    tensors: dict[str, Tensor],
    grad: Tensor | None,
    *,
    plan: str,
    layout: str = "channels_first",
    needs=("x", "weight", "bias"),
    our_grad=lambda g: g,
    exact: bool = False,
) -> dict[str, Tensor]:
    """Our block against PyTorch's, outputs and the gradients in ``needs``; returns ours.

    ``grad`` is in channels-first shape; ``our_grad`` may give ours other strides. ``exact`` asks for
    equality with float64 instead of the numbers rule. A plan asked for what it does not take must
    say so, and returns nothing.
    """
    if reason := refusal(block, plan, tensors["x"].dtype):
        with pytest.raises(ValueError, match=f"cannot run here.*{reason}"):
            our_block(block, **tensors, plan=plan, layout=layout)
        return {}
    if plan == "reference" and faulty_in_bfloat16(block, tensors["x"]):
        return {}  # it would be that convolution
    ways, true = torch_ways(block, tensors, grad, needs)
    ours = evaluate(
        lambda **t: our_block(block, **t, plan=plan, layout=layout),
        tensors,
        None if grad is None else our_grad(in_layout(grad, layout)),
        needs,
    )
    assert ours.keys() == true.keys()
    for name, mine in ours.items():
        what = f"{name} of {block}, plan {plan}, {layout}"
        theirs = [way[name] for way in ways]
        truth = true[name]
        if name == "out":
            theirs, truth = [in_layout(t, layout) for t in theirs], in_layout(truth, layout)
        if exact:
            assert mine.dtype == theirs[0].dtype and mine.shape == truth.shape, what
            wrong = (mine.double() != truth).sum().item()
            assert wrong == 0, (
                f"{wrong} of {mine.numel()} elements differ from exact whole numbers, "
                f"by up to {(mine.double() - truth).abs().max().item()}: {what}"
            )
        else:
            assert_close_as_torch(mine, theirs, truth, what)
    return ours
