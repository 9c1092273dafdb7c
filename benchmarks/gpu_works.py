"""What the GPU part races: blocks, recurrent layers and whole systems, each in PyTorch's way and in ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import cnnlstm_fast as cf
from benchmarks.cases import INPUT_STEP, SYSTEMS, WEIGHT_STEP, conv_flops, on_grid, system

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """One thing to race.

    Attributes:
        name: ``kind/which/mode/dtype``.
        build: makes PyTorch's module and ours, from the same weights, in float32 on the CPU.
        shape: of the input.
        dtype: a key of :data:`DTYPES`; float32 products may use TF32 as PyTorch's flags say.
        training: forward and backward, or inference.
        needs_x: whether the backward also reaches the input.
        bytes: that must move at least: what a call takes and gives, once per direction of differentiation.
        flops: of its products, forward and backward; 0 where nobody has counted.
        images: whether the input is images, which may lie channels-last.
    """

    name: str
    build: Callable[[], tuple[nn.Module, nn.Module]]
    shape: tuple[int, ...]
    dtype: str
    training: bool
    needs_x: bool = False
    bytes: int = 0
    flops: int = 0
    images: bool = True

    def draw(self, generator: torch.Generator, device: str) -> Tensor:
        """A fresh input, on a grid where products of whole numbers keep pool winners apart from rounding."""
        x = on_grid(torch.randn(self.shape, generator=generator), INPUT_STEP)
        return x.to(device, DTYPES[self.dtype])


class _Block(nn.Module):
    """A conv block by either of the two functions of one signature."""

    def __init__(
        self, function, conv: nn.Module, norm: nn.Module | None, pool: nn.Module | None, layout: str
    ):
        super().__init__()
        self.function, self.conv, self.norm, self.pool, self.layout = function, conv, norm, pool, layout

    def forward(self, x: Tensor) -> Tensor:
        c = self.conv
        return self.function(
            x, c.weight, c.bias, stride=c.stride, padding=c.padding, norm=self.norm, pool=self.pool,
            layout=self.layout,
        )  # fmt: skip


def _pair_of_blocks(conv: Callable[[], nn.Module], pool: nn.Module | None, layout: str, normed: bool = False):
    module = conv()
    norm = nn.BatchNorm2d(module.out_channels) if normed else None
    reference = _Block(cf.reference.conv_block, module, norm, pool, layout)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(on_grid(p, WEIGHT_STEP))
    fast = copy.deepcopy(reference)
    fast.function = cf.functional.conv_block
    return reference, fast


def _blocks(dtype: str, training: bool) -> list[Work]:
    """The tutorial's blocks, and first layers of an OCR, a video and an Atari model with one inner layer.

    Those named BN have a batch norm, whose statistics are the batch's in training: the input is read once
    more before the first result, since all of it decides them.
    """
    max2 = nn.MaxPool2d(2)
    found = []
    for name, shape, conv, pool, layout in (
        ("TimeDistributed", (1280, 3, 28, 28), partial(nn.Conv2d, 3, 64, 3, padding=1), max2, "features"),
        ("Simple", (128, 3, 28, 28), partial(nn.Conv2d, 3, 64, 3, padding=1), max2, "locations"),
        ("CRNN 1", (64, 1, 32, 100), partial(nn.Conv2d, 1, 64, 3, padding=1), max2, "channels_first"),
        ("CRNN 2", (64, 64, 16, 50), partial(nn.Conv2d, 64, 128, 3, padding=1), max2, "channels_first"),
        (
            "video", (240, 3, 112, 112), partial(nn.Conv2d, 3, 64, 7, stride=2, padding=3),
            nn.MaxPool2d(3, 2, 1), "channels_first",
        ),
        ("Atari", (512, 4, 84, 84), partial(nn.Conv2d, 4, 32, 8, stride=4), None, "channels_first"),
        (
            "video BN", (240, 3, 112, 112), partial(nn.Conv2d, 3, 64, 7, stride=2, padding=3, bias=False),
            nn.MaxPool2d(3, 2, 1), "channels_first",
        ),
        (
            "CRNN BN", (64, 256, 8, 25), partial(nn.Conv2d, 256, 512, 3, padding=1, bias=False),
            nn.MaxPool2d(2, (2, 1), (0, 1)), "channels_first",
        ),
    ):  # fmt: skip
        normed = name.endswith(" BN")
        module = conv(device="meta")
        map_shape = module(torch.empty(shape, device="meta")).shape
        out = pool(torch.empty(map_shape, device="meta")).numel() if pool else prod(map_shape)
        needs_x = training and shape[1] > 4
        ways = 1 + training * (1 + needs_x)
        read = ways + (normed and training)
        moved = (prod(shape) * read + out * (2 if training else 1)) * DTYPES[dtype].itemsize
        found.append(
            Work(
                f"block/{name}/{'training' if training else 'inference'}/{dtype}",
                partial(_pair_of_blocks, conv, pool, layout, normed),
                shape,
                dtype,
                training,
                needs_x,
                bytes=moved,
                flops=ways * conv_flops(prod(map_shape), shape[1], module.kernel_size),
            )
        )
    return found


class _Looped(nn.Module):
    """What people write who need resets: their layer called once per step."""

    def __init__(self, layer: nn.RNNBase, reset: Tensor):
        super().__init__()
        self.layer = layer
        self.register_buffer("reset", reset)

    def forward(self, x: Tensor) -> Tensor:
        state, outs = None, []
        for step, restart in zip(x, self.reset, strict=True):
            if state is not None:
                keep = (~restart).to(x.dtype)[None, :, None]
                state = tuple(s * keep for s in state) if isinstance(state, tuple) else state * keep
            out, state = self.layer(step[None], state)
            outs.append(out)
        return torch.cat(outs)


class _Packed(nn.Module):
    """PyTorch's layer over sequences of different lengths."""

    def __init__(self, layer: nn.RNNBase, lengths: Tensor):
        super().__init__()
        self.layer, self.lengths = layer, lengths

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, self.lengths, enforce_sorted=False)
        return pad_packed_sequence(self.layer(packed)[0], total_length=len(x))[0]


