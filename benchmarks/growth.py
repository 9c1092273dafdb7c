"""How time grows with arithmetic, and memory with data, one axis at a time.

A series that is straight costs a fixed amount per call and a fixed amount per unit of work. Where time
leaves the line, another line begins: the table says where, how large weights and data are there, and what
the rate is from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import numpy as np
import torch

from benchmarks.cases import HIDDEN, Case, recurrent, system
from benchmarks.race import OURS, Spread, race
from cnnlstm_fast.measure import kept_bytes

#: A line is called straight if no point is further from it than this share of the point.
STRAIGHT_MS = 0.25


@dataclass(frozen=True)
class Series:
    """One axis of growth.

    Attributes:
        name: in tables and plots.
        values: along the axis, in a full run.
        quick: the ends and some between, for a quick run.
        case: what is measured at a value.
    """

    name: str
    values: tuple[int, ...]
    quick: tuple[int, ...]
    case: Callable[[int], Case]


def _doubling(low: int, high: int) -> tuple[int, ...]:
    return tuple(low << i for i in range((high // low).bit_length()))


def _steps(kind: str, steps: int) -> Case:
    return recurrent(kind, (8, steps), 64, HIDDEN, mode="inference")


SERIES: dict[str, Series] = {
    s.name: s
    for s in (
        Series("batch", _doubling(1, 1024), (1, 16, 128), lambda n: system("Simple", batch=n)),
        Series(
            "frames",
            _doubling(1, 2048),
            (1, 16, 256),
            lambda n: system("TimeDistributed", batch=1, frames=n),
        ),
        Series(
            "image size",
            _doubling(8, 256),
            (8, 32, 128),
            lambda n: system("Simple", batch=8, size=(n, n)),
        ),
        Series("channels", _doubling(1, 128), (1, 8, 32), lambda n: system("Simple", batch=16, channels=n)),
        Series("steps, LSTM", _doubling(1, 4096), (1, 64, 1024), lambda n: _steps("LSTM", n)),
        Series("steps, GRU", _doubling(1, 4096), (1, 64, 1024), lambda n: _steps("GRU", n)),
        Series(
            "hidden size, LSTM",
            _doubling(16, 1024),
            (16, 64, 256),
            lambda n: recurrent("LSTM", (16, 32), n, n, mode="inference"),
        ),
    )
}


@dataclass(frozen=True)
class Point:
    """One value of one series.

    Attributes:
        series, value: which.
        flops: floating-point operations of a call: what time is held against.
        data: bytes of input and result: what memory is held against.
        parameters: bytes of the weights that the call uses.
        eager_ms, ours_ms: inference, after both were verified.
        ratio: eager's time over ours, paired by round.
        eager_bytes, ours_bytes: kept between forward and backward; input included, parameters not.
        others_cpu: share of the machine that other processes used meanwhile.
    """

    series: str
    value: int
    flops: int
    data: int
    parameters: int
    eager_ms: Spread
    ours_ms: Spread
    ratio: Spread
    eager_bytes: int
    ours_bytes: int
    others_cpu: float


def measure(series: Series, value: int, *, rounds: int, turn_s: float, seed: int) -> Point:
    """Verify, race over eager, and count what a backward would find.

    Raises:
        WrongResult: ours is wrong; nothing was timed.
    """
    case = replace(series.case(value), peers=("eager",), name=f"{series.name} {value}")
    result = race(case, rounds=rounds, turn_s=turn_s, seed=seed, inputs=2)
    x = torch.randn(case.shape)
    reference, fast = case.build()
    eager_bytes, ours_bytes = (
        kept_bytes(partial(case.forward, model), x, model.parameters()) for model in (reference, fast)
    )
    eager = result.standing("eager")
    return Point(
        series.name,
        value,
        case.flops,
        result.bytes - result.parameter_bytes,
        result.parameter_bytes,
        eager.ms,
        result.standing(OURS).ms,
        eager.ratio,
        eager_bytes,
        ours_bytes,
        result.others_cpu,
    )


@dataclass(frozen=True)
class Line:
    """``fixed + per_unit * work`` through a series' points.

    Attributes:
        fixed: cost of a call without work.
        per_unit: cost per unit of work.
        worst: the largest distance of a point from the line, as a share of the point (signed: positive
            where the point costs more than the line says).
        at: index of that point.
    """

    fixed: float
    per_unit: float
    worst: float
    at: int


def fit(work: list[float], cost: list[float]) -> Line:
    """The line that comes closest to all points, each weighed by its own size.

    Raises:
        ValueError: fewer than two points, or costs that are not positive.
    """
    if len(work) != len(cost) or len(work) < 2 or min(cost) <= 0:
        raise ValueError(f"got {len(work)} and {len(cost)} values, expected at least two positive pairs")
    c = np.asarray(cost, float)
    w = np.asarray(work, float) / max(work)
    matrix = np.stack([np.ones_like(w), w], 1)
    (fixed, slope), *_ = np.linalg.lstsq(matrix / c[:, None], np.ones_like(c), rcond=None)
    off = 1 - (fixed + slope * w) / c
    at = int(np.abs(off).argmax())
    return Line(float(fixed), float(slope / max(work)), float(off[at]), at)


@dataclass(frozen=True)
class Stretch:
    """Points ``begin`` to ``end`` (not included) of a series, and their line; None for a single point."""

    begin: int
    end: int
    line: Line | None


def stretches(work: list[float], cost: list[float]) -> list[Stretch]:
    """The points in straight stretches from the left, each as long as it can be."""
    found, begin = [], 0
    while begin < len(work):
        end, line = begin + 1, None
        while end < len(work):
            longer = fit(work[begin : end + 1], cost[begin : end + 1])
            if abs(longer.worst) > STRAIGHT_MS:
                break
            end, line = end + 1, longer
        found.append(Stretch(begin, end, line))
        begin = end
    return found


def time_stretches(points: list[Point]) -> list[Stretch]:
    """Of our time against arithmetic."""
    return stretches([float(p.flops) for p in points], [p.ours_ms.p50 for p in points])


def kept_line(points: list[Point]) -> Line:
    """Of what we keep for backward against data."""
    return fit([float(p.data) for p in points], [float(p.ours_bytes) for p in points])


def by_series(points: list[Point]) -> dict[str, list[Point]]:
    """Points by series, each in order of its values."""
    ordered = sorted(points, key=lambda p: (p.series, p.value))
    return {name: list(group) for name, group in groupby(ordered, key=lambda p: p.series)}
