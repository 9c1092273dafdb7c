"""What the examples share: train a model twice from the same weights, plain and fast, and compare."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import fmean, median

import torch
from torch import Tensor, nn

#: How far two losses of the same weights on the same batch may be apart.
SAME = 1e-4


def options(description: str) -> argparse.Namespace:
    """The examples' command line: ``--tiny`` only shows that it runs, ``--seed`` repeats a run."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tiny", action="store_true", help="a few steps on little data")
    parser.add_argument("--seed", type=int, default=0)
    found = parser.parse_args()
    torch.manual_seed(found.seed)
    return found


@dataclass
class Side:
    """One of the two models and what was seen of it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)

    def step(self, batch: tuple[Tensor, ...], loss_of: Callable) -> None:
        begin = time.perf_counter()
        loss = loss_of(self.model, *batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.ms.append((time.perf_counter() - begin) * 1e3)


def train(
    reference: nn.Module,
    fast: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    loss_of: Callable[..., Tensor],
    learning_rate: float,
) -> dict[str, Side]:
    """Train both in turn, from the reference's weights, on the same batches.

    Args:
        reference, fast: the models; ``fast`` gets the weights of ``reference``.
        batches: what ``loss_of(model, *batch)`` takes.
        learning_rate: of Adam.

    Returns:
        The sides by name.

    Raises:
        AssertionError: the losses of the first step, where both have the same weights, differ.
    """
    fast.load_state_dict(reference.state_dict())
    sides = {
        name: Side(model.train(), torch.optim.Adam(model.parameters(), learning_rate))
        for name, model in (("reference", reference), ("fast", fast))
    }
    for at, batch in enumerate(batches):
        for side in list(sides.values())[:: 1 if at % 2 else -1]:
            side.step(batch, loss_of)
        if at == 0:
            first = [side.losses[0] for side in sides.values()]
            assert abs(first[0] - first[1]) <= SAME * abs(first[0]), f"first losses differ: {first}"
        if at % 25 == 0:
            print(f"step {at:4d}  loss {' '.join(f'{s.losses[-1]:.4f}' for s in sides.values())}", flush=True)
    return sides


def report(sides: dict[str, Side], **measures: Callable[[nn.Module], float]) -> None:
    """Print a table: training time and loss, and further measures of each trained model."""
    reference, fast = sides.values()
    rows = [
        ("ms per training step", median(reference.ms), median(fast.ms)),
        ("mean loss of the last 10 steps", fmean(reference.losses[-10:]), fmean(fast.losses[-10:])),
    ]
    for name, measure in measures.items():
        found = []
        for side in sides.values():
            with torch.inference_mode():
                found.append(measure(side.model.eval()))
        rows.append((name.replace("_", " "), *found))
    print(f"\n{'':36}{'reference':>12}{'fast':>12}")
    for name, a, b in rows:
        print(f"{name:36}{a:12.4g}{b:12.4g}")
    ratio = median(a / b for a, b in zip(reference.ms, fast.ms, strict=True))
    print(f"the fast one trains {ratio:.1f} times as fast (median over {len(fast.ms)} steps, in turn)")


def milliseconds(*inputs: Tensor) -> Callable[[nn.Module], float]:
    """A measure: median time of a forward on ``inputs``."""

    def measure(model: nn.Module) -> float:
        times = []
        for _ in range(7):
            begin = time.perf_counter()
            model(*inputs)
            times.append((time.perf_counter() - begin) * 1e3)
        return median(times[1:])

    return measure
