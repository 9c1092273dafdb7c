"""A long training with changing shapes: memory stays flat, steps do not slow down, losses stay finite.

Every step draws a batch size, a number of steps and an image size anew, and trains three models in turn: a
clip model, a chain of blocks with a bidirectional LSTM over columns, and a GRU with resets and lengths. At
regular points the process's resident memory is read and one fixed step timed, in CPU time of the process,
which does not count what other processes of the machine take.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import cnnlstm_fast as cf
from benchmarks.memory import resident

#: How much resident memory may rise between the second quarter and the last, and a fixed step slow down.
MOST_GROWTH = 32 * 2**20
MOST_SLOWDOWN = 1.25


@dataclass
class Soak:
    """What a soak saw.

    Attributes:
        steps: training steps done.
        seconds: they took.
        shapes: different input shapes among them.
        bytes: resident memory at the regular points.
        step_ms: CPU milliseconds of the fixed step at the same points.
        losses: of the first and the last of those steps.
        failures: what was not as it should be, in words; empty if nothing.
    """

    steps: int = 0
    seconds: float = 0.0
    shapes: int = 0
    bytes: list[int] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Columns(nn.Module):
    """A small CRNN: every image column a step."""

    def __init__(self):
        super().__init__()
        self.cnn = cf.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d((4, None)),
        )  # fmt: skip
        self.rnn = cf.LSTM(96, 24, bidirectional=True)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.cnn(x).flatten(1, 2).permute(2, 0, 1))[0])


def _draw(rng: random.Random, largest: bool = False) -> dict[str, tuple[int, ...]]:
    def pick(low: int, high: int) -> int:
        return high if largest else rng.randint(low, high)

    return {
        "clips": (pick(1, 6), pick(1, 8), 3, 12, 14),
        "columns": (pick(1, 8), 1, pick(6, 20), pick(8, 40)),
        "agents": (pick(1, 24), pick(1, 9), 7),
    }


def _models() -> dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]]:
    def agents(model: nn.Module, x: Tensor) -> Tensor:
        steps, batch = x.shape[:2]
        return model(x, reset=torch.rand(steps, batch) < 0.1, lengths=torch.randint(0, steps + 1, (batch,)))[
            0
        ]

    def plain(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)

    return {
        "clips": (cf.CNN_LSTM_TimeDistributed(3, 16, 1, 5, image_size=(12, 14)), plain),
        "columns": (Columns(), plain),
        "agents": (cf.GRU(7, 20, num_layers=2), agents),
    }


def soak(steps: int, seed: int, tell: Callable[[int], None] = lambda step: None, points: int = 40) -> Soak:
    """Train for ``steps`` steps; ``tell`` is called with the number of each.

    Raises:
        ValueError: fewer steps than twice the points at which memory and time are read.
    """
    if steps < 2 * points:
        raise ValueError(f"got {steps} steps, expected at least {2 * points}")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    models = _models()
    optimizer = torch.optim.Adam([p for model, _ in models.values() for p in model.parameters()], 1e-3)
    seen, result, start = set(), Soak(), time.monotonic()

    def train(shapes: dict[str, tuple[int, ...]]) -> float:
        optimizer.zero_grad()
        loss = torch.zeros(())
        for name, (model, run) in models.items():
            loss = loss + run(model, torch.randn(shapes[name])).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    fixed = _draw(rng, largest=True)
    train(fixed)
    for step in range(steps):
        shapes = _draw(rng)
        loss = train(shapes)
        seen.update(shapes.values())
        if not math.isfinite(loss):
            result.failures.append(f"the loss is {loss} at step {step}")
            break
        if step % (steps // points) == 0:
            result.losses.append(loss)
            result.step_ms.append(min(_cpu_ms(lambda: train(fixed)) for _ in range(5)))
            result.bytes.append(resident())
        tell(step)
        result.steps = step + 1
    result.seconds, result.shapes = time.monotonic() - start, len(seen)
    result.failures += _judge(result)
    return result


def _cpu_ms(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1e3


def _judge(result: Soak) -> list[str]:
    quarter = len(result.bytes) // 4
    if not quarter:
        return ["the soak ended before anything could be seen"]
    failures = []
    growth = max(result.bytes[-quarter:]) - max(result.bytes[quarter : 2 * quarter])
    if growth > MOST_GROWTH:
        failures.append(f"memory rose by {growth / 2**20:.0f} MiB between the second quarter and the last")
    early, late = (
        sorted(part)[len(part) // 2] for part in (result.step_ms[:quarter], result.step_ms[-quarter:])
    )
    if late > MOST_SLOWDOWN * early:
        failures.append(f"a step slowed down from {early:.1f} to {late:.1f} ms")
    return failures
