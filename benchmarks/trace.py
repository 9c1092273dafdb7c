"""What torch.profiler sees between image and LSTM: our ops by name, and copies of map size, if any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.cases import SYSTEMS, system

#: Operators that write their input, or parts of it, somewhere else.
COPIES = (
    "aten::copy_",
    "aten::clone",
    "aten::cat",
    "aten::stack",
    "aten::index_select",
    "aten::constant_pad_nd",
)
#: Where the way from image to LSTM ends: ours, and PyTorch's own.
RECURRENT = ("cnnlstm_fast::recurrent_layer", "aten::lstm")
_MARK = "benchmarks: traced"


@dataclass(frozen=True)
class Trace:
    """What was seen.

    Attributes:
        system: which of the three.
        what: the part that was traced.
        own_ops: the package's operators, in order of their first call.
        copies: every copy of at least half a map, as ``operator (shape)``.
        map_elements: elements of the map that the LSTM gets.
    """

    system: str
    what: str
    own_ops: list[str]
    copies: list[str]
    map_elements: int


def watch(run: Callable[[], object], *, until: tuple[str, ...] = ()) -> list[tuple[str, list]]:
    """Operators that ``run`` calls, as (name, input shapes), up to the first with a name in ``until``.

    Raises:
        RuntimeError: none of ``until`` was called.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as prof, record_function(_MARK):
        run()
    events = sorted(prof.events(), key=lambda e: e.time_range.start)
    begin = next(e.time_range.start for e in events if e.name == _MARK)
    found = [e for e in events if e.time_range.start >= begin and e.name != _MARK]
    if until:
        names = [e.name for e in found]
        ends = [names.index(name) for name in until if name in names]
        if not ends:
            raise RuntimeError(f"the trace has no {' or '.join(until)}, only {', '.join(sorted(set(names)))}")
        found = found[: min(ends)]
    return [(e.name, e.input_shapes) for e in found]


def own_ops(calls: list[tuple[str, list]]) -> list[str]:
    return list(dict.fromkeys(name for name, _ in calls if name.startswith("cnnlstm_fast::")))


def map_copies(calls: list[tuple[str, list]], map_elements: int) -> list[str]:
    """Copies of at least half a map."""
    found = []
    for name, shapes in calls:
        if name not in COPIES:
            continue
        largest = max((s for s in shapes if s and all(isinstance(n, int) for n in s)), key=prod, default=())
        if prod(largest) * 2 >= map_elements:
            found.append(f"{name} ({' x '.join(map(str, largest))})")
    return found


def trace(kind: str) -> list[Trace]:
    """Trace one of the three fast systems at the tutorial's size: inference, and features' training.

    The backward starts from a gradient that lies batch first and from one that lies time first, as
    an LSTM may hand over either.
    """
    case = system(kind)
    _, model = case.build()
    x = torch.randn(case.shape)
    with torch.inference_mode():
        size = model.features(x).shape

    def row(what: str, calls: list[tuple[str, list]]) -> Trace:
        return Trace(kind, what, own_ops(calls), map_copies(calls, prod(size)), prod(size))

    with torch.inference_mode():
        model.eval()
        rows = [row("inference, image to LSTM", watch(lambda: model(x), until=RECURRENT))]
    model.train()
    batch_first = torch.randn(size)
    time_first = torch.randn(size[1], size[0], size[2]).transpose(0, 1)
    for order, grad in (("batch first", batch_first), ("time first", time_first)):
        calls = watch(lambda grad=grad: model.features(x).backward(grad))
        rows.append(row(f"features forward and backward, gradient {order}", calls))
    return rows


def trace_all() -> list[Trace]:
    return [row for kind in SYSTEMS for row in trace(kind)]
