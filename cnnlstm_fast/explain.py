"""What happens between image and scores: shape, layout, plan, reason, time and memory per stage."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _has_any_global_hook,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from cnnlstm_fast.planning import observer
from cnnlstm_fast.stages import Report, Stage, layout_of

__all__ = ["Report", "Stage", "explain"]


def explain(model: nn.Module, *inputs: Any) -> Report:
    """Run ``model(*inputs)`` and report every stage from the input to the result.

    The model runs in the mode it is in, with gradients where they are enabled, twice (the second
    time is timed); what is compiled runs uncompiled; buffers and the random state are put back
    afterwards. A forward that raises does not make this function raise: the report holds every
    stage before the failure, the error and, where a layer got another size than it was made for,
    what to change.

    Args:
        model: any module, fast or plain.
        inputs: what its forward takes.

    Returns:
        A :class:`cnnlstm_fast.explain.Report`: a :class:`cnnlstm_fast.explain.Stage` for the input, for every
        block and module, and for every view or copy between them. Times are milliseconds, memory is bytes.

    Shapes:
        Any that ``model`` takes.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.

    Example:
        >>> model = cf.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        >>> report = cf.explain(model, torch.randn(4, 3, 28, 28))
        >>> [(stage.op, stage.shape) for stage in report.stages[1:]]
        [('Conv2d+ReLU+MaxPool2d', (4, 64, 14, 14))]
        >>> print(report)  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"got a {type(model).__name__}, expected an nn.Module and its inputs")
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    from cnnlstm_fast.freeze.module import Frozen
    from cnnlstm_fast.freeze.report import explain_frozen  # which imports this file

    if isinstance(model, Frozen):
        return explain_frozen(model, inputs)
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    with torch.random.fork_rng():
        try:
            report = _watch(model, inputs)
            return _watch(model, inputs) if report.error is None else report
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _watch(model: nn.Module, inputs: tuple) -> Report:
    recorder = Recorder(model)
    report = Report()
    for x in inputs:
        tensor = _first_tensor(x)
        if tensor is not None:
            recorder.add(
                Stage("input", "", tuple(tensor.shape), layout_of(tensor), "", bytes=_nbytes(tensor))
            )
            recorder.last = tensor
    with recorder.watching():
        begin = _now()
        try:
            out = model(*inputs)
            recorder.way_to("result", _first_tensor(out))
        except Exception as error:
            report.error = f"{type(error).__name__}: {error}"
            report.mend = recorder.fail(error)
        report.ms = (_now() - begin) * 1e3
    report.stages = list(recorder.stages.values())
    return report


@dataclass
class _Call:
    """A module or a block that is running."""

    name: str
    op: str
    module: nn.Module | None
    x: Tensor | None
    begin: float
    plan: str
    reason: str
    layout: str | None = None
    map: tuple[int, ...] = ()
    parts: tuple[nn.Module, ...] = ()
    has_parts: bool = False
    in_block: bool = False
    is_step: bool = False


