"""A model before and after: where its time goes, stage by stage and operator by operator.

Both models run in turn under ``torch.profiler``. Every module call and every fused block is a named
range (``record_function``), so that the Chrome trace reads ``cnn.0: Conv2d+ReLU+MaxPool2d [direct]``
around the operators that ran for it; ours are called ``cnnlstm_fast::...``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from cnnlstm_fast.explain import Recorder, Stage
from cnnlstm_fast.measure import Comparison, compare_ms

__all__ = ["Operator", "Profile", "SideProfile", "profile_models"]

SIDES = ("before", "after")
#: How the names of the package's operators begin.
OWN = "cnnlstm_fast::"


@dataclass(frozen=True)
class Operator:
    """An operator's or kernel's own time, without that of the operators it calls.

    Attributes:
        name: as the profiler shows it.
        calls: per run of the model.
        ms: per run of the model, on the GPU where one ran, else on the CPU.
        own: whether it is one of this package's.
    """

    name: str
    calls: float
    ms: float
    own: bool


@dataclass(frozen=True)
class SideProfile:
    """One model's profile: stages in order of their first call, operators by time, longest first."""

    stages: list[Stage]
    operators: list[Operator]


@dataclass(frozen=True)
class Profile:
    """Two models on the same inputs.

    Attributes:
        mode: ``"inference"`` or ``"training"`` (forward and backward of the sum of the result).
        ms: milliseconds per run without the profiler, in turn.
        before, after: where the time goes; measured under the profiler, whose own cost is in it.
        trace: the Chrome trace, or None.
    """

    mode: str
    ms: Comparison
    before: SideProfile
    after: SideProfile
    trace: str | None = None


class _Ranges(Recorder):
    """Opens a range for every call that explain's recorder hears of."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._open: list[tuple[Any, record_function]] = []

    def _begin(self, call) -> None:
        super()._begin(call)
        self._close_done()
        if self._running and self._running[-1] is call:
            label = f"{call.name or 'model'}: {call.op}"
            opened = record_function(label if call.module is not None else f"{label} [{call.plan}]")
            opened.__enter__()
            self._open.append((call, opened))

    def _end(self, module: nn.Module | None, out: Any) -> None:
        super()._end(module, out)
        self._close_done()

    def _close_done(self) -> None:
        running = {id(call) for call in self._running}
        while self._open and id(self._open[-1][0]) not in running:
            self._open.pop()[1].__exit__(None, None, None)


def profile_models(
    before: nn.Module,
    after: nn.Module,
    inputs: tuple,
    *,
    training: bool = False,
    rounds: int = 10,
    trace: Path | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> Profile:
    """Time two models in turn, then profile each.

    Args:
        before: a model; it runs in the mode that it is in.
        after: another, often ``cf.accelerate(before)``.
        inputs: what both forwards take.
        training: forward and backward instead of a forward without gradients. Gradients of the
            parameters are cleared afterwards.
        rounds: runs of each.
        trace: where to write the Chrome trace of both (open it in a browser's tracing page), or None.
        tell: is told what is going on, once per round and side.

    Raises:
        ValueError: ``rounds`` is below 1, or ``training`` without a result that has a gradient.
    """
    if rounds < 1:
        raise ValueError(f"got rounds={rounds}, expected at least 1")
    models = dict(zip(SIDES, (before, after), strict=True))
    runs = {side: _runner(model, training) for side, model in models.items()}
    for _ in range(2):  # an accelerated model looks at its first call and fuses from the second on
        for side, run in runs.items():
            tell(f"warming up, {side}")
            run(*inputs)

    def batches() -> Iterator[tuple]:
        for _ in range(rounds + 1):
            tell("timing")
            yield inputs

    ms = compare_ms(runs["before"], runs["after"], batches())
    activities = [ProfilerActivity.CPU]
    if _on_cuda(inputs):
        activities.append(ProfilerActivity.CUDA)
    recorders = {side: _Ranges(model) for side, model in models.items()}
    with profile(activities=activities) as profiler:
        for side, run in runs.items():
            with recorders[side].watching(), record_function(side):
                for _ in range(rounds):
                    tell(f"profiling, {side}")
                    recorders[side].last = None
                    run(*inputs)
                if _on_cuda(inputs):
                    torch.cuda.synchronize()
    for model in models.values():
        model.zero_grad(set_to_none=True)
    if trace is not None:
        tell("writing the trace")
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    sides = {
        side: SideProfile(_stages(recorders[side], rounds), _operators(profiler, side, rounds))
        for side in SIDES
    }
    return Profile(
        "training" if training else "inference", ms, **sides, trace=None if trace is None else str(trace)
    )


def _runner(model: nn.Module, training: bool) -> Callable[..., object]:
    """What is profiled: a forward without gradients, or forward and backward."""
    if not training:
        return torch.no_grad()(model.__call__)

    def step(*inputs: Any) -> None:
        model.zero_grad(set_to_none=True)
        results = [t for t in _tensors(model(*inputs)) if t.requires_grad]
        if not results:
            raise ValueError("nothing in the model's result has a gradient: profile it in inference")
        with record_function("backward"):
            torch.autograd.backward([t.sum() for t in results])

    return step


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _on_cuda(inputs: tuple) -> bool:
    return any(t.is_cuda for t in _tensors(inputs))


def _stages(recorder: Recorder, rounds: int) -> list[Stage]:
    """What the recorder saw in ``rounds`` runs, per run."""
    return [
        replace(s, ms=s.ms / rounds, bytes=s.bytes // rounds, calls=max(1, s.calls // rounds))
        for s in recorder.stages.values()
        if s.name != "input"
    ]


def _operators(profiler: profile, side: str, rounds: int) -> list[Operator]:
    """Own time by operator within the range named ``side``: on the GPU where kernels ran, else on the CPU."""
    events = profiler.events()
    window = next(e.time_range for e in events if e.name == side and e.device_type == DeviceType.CPU)
    inside = [
        e
        for e in events
        if window.start <= e.time_range.start and e.time_range.end <= window.end and not e.is_user_annotation
    ]
    kernels = [e for e in inside if e.device_type == DeviceType.CUDA]
    calls: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)
    for e in kernels or inside:
        calls[e.name] += 1
        times[e.name] += e.self_device_time_total if kernels else e.self_cpu_time_total
    found = [
        Operator(name, calls[name] / rounds, us / rounds / 1e3, name.startswith(OWN))
        for name, us in times.items()
    ]
    return sorted(found, key=lambda o: -o.ms)
