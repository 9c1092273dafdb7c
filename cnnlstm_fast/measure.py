"""Two models side by side: time in turn in one process, and memory that waits for backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """Medians of both sides, and how many times less the fast one needs (median of paired ratios)."""

    reference: float
    fast: float
    ratio: float

    @classmethod
    def of(cls, reference: Sequence[float], fast: Sequence[float]) -> Comparison:
        ratios = [r / f for r, f in zip(reference, fast, strict=True)]
        return cls(*map(statistics.median, (reference, fast, ratios)))


def compare_ms(
    reference: Callable[..., object],
    fast: Callable[..., object],
    batches: Iterable[tuple[Tensor, ...]],
) -> Comparison:
    """Milliseconds per call on the same batches, in turn; the first batch only warms both up."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_, batch in enumerate(batches):
        sides = [(reference, times[0]), (fast, times[1])]
        for run, into in sides if round_ % 2 else reversed(sides):
            into.append(_ms(run, batch))
    return Comparison.of(times[0][1:], times[1][1:])


def _ms(run: Callable[..., object], batch: tuple[Tensor, ...]) -> float:
    _synchronize(batch[0].device)
    begin = time.perf_counter()
    result = run(*batch)
    _synchronize(batch[0].device)
    elapsed = time.perf_counter() - begin
    del result  # outside the time: freeing large memory is not part of the call
    return elapsed * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kept_bytes(run: Callable[[Tensor], Tensor], x: Tensor, parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between ``run(x)`` and its backward, the input included.

    Every storage counts once, parameters not at all.
    """
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run(x)
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


def compare_kept(
    reference: Callable[[Tensor], Tensor],
    fast: Callable[[Tensor], Tensor],
    x: Tensor,
    parameters: Sequence[Tensor],
) -> Comparison:
    """Bytes kept for backward by both sides."""
    return Comparison.of(*([kept_bytes(run, x, parameters)] for run in (reference, fast)))
