"""Models as people wrote them, each run three ways in turn: eager, eager on channels-last, accelerated.

The models are those of :mod:`tests.field_models` and :mod:`tests.public_models` at sizes of the field. The
fast model is judged by the better of the two eager ways.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

import cnnlstm_fast as cf
from benchmarks.field import MODELS as FIELD
from benchmarks.race import PAUSE_S, Spread
from tests.public_models import PUBLIC

#: By name: how a model is made, and the shape of its input.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{name: (kind, shape) for name, (kind, shape, _) in FIELD.items()},
    **{
        name: (PUBLIC[name], shape)
        for name, shape in {
            "residual_recogniser": (8, 1, 32, 128),
            "order_book": (32, 1, 100, 40),
            "squeeze_excitation": (8, 1, 200, 64),
            "lip_reading": (2, 1, 29, 88, 88),
            "weight_norm": (4, 1, 8000),
            "spectrogram_tagger": (4, 1, 300, 16),
            "dense": (16, 1, 16, 128),
        }.items()
    },
}


@dataclass(frozen=True)
class ModelRace:
    """One model in one mode.

    Attributes:
        name, mode: of the model; ``"inference"`` or ``"training"``.
        ratio: time of the best eager way over the fast model's, by round.
        eager_ms, channels_last_ms, fast_ms: medians.
        tuned: the fast model ran under ``cnnlstm_fast.tune``.
        lines: what became of each site, in words.
        float32_ms: median of eager in float32, where the others ran under bfloat16 autocast.
    """

    name: str
    mode: str
    ratio: Spread
    eager_ms: float
    channels_last_ms: float
    fast_ms: float
    tuned: bool
    lines: list[str]
    float32_ms: float | None = None

    def describe(self) -> str:
        """The race in a line."""
        peers = {"eager": self.eager_ms, "channels-last": self.channels_last_ms, "float32": self.float32_ms}
        times = ", ".join(f"{peer} ({ms:.1f} ms)" for peer, ms in peers.items() if ms is not None)
        low = "" if self.float32_ms is None else ", bfloat16 autocast"
        spread = f"{self.ratio.p50:.2f} ({self.ratio.p20:.2f} to {self.ratio.p80:.2f})"
        return f"{self.name}, {self.mode}{low}: {spread} times as fast as the best of {times}"


def race_model(
    name: str,
    mode: str,
    *,
    seed: int,
    rounds: int = 7,
    tune: bool = False,
    autocast: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> ModelRace:
    """Run a model three ways in turn, or four, on the same fresh inputs.

    Args:
        name: in :data:`MODELS`.
        mode: ``"inference"`` or ``"training"``.
        seed: of weights and inputs.
        rounds: in each of which every way runs three times; the faster of the last two counts.
        tune: whether the fast model runs under ``cnnlstm_fast.tune``.
        autocast: whether they run under bfloat16 autocast; then eager in float32 is a fourth way.
        clock: seconds, of the wall or of this process's own work.
    """
    torch.manual_seed(seed)
    make, shape = MODELS[name]
    training = mode == "training"
    plain = make().train(training)
    for module in plain.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0  # the time of drawing random numbers is nobody's merit
    last = copy.deepcopy(plain)
    for weight in last.parameters():
        if weight.dim() == 4:
            weight.data = weight.contiguous(memory_format=torch.channels_last)
    fast = cf.accelerate(copy.deepcopy(plain))
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "eager": plain,
        "channels_last": lambda x: last(x.to(memory_format=torch.channels_last) if x.dim() == 4 else x),
        "fast": fast,
    }
    models = {"eager": plain, "channels_last": last, "fast": fast}
    if autocast:
        ways["float32"] = models["float32"] = copy.deepcopy(plain)
    x = torch.randn(shape)
    grad = torch.randn(plain(x).shape) if training else torch.empty(0)

    def call(way: str, x: Tensor) -> float:
        models[way].zero_grad(set_to_none=True)
        start = clock()
        with torch.inference_mode(not training):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast and way != "float32"):
                y = ways[way](x)
            if training:
                y.backward(grad.to(y.dtype))
        del y
        return clock() - start

    with cf.tune(tune):
        for way in models:
            for _ in range(3):
                call(way, x)
        times: dict[str, list[float]] = {way: [] for way in models}
        names = list(models)
        gc.disable()
        try:
            for turn in range(rounds):
                x = torch.randn(shape)
                for way in names[turn % len(names) :] + names[: turn % len(names)]:
                    time.sleep(PAUSE_S)
                    call(way, x)
                    times[way].append(min(call(way, x) for _ in range(2)))
        finally:
            gc.enable()
    ms = {way: 1e3 * median(found) for way, found in times.items()}
    best = min((way for way in names if way != "fast"), key=ms.__getitem__)
    ratios = [theirs / ours for theirs, ours in zip(times[best], times["fast"], strict=True)]
    return ModelRace(
        name, mode, Spread.of(ratios), ms["eager"], ms["channels_last"], ms["fast"], tune,
        str(fast.report()).splitlines(), ms.get("float32"),
    )  # fmt: skip
