"""What one small block costs in Python and dispatch: the fused block against eager's three operators."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import cnnlstm_fast as cf
from benchmarks.race import Spread

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
