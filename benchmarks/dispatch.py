"""What small calls cost: a block against eager's operators, a step of a stream against PyTorch's layer."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import cnnlstm_fast as cf
from benchmarks.race import Spread, WrongResult, paired_ratio

#: Allowed beyond eager's three operators, in microseconds.
BUDGET_US = 25.0
SHAPE = (1, 3, 8, 8)
CHANNELS = (8, 64)


@dataclass(frozen=True)
class Dispatch:
    """Microseconds per call on a 1x3x8x8 input; ``extra_us`` is ours less eager's, paired by round.

    ``mode`` is ``"inference"``, or ``"forward"`` for a forward that records a backward.
    """

    channels: int
    mode: str
    eager_us: float
    ours_us: float
    extra_us: Spread


@dataclass(frozen=True)
class Step:
    """Microseconds for one step of a recurrent layer that carries its state on; ``ratio`` is paired by round.

    ``ours_us`` is that of ``layer.stream()``, ``eager_us`` of PyTorch's layer called with a sequence of one.
    """

    layer: str
    batch: int
    eager_us: float
    ours_us: float
    ratio: Spread


#: Layers of one step: kind, inputs, hidden, layers, batch.
STEPS = (("LSTM", 64, 128, 1, 1), ("LSTM", 512, 512, 1, 1), ("LSTM", 64, 128, 2, 8), ("GRU", 64, 128, 1, 1))


def measure_step(
    kind: str, inputs: int, hidden: int, layers: int, batch: int, *, rounds: int = 30, calls: int = 200
) -> Step:
    """Race a stream against the plain layer, step by step, each on its own state.

    Raises:
        WrongResult: the two differ after as many steps as one turn has.
    """
    theirs = getattr(nn, kind)(inputs, hidden, layers, batch_first=True).eval()
    stream = getattr(cf, kind).like(theirs).stream(batch)
    x = torch.randn(batch, inputs)
    state = None

    def eager():
        nonlocal state
        y, state = theirs(x[:, None], state)
        return y[:, 0]

    def step():
        return stream(x)

    with torch.inference_mode():
        for _ in range(calls):
            expected, found = eager(), step()
        off = float((found - expected).abs().max())
        if not off <= 1e-5:
            raise WrongResult(f"a stream of {kind} is off by {off:.1e} after {calls} steps; not timed")
        pairs = [_pair(r, eager, step, calls) for r in range(rounds)]
    eager_us, ours_us = (list(side) for side in zip(*pairs, strict=True))
    name = f"{kind} {inputs}-{hidden}" + (f"x{layers}" if layers > 1 else "")
    return Step(name, batch, Spread.of(eager_us).p50, Spread.of(ours_us).p50, paired_ratio(eager_us, ours_us))


def measure(channels: int, mode: str, *, rounds: int = 30, calls: int = 300) -> Dispatch:
    """Race eager's conv, ReLU and max pool against the one fused call, one thread, in turn."""
    x = torch.randn(SHAPE)
    conv, pool = nn.Conv2d(SHAPE[1], channels, 3, padding=1), nn.MaxPool2d(2)

    def eager():
        return F.max_pool2d(F.relu(F.conv2d(x, conv.weight, conv.bias, padding=1)), 2)

    def fused():
        return cf.functional.conv_block(x, conv.weight, conv.bias, padding=1, pool=pool)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is measured is one thread's path, not the waking of others
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode(mode == "inference"):
            _per_call_us(eager, calls), _per_call_us(fused, calls)
            pairs = [_pair(r, eager, fused, calls) for r in range(rounds)]
    finally:
        gc.enable()
        torch.set_num_threads(threads)
    theirs, ours = (Spread.of(list(side)).p50 for side in zip(*pairs, strict=True))
    return Dispatch(channels, mode, theirs, ours, Spread.of([o - t for t, o in pairs]))


def _pair(r: int, eager, fused, calls: int) -> tuple[float, float]:
    if r % 2:
        ours = _per_call_us(fused, calls)
        return _per_call_us(eager, calls), ours
    return _per_call_us(eager, calls), _per_call_us(fused, calls)


def _per_call_us(run, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls * 1e6
