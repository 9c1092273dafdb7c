"""Timing of a few choices at the first call of its kind, with the results kept in memory and on disk.

Timed are plans of blocks on the CPU and ways to run the sites of an accelerated model, where :class:`tune`
asks for it, and tiles of Triton kernels always. A JSON file holds one call, its choices and their seconds. A
file that does not validate is timed again and replaced. Files are replaced atomically, so processes may share
their folder: CNNLSTM_FAST_CACHE, or ``cnnlstm_fast`` in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from cnnlstm_fast import __version__
from cnnlstm_fast.planning import rates

__all__ = ["tune"]

SCHEMA = 2
T = TypeVar("T")

#: Whether plans of blocks are timed; set by :class:`tune`, CNNLSTM_FAST_TUNE=1 makes True the default.
enabled: bool = os.environ.get("CNNLSTM_FAST_TUNE") == "1"


class tune:
    """Time the likely plans of a block at its first call of each size, and keep the fastest.

    In the manner of ``torch.backends.cudnn.benchmark``: as a function for the rest of the process, or as a
    context::

        cnnlstm_fast.tune(True)
        with cnnlstm_fast.tune():
            model(x)

    In a model of :func:`cnnlstm_fast.accelerate` each convolution is timed where it stands, as a block and by
    PyTorch's operators, with the memory layouts that it gives its neighbours.

    What was found is kept in files under the user's cache folder (``CNNLSTM_FAST_CACHE`` names another), by
    shape, dtype, processor, threads and version, so that another process has the same plans and the same
    bits. Nothing is timed while a model is compiled, exported or traced. CPU only: on CUDA plans follow
    from bytes and arithmetic, and kernels time their tiles by themselves.

    Args:
        mode: whether plans are timed from now on, or within the ``with`` block.

    Example:
        >>> model = cf.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()).eval()
        >>> with cf.tune(), torch.no_grad():
        ...     model(torch.randn(2, 3, 12, 12)).shape
        torch.Size([2, 16, 10, 10])
    """

    def __init__(self, mode: bool = True):
        global enabled
        self._before = enabled
        enabled = bool(mode)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_) -> None:
        global enabled
        enabled = self._before


def folder() -> Path:
    """Where choices are kept."""
    if chosen := os.environ.get("CNNLSTM_FAST_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cnnlstm_fast"


def timed(
    key: dict,
    choices: Sequence[T],
    described: Callable[[T], Any],
    seconds: Callable[[Sequence[T]], list[float]],
) -> list[float]:
    """Seconds of each of ``choices``: those kept for ``key``, or else new ones, which are kept.

    Args:
        key: what the call is, for JSON.
        choices: to be timed.
        described: a choice for JSON.
        seconds: times them; infinite for one that the device cannot hold.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = folder() / f"{name}.json"
    entry = {"schema": SCHEMA, "call": key, "choices": [described(choice) for choice in choices]}
    entry = json.loads(json.dumps(entry))  # lists where there were tuples
    kept = _read(path, entry)
    if kept is None:
        kept = [float(one) for one in seconds(choices)]
        _write(path, entry | {"seconds": kept})
    return kept


def _read(path: Path, entry: dict) -> list[float] | None:
    """The seconds in a file, if it is whole and for this ``entry``."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found != entry | {"seconds": found.get("seconds")}:
        return None
    seconds = found["seconds"]
    if not isinstance(seconds, list) or len(seconds) != len(entry["choices"]):
        return None
    return seconds if all(type(s) is float and s > 0 for s in seconds) else None


def _write(path: Path, entry: dict) -> None:
    """Replace a file atomically. Where nothing can be written, only this process remembers the seconds."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(entry, file)
        os.replace(file.name, path)


# ---- Plans of blocks on the CPU

#: A plan is timed if it is predicted to take at most this many times the best one's time; and how many are.
_LIKELY, _MOST_TIMED = 1.8, 4
#: Rounds in which they are timed in turn, after one warm-up call each.
_ROUNDS = 5
#: A fused plan must take less than this share of PyTorch's time; the noise of the timing is about as large.
TIE = 0.97

#: Seconds by call and plan that this process has found.
_known: dict[tuple, dict[str, float]] = {}
_MOST_KNOWN = 4096


def may_time() -> bool:
    """Whether anything can be timed now: not while compiling, exporting, tracing or transforming."""
    return enabled and not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def knows(call: tuple) -> bool:
    """Whether this process has found the seconds of a call."""
    return call in _known


def shortlist(predicted: dict[str, float]) -> list[str]:
    """The plans that are worth timing, PyTorch's operators first."""
    least = min(predicted.values())
    likely = [
        plan for plan in sorted(predicted, key=predicted.__getitem__) if predicted[plan] <= _LIKELY * least
    ]
    return ["reference", *[plan for plan in likely[:_MOST_TIMED] if plan != "reference"]]


def seconds_of(
    call: tuple, key: Callable[[], dict], plans: list[str], run: Callable[[str], Any]
) -> dict[str, float]:
    """Seconds of a call by each of some plans.

    Args:
        call: all that the seconds depend on, hashable.
        key: gives the same for JSON.
        plans: names of those to be timed.
        run: runs the call by the plan of a name, forward and backward.
    """
    known = _known.get(call)
    if known is None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        found = timed(_machine() | key(), plans, str, lambda plans: _in_turn(plans, run))
        known = _known[call] = dict(zip(plans, found, strict=True))
    return known


def _in_turn(plans: Sequence[str], run: Callable[[str], Any]) -> list[float]:
    """The least seconds of each: what disturbs a run can only add to them."""
    for plan in plans:
        run(plan)
    times: dict[str, list[float]] = {plan: [] for plan in plans}
    for turn in range(_ROUNDS):
        for plan in [*plans[turn % len(plans) :], *plans[: turn % len(plans)]]:
            start = time.perf_counter()
            run(plan)
            times[plan].append(time.perf_counter() - start)
    return [*map(min, times.values())]


@lru_cache(maxsize=1)
def _machine() -> dict:
    return {"rates": rates.name_here(), "version": __version__, "torch": torch.__version__}
