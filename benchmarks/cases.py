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
        x = on_grid(x, INPUT_STEP)
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
    flops = conv_flops(images * 64 * prod(size), channels, (3, 3))
    if kind == "1DConv":
        flops += conv_flops(images * 64 * (size[0] // 2) * (size[1] // 2), 64, (3,))
    whole = stage == "model"
    lent = () if whole or training else LENT_PEERS
    shape = (batch, frames, channels, *size) if kind == "TimeDistributed" else (batch, channels, *size)
    return Case(
        name=label or f"{kind}/{stage}/{mode}",
        build=partial(_pair, f"CNN_LSTM_{kind}", channels, size, hidden),
        shape=shape,
        features=_features,
        head=_head if whole else None,
        training=training,
        flops=None if whole or training else flops,
        peers=TRAINING_PEERS if training else INFERENCE_PEERS + lent,
        targets=targets or {},
    )


def _first_result(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)[0]


def _rnn_pair(kind: str, inputs: int, hidden: int, layers: int, bidirectional: bool):
    args = (inputs, hidden, layers)
    options = {"bidirectional": bidirectional, "batch_first": True}
    reference, fast = getattr(nn, kind)(*args, **options), getattr(cf, kind)(*args, **options)
    fast.load_state_dict(reference.state_dict())
    return reference, fast


def recurrent(
    kind: str,
    *,
    mode: str = "inference",
    batch: int = 32,
    steps: int = 128,
    inputs: int = 64,
    hidden: int = HIDDEN,
    layers: int = 1,
    bidirectional: bool = False,
    label: str | None = None,
) -> Case:
    """A case of one recurrent stack alone, ``LSTM`` or ``GRU``, over ``(batch, steps, inputs)``."""
    gates, directions = (4 if kind == "LSTM" else 3), (2 if bidirectional else 1)
    read = sum((directions * hidden if layer else inputs) + hidden for layer in range(layers))
    training = mode == "training"
    return Case(
        name=label or f"{kind}/{mode}",
        build=partial(_rnn_pair, kind, inputs, hidden, layers, bidirectional),
        shape=(batch, steps, inputs),
        features=_first_result,
        training=training,
        flops=None if training else 2 * batch * steps * directions * gates * hidden * read,
        peers=("eager", "torch.compile") if training else ("eager", *_WHOLE_PEERS[2:]),
    )


def _whole(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _model_pair(name: str):
    model, _ = models_of_the_field.MODELS[name]
    reference, fast = model(nn), model(cf)
    fast.load_state_dict(reference.state_dict())
    return reference, fast


def of_the_field(name: str) -> Case:
    """Inference of one of the whole models in :mod:`benchmarks.field`.

    Training is not raced: its gradients pass many ReLUs and pools, so that one winner that falls the
    other way by rounding outweighs what the gate looks for; only layers that see the inputs can be
    verified exactly.
    """
    return Case(
        name=f"{name}/inference",
        build=partial(_model_pair, name),
        shape=models_of_the_field.MODELS[name][1],
        features=_whole,
        peers=_WHOLE_PEERS,
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

#: The three systems at the tutorial's sizes, features stage first; recurrent stacks; whole models.
CASES: dict[str, Case] = {
    case.name: case
    for stage in ("features", "model")
    for mode in ("inference", "training")
    for case in (
        system(
            kind,
            stage=stage,
            mode=mode,
            targets=_TARGETS[kind, mode] if stage == "features" else None,
        )
        for kind in SYSTEMS
    )
} | {
    case.name: case
    for case in (
        *(recurrent(kind, mode=mode) for mode in ("inference", "training") for kind in ("LSTM", "GRU")),
        *map(of_the_field, models_of_the_field.MODELS),
    )
}
