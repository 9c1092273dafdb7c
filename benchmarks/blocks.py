"""Random blocks like those before an RNN, and of backbones: which plan each gets, and its ratio over eager.

A block is verified before it is timed, by the same rule as a case. Eager and ours then run in turn on
the same fresh inputs. A block that looks slower than ``FLOOR`` gets more rounds, which are added to
those it had: nothing that was measured is thrown away.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import exp, inf, log, prod
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnlstm_fast as cf
from benchmarks.cases import INPUT_STEP, WEIGHT_STEP, conv_flops, on_grid
from benchmarks.race import Spread, WrongResult, errors, exceeding, limits_as_torch, paired_ratio, turn
from cnnlstm_fast.functional.conv_block import plan_call

#: The least ratio over eager that a block may have.
FLOOR = 0.97
ROUNDS = 9
MOST_ROUNDS = 45


@dataclass(frozen=True)
class Block:
    """A conv block and its input; spatial tuples have one entry per dimension (1 or 2).

    ``pool`` is ``(kind, kernel, stride, padding)`` with kind ``"Max"`` or ``"Avg"``, or None.
    """

    family: str
    batch: int
    channels: int
    size: tuple[int, ...]
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int = 1
    norm: bool = False
    activation: str | None = "relu"
    pool: tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None
    layout: str = "channels_first"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.size)

    @property
    def conv_size(self) -> tuple[int, ...]:
        axes = zip(self.size, self.kernel, self.stride, self.padding, strict=True)
        return tuple((s + 2 * p - k) // st + 1 for s, k, st, p in axes)

    def describe(self) -> str:
        """One line for a table, as ``64x3x28x28 -> 64, k3x3 s1x1 p1x1, relu, max 2x2/2x2``."""

        def cross(sizes):
            return "x".join(map(str, sizes))

        parts = [f"{cross(self.shape)} -> {self.out_channels}"]
        parts.append(f"k{cross(self.kernel)} s{cross(self.stride)} p{cross(self.padding)}")
        if self.groups > 1:
            parts.append(f"groups {self.groups}")
        if self.norm:
            parts.append("BN")
        if self.activation:
            parts.append(self.activation)
        if self.pool:
            kind, kernel, stride, padding = self.pool
            padded = f" p{cross(padding)}" if any(padding) else ""
            parts.append(f"{kind} {cross(kernel)}/{cross(stride)}{padded}")
        if self.layout != "channels_first":
            parts.append(self.layout)
        return ", ".join(parts)

    def modules(self) -> tuple[nn.Module | None, nn.Module | None]:
        """Fresh norm and pool modules, in training mode."""
        two_d = len(self.size) == 2
        norm = pool = None
        if self.norm:
            norm = (nn.BatchNorm2d if two_d else nn.BatchNorm1d)(self.out_channels)
        if self.pool is not None:
            kind, *sizes = self.pool
            pool = getattr(nn, f"{kind}Pool{len(self.size)}d")(*sizes)
        return norm, pool

    def function(self, conv_block: Callable[..., Tensor], *, training: bool) -> Callable[..., Tensor]:
        """``(x, weight, bias) -> y`` by ``cf.functional.conv_block`` or its reference twin."""
        norm, pool = self.modules()
        return partial(
            conv_block,
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
            norm=norm if norm is None else norm.train(training),
            activation=self.activation,
            pool=pool,
            layout=self.layout,
        )

    def weights(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Weight ``(C_out, C_in / groups, *kernel)`` and bias, scaled as PyTorch initialises them."""
        shape = (self.out_channels, self.channels // self.groups, *self.kernel)
        bound = prod(shape[1:]) ** -0.5
        sizes = {"weight": shape, "bias": shape[:1]}
        return {
            n: on_grid(torch.empty(s).uniform_(-bound, bound, generator=generator), WEIGHT_STEP)
            for n, s in sizes.items()
        }


def _draw_ocr(rng: random.Random) -> dict:
    """CRNN's seven layers: height 32 shrinks to 1, width stays; two kinds of pool."""
    layer = rng.randrange(7)
    width = rng.choice((64, 100, 128, 160, 256))
    channels = (rng.choice((1, 3)), 64, 128, 256, 256, 512, 512)[layer]
    out = (64, 128, 256, 256, 512, 512, 512)[layer]
    height = (32, 16, 8, 8, 4, 4, 2)[layer]
    width = (width, width // 2, *(width // 4,) * 2, *(width // 4 + 1,) * 2, width // 4 + 2)[layer]
    pool = (((2, 2), (2, 2), (0, 0)),) * 2 + (None, ((2, 2), (2, 1), (0, 1))) * 2 + (None,)
    k = 2 if layer == 6 else 3
    sizes = pool[layer]
    if sizes is not None and rng.random() < 0.25:
        sizes = ((2, 1), (2, 1), (0, 0))
    return dict(
        channels=channels, size=(height, width), out_channels=out, kernel=(k, k), stride=(1, 1),
        padding=(k // 3,) * 2, pool=sizes and ("Max", *sizes),
        layout=rng.choice(("columns", "columns_time_major")) if layer == 6 else "channels_first",
        norm=layer in (2, 4, 6) and rng.random() < 0.3,
    )  # fmt: skip


def _draw_image(rng: random.Random) -> dict:
    """The tutorials' block on every frame: small channels, 3x3 or 5x5, pooled by 2."""
    k = rng.choice((3, 3, 3, 5))
    channels = rng.choice((1, 3, 3, 16, 32, 64))
    side = rng.choice((28, 32, 48, 64, 96, 112)) if channels <= 3 else rng.choice((14, 16, 24, 32, 56))
    window = rng.choice((2, 2, 2, 3))
    sizes = ((window,) * 2, (2, 2), (0, 0) if window == 2 else (1, 1))
    return dict(
        channels=channels, size=(side, side), out_channels=rng.choice((16, 32, 32, 64, 64, 128)),
        kernel=(k, k), stride=(1, 1), padding=(k // 2,) * 2 if rng.random() < 0.8 else (0, 0),
        pool=("Max", *sizes) if rng.random() < 0.85 else None,
        layout=rng.choice(("channels_first", "features", "features", "locations")),
    )  # fmt: skip


def _draw_video(rng: random.Random) -> dict:
    """Four strided convolutions without a pool."""
    layer = rng.randrange(4)
    k = 5 if layer == 0 else 3
    scale = 2**layer
    return dict(
        channels=(3, 32, 64, 128)[layer], size=(256 // scale, rng.choice((256, 342)) // scale),
        out_channels=(32, 64, 128, 256)[layer], kernel=(k, k), stride=(2, 2), padding=(k // 2,) * 2,
        layout="features" if layer == 3 else "channels_first",
        norm=rng.random() < 0.3,
    )  # fmt: skip


def _draw_speech(rng: random.Random) -> dict:
    """Tall kernels over a spectrogram, strided in frequency."""
    first = rng.random() < 0.5
    return dict(
        channels=1 if first else 32, size=(161 if first else 81, rng.randrange(50, 300)),
        out_channels=32, kernel=(41, 11) if first else (21, 11), stride=(2, 2) if first else (2, 1),
        padding=(20, 5) if first else (10, 0), activation=rng.choice(("relu", "relu", "hardtanh")),
        layout=rng.choice(("channels_first", "columns", "columns_time_major")),
    )  # fmt: skip


def _draw_agent(rng: random.Random) -> dict:
    """The Atari agent's three layers."""
    layer = rng.randrange(3)
    k, s = ((8, 4), (4, 2), (3, 1))[layer]
    return dict(
        channels=(rng.choice((1, 4)), 32, 64)[layer], size=((84, 84), (20, 20), (9, 9))[layer],
        out_channels=(32, 64, 64)[layer], kernel=(k, k), stride=(s, s), padding=(0, 0),
        layout="features" if layer == 2 else "channels_first",
    )  # fmt: skip


def _draw_signal(rng: random.Random) -> dict:
    """Sensor channels, EEG and finance: conv1d along time."""
    k = rng.choice((1, 3, 3, 5, 7, 9, 11))
    padding = rng.choice((k // 2, k // 2, 0))
    window = rng.choice((0, 0, 2, 2, 3, 4))
    return dict(
        channels=rng.choice((1, 3, 6, 9, 32, 64, 64, 128)),
        size=(rng.choice((64, 100, 128, 256, 500, 1000)),),
        out_channels=rng.choice((32, 64, 64, 128)), kernel=(k,), stride=(rng.choice((1, 1, 1, 2)),),
        padding=(padding,), pool=("Max", (window,), (window,), (0,)) if window else None,
        activation=rng.choice(("relu", "relu", "relu", "tanh", None)),
        layout=rng.choice(("channels_first", "locations", "locations_time_major")),
    )  # fmt: skip


def _draw_sound(rng: random.Random) -> dict:
    """Sound events: mel bands pooled away, time kept."""
    window = rng.choice(((1, 5), (1, 2), (1, 4), (2, 2), (1, 8)))
    channels = rng.choice((1, 64, 64, 128))
    return dict(
        channels=channels,
        size=(rng.choice((100, 128, 250)), 40 if channels == 1 else rng.choice((8, 16, 20))),
        out_channels=rng.choice((64, 96, 128)), kernel=(3, 3), stride=(1, 1), padding=(1, 1),
        pool=(rng.choice(("Max", "Max", "Max", "Avg")), window, window, (0, 0)),
        activation=rng.choice(("relu", "relu", "relu", "relu", "leaky_relu", "elu")),
        norm=rng.random() < 0.2, layout=rng.choice(("channels_first", "rows")),
    )  # fmt: skip


def _draw_depthwise(rng: random.Random) -> dict:
    """EEG and lip reading: grouped convolutions and long flat kernels."""
    channels = rng.choice((8, 16, 32, 64))
    groups = rng.choice((channels, channels, 2, 4))
    kernel = rng.choice(((3, 3), (1, 9), (1, 17), (5, 5)))
    return dict(
        channels=channels, size=(rng.choice((16, 22, 32)), rng.choice((64, 100, 128))),
        out_channels=channels * rng.choice((1, 2)), kernel=kernel, stride=(1, 1),
        padding=tuple(k // 2 for k in kernel), groups=groups,
        pool=("Max", (1, 4), (1, 4), (0, 0)) if rng.random() < 0.5 else None,
        activation=rng.choice(("relu", "relu", "elu")),
    )  # fmt: skip


def _draw_backbone(rng: random.Random) -> dict:
    """Mobile and residual backbones: small maps, pointwise, depthwise and strided convolutions."""
    channels, side = rng.choice((16, 24, 48, 64, 96, 128, 240)), rng.choice((4, 7, 14, 28))
    kind = rng.choice(("pointwise", "pointwise", "depthwise", "strided"))
    k = {"pointwise": 1, "depthwise": rng.choice((3, 5)), "strided": rng.choice((1, 3))}[kind]
    stride = 2 if kind == "strided" else 1
    out_channels = {"pointwise": channels * rng.choice((1, 2, 6)) // 2, "depthwise": channels}
    return dict(
        channels=channels, size=(side, side), out_channels=out_channels.get(kind, 2 * channels),
        kernel=(k, k), stride=(stride, stride), padding=(k // 2,) * 2,
        groups=channels if kind == "depthwise" else 1,
        activation=rng.choice(("relu", "silu", None)), norm=rng.random() < 0.7,
    )  # fmt: skip


def _draw_eeg(rng: random.Random) -> dict:
    """Electrodes by time, or time by electrodes: a long kernel over one channel."""
    k, flip = rng.choice((16, 32, 63, 64)), rng.choice((1, 1, -1))
    return dict(
        channels=1, size=(22, rng.choice((500, 1000)))[::flip], out_channels=rng.choice((4, 8, 16)),
        kernel=(1, k)[::flip], stride=(1, 1), padding=(0, rng.choice((0, k // 2)))[::flip],
        activation=rng.choice(("elu", None)), norm=rng.random() < 0.7,
    )  # fmt: skip


#: How often each kind of stack is drawn.
_FAMILIES: dict[str, tuple[int, Callable[[random.Random], dict]]] = {
    "image": (6, _draw_image),
    "ocr": (5, _draw_ocr),
    "signal": (5, _draw_signal),
    "sound": (3, _draw_sound),
    "agent": (3, _draw_agent),
    "video": (2, _draw_video),
    "speech": (2, _draw_speech),
    "grouped": (2, _draw_depthwise),
    "backbone": (4, _draw_backbone),
    "eeg": (1, _draw_eeg),
}

# What eager costs here, roughly: enough to choose batch sizes that take 5 to 30 ms, and a tenth of that where
# layers are small.
_FLOPS_PER_MS = 2.5e8
_ELEMENTS_PER_MS = 5.0e5


def draw_block(rng: random.Random) -> Block:
    """One random block of a single image."""
    family = rng.choices(list(_FAMILIES), [weight for weight, _ in _FAMILIES.values()])[0]
    return Block(family, 1, **_FAMILIES[family][1](rng))


def batch_for(block: Block, ms: float) -> int:
    """Images of which eager takes about ``ms`` milliseconds; 0 where one takes much more."""
    outputs = block.out_channels * prod(block.conv_size)
    one = conv_flops(outputs, block.channels // block.groups, block.kernel) / _FLOPS_PER_MS
    return round(ms / (one + outputs / _ELEMENTS_PER_MS))


def draw_blocks(count: int, seed: int) -> list[Block]:
    """``count`` random blocks; the same for a seed on every machine."""
    rng = random.Random(seed)
    blocks: dict[Block, None] = {}
    while len(blocks) < count:
        block = draw_block(rng)
        ms = exp(rng.uniform(log(5), log(20)))
        batch = batch_for(block, ms / (10 if block.family == "backbone" else 1))
        if 1 <= batch <= 2048:
            blocks[replace(block, batch=batch)] = None
    return list(blocks)


@dataclass(frozen=True)
class BlockResult:
    """One block's race against eager, in one mode.

    Attributes:
        block: what it is, in words.
        family: where such blocks come from.
        mode: ``"inference"`` or ``"training"`` (forward and backward; the input's gradient too, except
            for blocks that read images or signals, whose inputs have up to 9 channels).
        plan, backward_plan, reason: as :mod:`cnnlstm_fast.planning` chose.
        eager_ms, ours_ms: median over the turns.
        ratio: eager's time over ours, paired by round.
        rounds: how many.
    """

    block: str
    family: str
    mode: str
    plan: str
    backward_plan: str
    reason: str
    eager_ms: float
    ours_ms: float
    ratio: Spread
    rounds: int


#: Blocks with more input channels than this stand behind another block, so training asks for the
#: gradient of their input.
IMAGE_CHANNELS = 9


class Side:
    """Eager or ours on one block; ``run((x, grad))`` is what is timed."""

    def __init__(self, block: Block, conv_block, weights: dict[str, Tensor], training: bool):
        self.block, self.training = block, training
        self.needs_x = training and block.channels > IMAGE_CHANNELS
        self.weights = {n: w.clone().requires_grad_(training) for n, w in weights.items()}
        self.call = block.function(conv_block, training=training)
        norm = self.call.keywords["norm"]
        self.norm = norm.to(weights["weight"].dtype) if norm is not None else None

    def run(self, batch: tuple[Tensor, Tensor | None]) -> Tensor:
        x, grad = batch
        if not self.training:
            with torch.inference_mode():
                return self.call(x, **self.weights)
        for t in (x, *self.weights.values()):
            t.grad = None
        y = self.call(x.requires_grad_(self.needs_x), **self.weights)
        y.backward(grad)
        return y

    def results(self, batch) -> dict[str, Tensor]:
        found = {"output": self.run(batch).detach()}
        if self.training:
            found |= {f"gradient of {n}": w.grad for n, w in self.weights.items()}
            if self.needs_x:
                found["gradient of the input"] = batch[0].grad
        return found


def plan_of(call: partial, x: Tensor, weights: dict[str, Tensor]) -> tuple[str, str, str]:
    """Forward plan, backward plan and reason of a call to ``cf.functional.conv_block``."""
    given = call.keywords
    plan = plan_call(
        x, weights["weight"], weights["bias"], given["stride"], given["padding"], 1, given["groups"],
        given["norm"], given["activation"], given["pool"], given["layout"],
    )  # fmt: skip
    reason = plan.reason
    if plan.pool_behind and plan.plan != "reference":
        reason += f"; the {type(given['pool']).__name__} is PyTorch's own, behind the block"
    return plan.plan, plan.choice.backward, reason


def race_block(block: Block, mode: str, *, seed: int, turn_s: float = 0.04) -> BlockResult:
    """Verify one block and race it against eager.

    Args:
        block: the block.
        mode: ``"inference"`` or ``"training"``.
        seed: of weights and inputs.
        turn_s: seconds that a turn aims at.

    Raises:
        WrongResult: ours is wrong; nothing was timed.
    """
    training = mode == "training"
    generator = torch.Generator().manual_seed(seed)
    weights = block.weights(generator)
    theirs = Side(block, cf.reference.conv_block, weights, training)
    ours = Side(block, cf.functional.conv_block, weights, training)
    with torch.no_grad():
        like = theirs.call(torch.zeros(block.shape), **weights)

    def draw() -> tuple[Tensor, Tensor | None]:
        x = torch.randn(block.shape, generator=generator)
        if not training:
            return x, None
        # Sums on a grid are exact, so that winners agree; behind a norm, values on a grid would tie instead,
        # and Fourier transforms, for large kernels, break such ties.
        x = x if block.norm or max(block.kernel) > 20 else on_grid(x, INPUT_STEP)
        return x, torch.randn(like.shape, generator=generator)

    _verify(block, weights, training, theirs, ours, draw(), f"{block.describe()}, {mode} (seed {seed})")
    batch = draw()
    with torch.set_grad_enabled(training):
        plan, backward_plan, reason = plan_of(ours.call, batch[0].requires_grad_(ours.needs_x), ours.weights)
    times: tuple[list[float], list[float]] = ([], [])
    wanted = ROUNDS
    while len(times[0]) < wanted:
        batches = [draw() for _ in range(2)]
        sides = list(zip((theirs, ours), times, strict=True))
        for side, kept in sides if len(times[0]) % 2 else reversed(sides):
            kept.append(median(turn(side.run, batches, turn_s)))
        if len(times[0]) == wanted and paired_ratio(*times).p50 < FLOOR:
            wanted = min(MOST_ROUNDS, wanted + ROUNDS)
    return BlockResult(
        block=block.describe(),
        family=block.family,
        mode=mode,
        plan=plan,
        backward_plan=backward_plan,
        reason=reason,
        eager_ms=median(times[0]),
        ours_ms=median(times[1]),
        ratio=paired_ratio(*times),
        rounds=len(times[0]),
    )


def _verify(block, weights, training, theirs, ours, batch, what: str) -> None:
    def double(t):
        return None if t is None else t.double()

    def channels_last(t):
        return t.to(memory_format=torch.channels_last) if t is not None and t.dim() == 4 else t

    if training and block.norm:
        batch = batch[0], batch[1] * _decided(block, batch[0], weights)
    true = Side(block, cf.reference.conv_block, {n: w.double() for n, w in weights.items()}, training)
    expected = true.results((double(batch[0].detach()), double(batch[1])))
    other = {n: channels_last(w) for n, w in weights.items()}
    other_way = Side(block, cf.reference.conv_block, other, training)
    ways = [
        errors(theirs.results(_copy(batch)), expected),
        errors(other_way.results((channels_last(batch[0].clone()), batch[1])), expected),
    ]
    wrong = exceeding(errors(ours.results(_copy(batch)), expected), limits_as_torch(ways))
    if wrong:
        raise WrongResult(f"{what}: {wrong}; not timed")


#: Of normalised values: what lies nearer to another or to zero than this, rounding may decide.
_CLOSE = 1e-4


def _decided(block: Block, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """1 where no rounding changes which value of a window a result is, nor the slope there, else 0."""
    bare = replace(block, activation=None, pool=None, layout="channels_first")
    true = {n: w.double() for n, w in weights.items()}
    z = Side(bare, cf.reference.conv_block, true, True).call(x.detach().double(), **true)
    rank = z.dim()
    z = z if rank == 4 else z.unsqueeze(2)
    kind, *sizes = block.pool or ("Max", (1, 1), (1, 1), (0, 0))
    kernel, stride, padding = ((one, *p)[-2:] for one, p in zip((1, 1, 0), sizes, strict=True))
    padded = F.pad(z, (padding[1],) * 2 + (padding[0],) * 2, value=-inf)
    windows = padded.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1]).flatten(4)
    first, *second = windows.topk(min(2, windows.shape[-1])).values.unbind(-1)
    if kind == "Max":
        clear = (first.abs() > _CLOSE).logical_and(first - second[0] > _CLOSE if second else first > -inf)
    else:
        clear = (windows.abs() > _CLOSE).all(-1)
    clear = clear.to(x.dtype)
    return cf.reference.to_layout(clear if rank == 4 else clear.squeeze(2), block.layout)


def _copy(batch):
    return batch[0].detach().clone(), batch[1]
