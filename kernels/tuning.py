"""Which of a few tiles a kernel runs with: timed at the first call of its kind, kept in memory and on disk.

No choice changes a bit of a result: none touches the length or the order of a sum. So any of them is right,
and a lost or damaged file (:mod:`cnnlstm_fast.planning.tuner`) costs time alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cnnlstm_fast.planning import tuner


class Choice(NamedTuple):
    """How many programs of a kernel with which tiles, its constants, and which options of the launch."""

    programs: int
    tiles: dict[str, int]
    options: dict[str, int]


#: Choices by call, exactly as it was.
_known: dict[tuple, Choice] = {}
_MOST_KNOWN = 4096


def choose(kernel: Any, args: dict, choices: Sequence[Choice], run: Callable[[Choice], None]) -> Choice:
    """The fastest of ``choices`` to launch ``kernel`` with ``args`` on their CUDA device.

    The first of them where there is nothing to choose, and while a CUDA graph is captured, where nothing can
    be timed. ``run`` launches a choice; it may be called any number of times.
    """
    if len(choices) == 1 or torch.cuda.is_current_stream_capturing():
        return choices[0]
    device = torch.cuda.current_device()
    call = kernel.__name__, device, *(v.dtype if isinstance(v, Tensor) else v for v in args.values())
    known = _known.get(call)
    if known is None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        key = _machine(device) | _kind(kernel, args, choices)
        known = _known[call] = choice_for(key, choices, lambda choice: _seconds(run, choice))
    return known


def choice_for(key: dict, choices: Sequence[Choice], seconds: Callable[[Choice], float]) -> Choice:
    """The choice of fewest ``seconds`` for ``key``; they are kept."""
    times = tuner.timed(
        key,
        choices,
        lambda choice: {"tiles": choice.tiles, "options": choice.options},
        lambda choices: [seconds(choice) for choice in choices],
    )
    return choices[times.index(min(times))]


@lru_cache(maxsize=64)
def _machine(device: int) -> dict:
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "triton": triton.__version__,
    }


def _kind(kernel: Any, args: dict, choices: Sequence[Choice]) -> dict:
    """What the time of a call depends on: constants as they are, sizes and strides to a factor of two."""
    values = {}
    for param in kernel.params:
        if any(param.name in choice.tiles for choice in choices):
            continue
        value = args[param.name]
        if isinstance(value, Tensor):
            values[param.name] = str(value.dtype)
        elif param.is_constexpr or value <= 1:
            values[param.name] = value
        else:
            values[param.name] = 2 ** (value - 1).bit_length()
    return {"kernel": kernel.__name__, "arguments": values}


def _seconds(run: Callable[[Choice], None], choice: Choice) -> float:
    """How long a choice takes; for ever where the device cannot hold it."""
    try:
        return triton.testing.do_bench(lambda: run(choice), warmup=2, rep=10, return_mode="min")
    except triton.runtime.errors.OutOfResources:
        return math.inf
