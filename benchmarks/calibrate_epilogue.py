"""Passes behind a convolution, by PyTorch's operators in turn and as one epilogue: races, and their rates.

The rates are fitted as those of plans (:mod:`benchmarks.calibrate`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import exp, log

import torch
from torch import Tensor, nn

from benchmarks.calibrate_fit import Clock, fit
from cnnlstm_fast.functional.epilogue import Sum, program_of, run_program
from cnnlstm_fast.planning import costs

#: Kinds of steps, as people write them.
_PROGRAMS = (
    ("norm",), ("norm", "activation"), ("activation", "norm"), ("sum", "activation"), ("norm", "sum"),
    ("norm", "sum", "activation"), ("norm", "curve"), ("curve", "norm"), ("slow curve",),
    ("slow curve", "norm"),
)  # fmt: skip
#: Elements of a map: between these.
_LEAST, _MOST = 3e3, 6e6
#: Elements of a map that has every term.
_LARGE = 1e9
#: Rounds, and calls of one way in a round, of which the first one does not count.
_ROUNDS, _CALLS = 4, 3

#: One way to run the steps: what it does, and nanoseconds forward and backward.
Row = tuple[costs.Counts, tuple[float, float]]


def race_epilogues(
    count: int, seed: int, dtype: torch.dtype, clock: Clock = time.perf_counter
) -> dict[str, list[Row]]:
    """``count`` random maps and steps, each by PyTorch's operators (``steps``) and as an ``epilogue``."""
    rng = random.Random(seed)
    found: dict[str, list[Row]] = {"steps": [], "epilogue": []}
    for _ in range(count):
        kinds = rng.choice(_PROGRAMS)
        training = rng.random() < 0.6
        channels, side = rng.choice((16, 24, 32, 64, 128, 256)), rng.choice((4, 7, 14, 28, 56))
        batch = max(1, round(exp(rng.uniform(log(_LEAST), log(_MOST))) / (channels * side * side)))
        shape = batch, channels, side, side
        of_batch = training and "norm" in kinds
        ways = _ways(kinds, shape, dtype, training, rng.random() < 0.3)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for turn in range(_ROUNDS):
            for name in [*ways][:: 1 if turn % 2 else -1]:
                with torch.set_grad_enabled(training):
                    times[name] += [_seconds(ways[name], clock) for _ in range(_CALLS)][1:]
        sizes = batch * channels * side * side, dtype.itemsize
        for name, count in costs.PASSES.items():
            forward, backward = (1e9 * min(t[way] for t in times[name]) for way in range(2))
            found[name].append((count(*sizes, kinds, of_batch, training), (forward, backward)))
    return found


def _ways(
    kinds: Sequence[str], shape: tuple[int, ...], dtype: torch.dtype, training: bool, last: bool
) -> dict[str, Callable[[], Tensor]]:
    """By name, what runs the steps on the same map."""
    lies = torch.channels_last if last else torch.contiguous_format
    x, added = (torch.randn(shape).to(dtype).contiguous(memory_format=lies) for _ in range(2))
    x.requires_grad_(training), added.requires_grad_(training)
    modules = {
        "norm": nn.BatchNorm2d(shape[1]).train(training), "activation": nn.ReLU(), "sum": Sum(),
        "curve": nn.SiLU(), "slow curve": nn.Tanh(),
    }  # fmt: skip
    stages = [modules[kind] for kind in kinds]
    program = program_of(stages)  # type: ignore[arg-type]
    assert not isinstance(program, str)

    def steps() -> Tensor:
        y = x
        for stage in stages:
            y = y + added if isinstance(stage, Sum) else stage(y)  # type: ignore[operator]
        return y

    return {"steps": steps, "epilogue": partial(run_program, x, program, added if "sum" in kinds else None)}


def _seconds(run: Callable[[], Tensor], clock: Clock) -> tuple[float, float]:
    """Seconds forward and backward."""
    start = clock()
    y = run()
    between = clock()
    if not y.requires_grad:
        return between - start, 0.0
    grad = torch.ones_like(y)
    begun = clock()
    y.backward(grad)
    return between - start, clock() - begun


def fit_epilogues(rows: dict[str, list[Row]]) -> dict[str, dict[str, dict[str, float]]]:
    """Rates by what ran (``steps`` or ``epilogue``) and way, for as many threads as ran."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, raced in rows.items():
        count = partial(costs.PASSES[name], _LARGE, 1)
        terms = {term for kinds in _PROGRAMS for batch in (True, False) for term in count(kinds, batch, True)}
        found[name] = {}
        for i, way in enumerate(("forward", "backward")):
            rates = fit([(done, ns[i]) for done, ns in raced if ns[i]], {})
            found[name][way] = {
                term: rates.get(term, 0.0) for term in sorted(terms)
            }  # larger maps cost no more
    return found