class Recorder:
    """Listens to module calls (global hooks) and to :data:`cnnlstm_fast.planning.observer.current`.

    Attributes:
        alone: whether nobody else listens to all modules; only then blocks stay fused.
        stages: by name and operation.
    """

    def __init__(self, model: nn.Module):
        self.alone = not _has_any_global_hook()
        self.stages: dict[tuple[str, str], Stage] = {}
        self.last: Tensor | None = None
        self._names: dict[int, str] = {}
        for name, module in model.named_modules():
            name = name or type(module).__name__
            self._names[id(module)] = name
            weight = getattr(module, "weight", None)
            if weight is not None:
                self._names.setdefault(id(weight), name)
        self._last_map: tuple[int, ...] = ()  # C, H, W of the last result, whatever its layout
        self._reasons: dict[int, str] = {}
        self._running: list[_Call] = []
        self._thread = threading.get_ident()

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [register_module_forward_pre_hook(self._before), register_module_forward_hook(self._after)]
        before, observer.current = observer.current, self
        compiled = "torch._dynamo" in sys.modules  # importing it takes seconds
        try:
            with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
                yield
        finally:
            observer.current = before
            for handle in handles:
                handle.remove()

    def add(self, stage: Stage) -> None:
        seen = self.stages.setdefault((stage.name, stage.op), stage)
        if seen is not stage:
            seen.ms += stage.ms
            seen.bytes += stage.bytes
            seen.calls += 1

    def as_is(self, module: nn.Module, reason: str) -> None:
        """A drop-in module will call ``module`` unfused."""
        self._reasons[id(module)] = reason

    def block_begins(self, spec, x, weight, norm, activation, pool, layout, plan, reason) -> None:
        """``functional.conv_block`` will run a block; ``spec`` is None where it is not only fused kernels."""
        parts = [f"Conv{weight.dim() - 2}d"]
        for part in (norm, activation, pool):
            if part is not None:
                parts.append(_ACTIVATIONS.get(part, part) if isinstance(part, str) else type(part).__name__)
        name = self._names.get(id(weight), "conv_block")
        call = _Call(name, "+".join(parts), None, x, _now(), plan, reason, layout)
        call.parts = tuple(m for m in (norm, activation, pool) if isinstance(m, nn.Module))
        if spec is not None and weight.dim() == 4:
            call.map = (weight.shape[0], *spec.out_size(tuple(x.shape[-2:]), tuple(weight.shape[2:])))
        self._begin(call)

    def epilogue_begins(self, x: Tensor, weight: Tensor, what: str) -> None:
        """An epilogue will run ``what`` behind the convolution of ``weight``."""
        name = self._names.get(id(weight), "epilogue")
        reason = "one pass behind the convolution"
        self._begin(_Call(name, what, None, x, _now(), "epilogue", reason))

    def block_ends(self, out: Tensor) -> None:
        """The block or epilogue that began last has run."""
        self._end(None, out)

    def layer_runs(self, plan: str, reason: str) -> None:
        """The recurrent layer that began last runs by ``plan``."""
        call = self._running[-1] if self._running else None
        if call is not None and isinstance(call.module, nn.RNNBase) and threading.get_ident() == self._thread:
            call.plan, call.reason = plan, reason

    def _before(self, module: nn.Module, args: tuple) -> None:
        name = self._names.get(id(module), type(module).__name__)
        op = type(module).__name__
        x = _first_tensor(args)
        call = _Call(name, op, module, x, _now(), "PyTorch", self._reasons.get(id(module), ""))
        if hasattr(type(x), "is_placeholder"):  # its block has run already
            call.x, call.is_step = None, True
        self._begin(call)

    def _after(self, module: nn.Module, args: tuple, out: Any) -> None:
        self._end(module, out)

    def _begin(self, call: _Call) -> None:
        if threading.get_ident() != self._thread:
            return
        caller = self._running[-1] if self._running else None
        if caller is not None and caller.module is None and call.module not in caller.parts:
            self._running.pop()  # that block raised an exception, which the model caught
            caller = self._running[-1] if self._running else None
        if caller is not None:
            call.in_block = caller.in_block or caller.module is None
            caller.has_parts = not call.in_block
        self._running.append(call)

    def _end(self, module: nn.Module | None, out: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        call = self._running.pop()
        while call.module is not module:  # calls that raised an exception, which the model caught
            call = self._running.pop()
        y = _first_tensor(out)
        if call.has_parts or call.in_block or call.is_step or y is None or hasattr(type(y), "is_placeholder"):
            return
        ms = (_now() - call.begin) * 1e3
        with torch._C.DisableTorchFunctionSubclass():  # an observed tensor must not note this
            self._note(call, module, y, ms)

    def _note(self, call: _Call, module: nn.Module | None, y: Tensor, ms: float) -> None:
        self.way_to(call.name, call.x)
        memory = 0 if _shares_memory(y, call.x) else _nbytes(y)
        layout = call.layout or layout_of(y)
        reason = call.reason or self._reasons.get(id(module), "")
        if not reason and isinstance(module, (nn.Conv1d, nn.Conv2d)):
            reason = "in none of our containers: cf.accelerate makes it fast where it stands"
        if not reason and type(module) in (nn.LSTM, nn.GRU):
            reason = f"cf.{call.op} takes its place, with the same keys; cf.accelerate puts it there"
        self.add(Stage(call.name, call.op, tuple(y.shape), layout, call.plan, reason, ms, memory))
        self.last = y.detach()  # the object itself may be given another memory
        self._last_map = call.map or tuple(y.shape[1:])

    def way_to(self, name: str, x: Tensor | None) -> None:
        """Add a row for what the model did to the last result to get ``x``, if it did anything."""
        last = self.last
        if x is None or last is None or x is last:
            return
        if _shares_memory(x, last):
            if x.shape == last.shape and x.stride() == last.stride():
                return
            plan, memory = "view", 0
        else:
            plan, memory = "copy", _nbytes(x)
        self.add(Stage(f"-> {name}", "", tuple(x.shape), layout_of(x), plan, bytes=memory))

    def fail(self, error: Exception) -> str | None:
        """Add the row of the stage that failed; returns how to mend it, where that is known."""
        if not self._running:
            return None
        call = self._running[-1]
        mend = _hint(call, error, self._last_map)
        self.way_to(call.name, call.x)
        shape = () if call.x is None else tuple(call.x.shape)
        layout = "" if call.x is None else layout_of(call.x)
        self.add(Stage(call.name, call.op, shape, layout, "failed", "see below"))
        return mend


_ACTIVATIONS = {"relu": "ReLU"}


def _hint(call: _Call, error: Exception, last_map: tuple[int, ...]) -> str | None:
    module, x = call.module, call.x
    if x is not None and isinstance(module, (nn.RNNBase, nn.Linear)):
        rnn = isinstance(module, nn.RNNBase)
        if isinstance(module, nn.RNNBase):
            expected, argument = module.input_size, "input_size"
        else:
            expected, argument = module.in_features, "in_features"
        given = x.shape[-1] if x.dim() else None
        kind = type(module).__name__
        if given is not None and given != expected:
            is_map = len(last_map) == 3 and math.prod(last_map) == given
            origin = f" = {' x '.join(map(str, last_map))}" if is_map else ""
            text = (
                f"{call.name!r} expects {expected} features but gets {given}{origin}: build it as "
                f"nn.{kind}({argument}={given}, ...)"
            )
            if expected in x.shape[:-1]:
                at = list(x.shape[:-1]).index(expected)
                text += f", or, if dimension {at} holds the features, pass x.transpose({at}, -1)"
            return text
        if rnn and x.dim() not in (2, 3):
            return (
                f"{call.name!r} takes (batch, steps, features) but gets {tuple(x.shape)}: decide what a "
                "step is and flatten the rest (the table in cnnlstm_fast.reference shows how)"
            )
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and x is not None:
        rank = 3 if isinstance(module, nn.Conv1d) else 4
        if x.dim() == rank + 1:
            return f"{call.name!r} gets a time axis, {tuple(x.shape)}: wrap the CNN in cf.TimeDistributed"
        if x.dim() == rank and x.shape[1] != module.in_channels:
            return (
                f"{call.name!r} expects {module.in_channels} channels but gets {x.shape[1]}: build it with "
                f"in_channels={x.shape[1]}, or move the channels to dimension 1"
            )
    if isinstance(error, ValueError):
        return str(error)
    return None


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        return next((t for t in map(_first_tensor, value) if t is not None), None)
    if isinstance(value, dict):
        return _first_tensor(tuple(value.values()))
    return None


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _shares_memory(x: Tensor, y: Tensor | None) -> bool:
    if y is None or x.layout is not torch.strided or y.layout is not torch.strided or not x.numel():
        return False
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
