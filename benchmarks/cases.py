"""What is measured.

A case holds the same weights twice, in the plain PyTorch model and in the fast one, and says what
runs (the features stage, which is everything before the LSTM, or the whole model), how (inference
or training), on what inputs, and which peers race.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

import cnnlstm_fast as cf
from benchmarks import field as models_of_the_field
from benchmarks.recurrent import build_layers, recurrent_flops

INFERENCE_PEERS = (
    "eager",
    "channels_last",
    "chunked 16",
    "chunked 8",
    "torch.compile",
    "ONNX Runtime",
    "OpenVINO",
)
#: Of what has no part before the RNN that could be run in chunks.
_WHOLE_PEERS = ("eager", "channels_last", "torch.compile", "ONNX Runtime", "OpenVINO")
#: Results that the next call overwrites: shown, never part of a claim.
LENT_PEERS = ("ONNX Runtime, lent output", "OpenVINO, lent output")
TRAINING_PEERS = ("eager", "torch.compile", "chunked 16", "chunked 8")

HIDDEN, LAYERS, CLASSES = 128, 2, 10
LEARNING_RATE = 1e-3

#: Where a backward is verified, inputs and weights are multiples of these: a convolution's sums are
#: then exact in float32, so that no pool's winner hangs on rounding. One winner that falls the other
#: way would outweigh all rounding errors of a gradient.
INPUT_STEP = 2.0**-6
WEIGHT_STEP = 2.0**-10


def on_grid(t: Tensor, step: float) -> Tensor:
    """Round to multiples of ``step``, a power of two."""
    return torch.round(t / step) * step


@dataclass(frozen=True)
class Batch:
    """One repetition's fresh inputs.

    ``target`` is what training needs beside ``x``: the gradient of the features, or class labels.
    """

    x: Tensor
    target: Tensor | None = None


@dataclass(frozen=True)
class Case:
    """One thing to race.

    Attributes:
        name: ``system/stage/mode``.
        build: makes the reference model and the fast one, from the same weights.
        shape: of the input.
        features: ``(model, x) -> y``: the stage before the LSTM.
        head: ``(model, y) -> scores``: the rest, or None where only the features are measured.
        training: forward and backward (and an SGD step where there is a head), or inference.
        flops: floating-point operations of one call, where a fraction of the peak makes sense.
        peers: names in :data:`benchmarks.peers.PEERS`.
        targets: the ratios aimed at: over ``"best"`` (the fastest peer that hands over its result)
            or over a peer by name.
        input_gradient: whether training needs the gradient of the input as well.
        quick: whether a quick run has it.
    """

    name: str
    build: Callable[[], tuple[nn.Module, nn.Module]]
    shape: tuple[int, ...]
    features: Callable[[nn.Module, Tensor], Tensor]
    head: Callable[[nn.Module, Tensor], Tensor] | None = None
    training: bool = False
    flops: int | None = None
    peers: tuple[str, ...] = INFERENCE_PEERS
    targets: dict[str, float] = field(default_factory=dict)
    input_gradient: bool = False
    quick: bool = True

    @property
    def has_clips(self) -> bool:
        """Whether inputs are clips ``(B, T, C, H, W)``."""
        return len(self.shape) == 5

    @property
    def has_images(self) -> bool:
        """Whether inputs are images ``(B, C, H, W)``; else, without clips, sequences or signals."""
        return len(self.shape) == 4

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        """What is measured, as the model's user would call it."""
        return self.features(model, x) if self.head is None else model(x)

    def draw(self, generator: torch.Generator, like: Tensor | None = None) -> Batch:
        """Fresh random inputs; ``like`` is any result of this case and gives the gradient's shape."""
        x = torch.randn(self.shape, generator=generator)
        if not self.training:
            return Batch(x)
        x = on_grid(x, INPUT_STEP).requires_grad_(self.input_gradient)
        if self.head is not None:
            return Batch(x, torch.randint(CLASSES, self.shape[:1], generator=generator))
        if like is None:
            raise ValueError("training the features needs a result of theirs, for the gradient's shape")
        return Batch(x, torch.randn(like.shape, generator=generator))


def conv_flops(outputs: int, channels: int, kernel: tuple[int, ...]) -> int:
    """Floating-point operations of a convolution with this many output elements before any pool."""
    return 2 * outputs * channels * prod(kernel)


def _features(model: nn.Module, x: Tensor) -> Tensor:
    return model.features(x)


def _head(model: nn.Module, y: Tensor) -> Tensor:
    steps, _ = model.lstm(y)
    return model.fc(steps[:, -1])


def _pair(kind: str, channels: int, size: tuple[int, int], hidden: int):
    options = {"image_size": size} if kind.endswith("TimeDistributed") else {}
    args = (channels, hidden, LAYERS, CLASSES)
    reference = getattr(cf.reference, kind)(*args, **options)
    fast = getattr(cf, kind)(*args, **options)
    with torch.no_grad():
        for p in reference.parameters():
            p.copy_(on_grid(p, WEIGHT_STEP))
    fast.load_state_dict(reference.state_dict())
    return reference, fast