class _Masked(nn.Module):
    """Our layer with a mask."""

    def __init__(self, layer: nn.RNNBase, name: str, mask: Tensor):
        super().__init__()
        self.layer, self.name = layer, name
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, **{self.name: self.mask})[0]


def _pair_of_layers(kind: str, shape: tuple[int, int, int], hidden: int, options: dict, masked: str):
    generator = torch.Generator().manual_seed(0)
    plain = getattr(nn, kind)(shape[2], hidden, **options)
    fast = getattr(cf, kind)(shape[2], hidden, **options)
    fast.load_state_dict(plain.state_dict())
    if masked == "reset":
        mask = torch.rand(shape[:2], generator=generator) < 0.02
        return _Looped(plain, mask), _Masked(fast, "reset", mask)
    mask = torch.randint(shape[0] // 2, shape[0] + 1, shape[1:2], generator=generator)
    return _Packed(plain, mask), _Masked(fast, "lengths", mask)


def _layers(dtype: str, training: bool) -> list[Work]:
    """Policies with resets, and batches of sentences."""
    found = []
    for name, kind, shape, hidden, options, masked in (
        ("LSTM resets 512-128", "LSTM", (128, 2, 512), 128, {}, "reset"),
        ("LSTM resets 519", "LSTM", (81, 8, 519), 519, {"num_layers": 2}, "reset"),
        ("GRU resets 64", "GRU", (128, 256, 64), 64, {}, "reset"),
        ("LSTM lengths 128", "LSTM", (100, 32, 128), 128, {"bidirectional": True}, "lengths"),
        ("GRU lengths 128", "GRU", (100, 32, 128), 128, {"bidirectional": True}, "lengths"),
        ("LSTM lengths 64-128", "LSTM", (1000, 8, 64), 128, {}, "lengths"),
    ):
        found.append(
            Work(
                f"layer/{name}/{'training' if training else 'inference'}/{dtype}",
                partial(_pair_of_layers, kind, shape, hidden, options, masked),
                shape,
                dtype,
                training,
                images=False,
            )
        )
    return found


def _systems(dtype: str, training: bool) -> list[Work]:
    mode = "training" if training else "inference"
    cases = [system(kind, stage="model", mode=mode) for kind in SYSTEMS]
    return [
        Work(
            f"system/{kind}/{mode}/{dtype}",
            case.build,
            case.shape,
            dtype,
            training,
            images=not case.has_clips,
        )
        for kind, case in zip(SYSTEMS, cases, strict=True)
    ]


def works() -> dict[str, Work]:
    """Everything there is to race, by name; inference first."""
    return {
        work.name: work
        for training in (False, True)
        for make in (_blocks, _layers, _systems)
        for dtype in DTYPES
        for work in make(dtype, training)
    }