def system(
    kind: str,
    *,
    stage: str = "features",
    mode: str = "inference",
    batch: int = 128,
    frames: int = 10,
    channels: int = 3,
    size: tuple[int, int] = (28, 28),
    hidden: int = HIDDEN,
    label: str | None = None,
    targets: dict[str, float] | None = None,
) -> Case:
    """A case of one of the three systems: ``Simple``, ``1DConv`` or ``TimeDistributed``."""
    training = mode == "training"
    images = batch * (frames if kind == "TimeDistributed" else 1)
    locations = (size[0] // 2) * (size[1] // 2)
    flops = conv_flops(images * 64 * prod(size), channels, (3, 3))
    if kind == "1DConv":
        flops += conv_flops(images * 64 * locations, 64, (3,))
    whole = stage == "model"
    if whole:
        sequence, inputs = (frames, 64 * locations) if kind == "TimeDistributed" else (locations, 64)
        flops += recurrent_flops("LSTM", (batch, sequence), inputs, hidden, LAYERS)
    lent = () if whole or training else LENT_PEERS
    shape = (batch, frames, channels, *size) if kind == "TimeDistributed" else (batch, channels, *size)
    return Case(
        name=label or f"{kind}/{stage}/{mode}",
        build=partial(_pair, f"CNN_LSTM_{kind}", channels, size, hidden),
        shape=shape,
        features=_features,
        head=_head if whole else None,
        training=training,
        flops=None if training else flops,
        peers=TRAINING_PEERS if training else INFERENCE_PEERS + lent,
        targets=targets or {},
        quick=not whole,
    )


def _whole(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def recurrent(
    kind: str,
    shape: tuple[int, int],
    inputs: int,
    hidden: int,
    *,
    given: str = "plain",
    mode: str = "training",
    layers: int = 1,
    bidirectional: bool = False,
    targets: dict[str, float] | None = None,
) -> Case:
    """A case of one recurrent layer or stack over (B, T); see :func:`benchmarks.recurrent.build_layers`."""
    options = {"num_layers": layers, "bidirectional": bidirectional}
    training = mode == "training"
    stack = f"{inputs}-{hidden}" + f"x{layers}" * (layers > 1) + " both ways" * bidirectional
    return Case(
        name=f"recurrent/{given}/{kind} T={shape[1]} B={shape[0]} {stack}/{mode}",
        build=partial(build_layers, kind, inputs, hidden, shape, given, **options),
        shape=(*shape, inputs),
        features=_whole,
        training=training,
        flops=None if training else recurrent_flops(kind, shape, inputs, hidden, layers, 1 + bidirectional),
        peers=("eager", "torch.compile") + (() if training else ("ONNX Runtime", "OpenVINO")),
        targets=targets or {},
        input_gradient=training,
        quick=False,
    )


def of_the_field(name: str, mode: str) -> Case:
    """A case of one of the models in :mod:`benchmarks.field`, ours being ``cf.accelerate`` of it."""
    _, shape, targets = models_of_the_field.MODELS[name]
    training = mode == "training"
    return Case(
        name=f"field/{name}/{mode}",
        build=partial(models_of_the_field.build, name),
        shape=shape,
        features=_whole,
        training=training,
        peers=("eager", "channels_last", "torch.compile") if training else _WHOLE_PEERS,
        targets={"best": targets[training]},
        quick=False,
    )


SYSTEMS = ("Simple", "1DConv", "TimeDistributed")

_TARGETS: dict[tuple[str, str], dict[str, float]] = {
    ("Simple", "inference"): {"best": 1.7},
    ("1DConv", "inference"): {"best": 1.5},
    ("TimeDistributed", "inference"): {"best": 1.8, "eager": 15},
    ("Simple", "training"): {"best": 3},
    ("1DConv", "training"): {"best": 2.5},
    ("TimeDistributed", "training"): {"best": 5, "eager": 15},
}

_MODEL_TARGETS: dict[tuple[str, str], dict[str, float]] = {
    ("Simple", "inference"): {"best": 1.3},
    ("1DConv", "inference"): {"best": 1.25},
    ("TimeDistributed", "inference"): {"best": 1.15, "eager": 5},
    ("Simple", "training"): {"best": 1.8},
    ("1DConv", "training"): {"best": 1.8},
    ("TimeDistributed", "training"): {"best": 3.2},
}

#: Layers of agents (TorchBeast's and CleanRL's sizes), of taggers and transcribers, and the tutorial's.
#: The same without resets or lengths stands beside each, to see what these cost.
_RECURRENT = (
    *(
        recurrent("LSTM", (8, 81), 519, 519, layers=2, given=given, targets=targets)
        for given, targets in (("resets", {"eager": 10}), ("plain", {}))
    ),
    *(
        recurrent("LSTM", (2, 128), 512, 128, given=given, targets=targets)
        for given, targets in (("resets", {"eager": 12}), ("plain", {}))
    ),
    *(
        recurrent(kind, (32, 100), 128, 128, bidirectional=True, given=given, targets=targets)
        for kind in ("LSTM", "GRU")
        for given, targets in (("lengths", {"eager": 3}), ("plain", {}))
    ),
    *(
        recurrent("LSTM", (8, 1000), 64, 128, given=given, targets=targets)
        for given, targets in (("lengths", {"eager": 8}), ("plain", {}))
    ),
    *(
        recurrent(kind, (128, 196), 64, 128, layers=2, mode=mode, targets={"best": target})
        for kind, mode, target in (
            ("GRU", "inference", 2),
            ("GRU", "training", 2),
            ("LSTM", "inference", 1.3),
            ("LSTM", "training", 1.8),
        )
    ),
)

#: The three systems at the tutorial's sizes, features stage first; recurrent layers alone; whole models.
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        *(
            system(kind, stage=stage, mode=mode, targets=targets[kind, mode])
            for stage, targets in (("features", _TARGETS), ("model", _MODEL_TARGETS))
            for mode in ("inference", "training")
            for kind in SYSTEMS
        ),
        *_RECURRENT,
        *(
            of_the_field(name, mode)
            for name in models_of_the_field.MODELS
            for mode in ("inference", "training")
        ),
    )
}
