"""What is known of the steps behind one convolution, and of its inputs' shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cnnlstm_fast.functional.conv_block import Decision
from cnnlstm_fast.fusion import run
from cnnlstm_fast.fusion.calls import Conv, Found, Norm
from cnnlstm_fast.fusion.layout import eager_layout
from cnnlstm_fast.fusion.match import SLOTS
from cnnlstm_fast.limits import limit
from cnnlstm_fast.planning.choose import gains_enough

#: How many shapes of inputs a convolution remembers.
MEMORY = 256

#: Microseconds that speculating costs, about. Blocks that save less run as they are.
OVERHEAD_US = limit("BLOCK_US", 40, 0)


class Step:
    """One call behind a convolution: what was called, with which arguments, as which part."""

    __slots__ = ("args", "found", "function", "kind", "kwargs")

    def __init__(self, function, args, kwargs, found: Found):
        self.function, self.found, self.kind = function, found, found.part.kind
        self.args, self.kwargs = args[1:], kwargs

    @property
    def same_object(self) -> bool:
        """Whether the result is the very tensor that the step was given."""
        return self.found.inplace or self.kind == "identity"

    def run(self, x: Tensor) -> Tensor:
        return self.function(x, *self.args, **self.kwargs)

    def __str__(self) -> str:
        if self.kind == "norm":
            return "BatchNorm"
        return type(self.found.value).__name__ if self.found.value is not None else "Identity"


class ShapePlan(NamedTuple):
    """What a plan knows about inputs of one shape.

    Attributes:
        plan, why: the kernel plan that runs it, and the reason.
        conv: the weight's shape and strides, and the convolution's arguments that are no tensors.
        shapes: shape and strides of its values; none where it runs as it is.
        layout: of its result.
        hands_on: that is another one than PyTorch's.
        decision: how it runs; None where only the call itself shows that.
    """

    plan: str
    why: str
    conv: tuple
    shapes: list[tuple]
    layout: str
    hands_on: bool
    decision: Decision | None


class FusionPlan:
    """A chain that was observed, and that later calls run as one block.

    Attributes:
        steps: behind the convolution.
        dtypes: of the values before the last one.
        hands_on: the last value goes to another convolution.
        norm: the norm's arguments in the last call, or None; whose module's :meth:`Norm.module` they are.
        own_values: the values before the last one that are tensors of their own, as numbers of steps before
            them.
        by_shape: what is known of an input, by its shape and strides, and whether it was handed on.
        lingers: the program keeps values between in variables that it does not read.
    """

    def __init__(self, steps: list[Step], dtypes: list[torch.dtype], hands_on: bool):
        self.steps, self.dtypes, self.hands_on = steps, dtypes, hands_on
        parts = {SLOTS.get(step.kind): step.found.value for step in steps}
        self.activation, self.pool = parts.get("activation"), parts.get("pool")
        self.norm: Norm | None = parts.get("norm")
        self.own_values = [0, *(i + 1 for i, step in enumerate(steps[:-1]) if not step.same_object)]
        self.by_shape: dict[tuple, ShapePlan] = {}
        self.lingers = False

    def calls(self) -> list[tuple]:
        """What the steps call, and with which arguments beside tensors that may change."""
        return [
            (step.function, *(() if step.kind == "norm" else (step.args, step.kwargs))) for step in self.steps
        ]

    def for_shape(self, function, x: Tensor, conv: Conv, handed: bool) -> ShapePlan:
        """What is known of an input like ``x``; if it was handed on, PyTorch's would be contiguous."""
        key = x.shape, x.stride(), handed
        found = self.by_shape.get(key)
        if found is None or found.conv != (conv.weight.shape, conv.weight.stride(), conv[2:]):
            if len(self.by_shape) > MEMORY:
                self.by_shape.clear()
            found = self.by_shape[key] = self._plan_shape(function, x, conv, handed)
        return found

    def _plan_shape(self, function, x: Tensor, conv: Conv, handed: bool) -> ShapePlan:
        module = None if self.norm is None else self.norm.module(conv.weight.shape[0], x.dim())
        given = x.new_empty(()).expand(x.shape) if handed else x  # not like channels-last
        pooled = self.pool is not None
        layout = eager_layout(given, conv.weight, pooled, module, self.activation)
        hands_on = self.hands_on and layout == "channels_first" and x.dim() == 4 and x.is_cpu
        decision, shapes, plan = None, [], "reference"
        parts = conv, module, self.activation, self.pool
        try:
            decision = run.decide(x, *parts, layout)
            if hands_on:
                handing = run.decide(x, *parts, "channels_last")
                hands_on = handing.plan != "reference" and is_faster(handing, decision)
                decision, layout = (handing, "channels_last") if hands_on else (decision, layout)
            shapes = self._value_shapes(function, x, conv, handed)
            why = self._why_unfused(decision, conv.weight, handed)
            if why is None and handed and decision.plan == "reference" and _is_faulty(x, conv, shapes[0][0]):
                why = "the library's convolutions of such channels-last maps have faults"
            if why is None and handed:
                other = run.decide(x.contiguous(), *parts, layout)
                if not is_faster(decision, other):
                    why = f"faster on its input as PyTorch lays it out: {other.reason}"
            if why is None:
                plan, why = decision.plan, decision.reason
            else:
                shapes = []
        except (RuntimeError, ValueError) as error:  # PyTorch says it in its own words, if it comes to that
            why = str(error)
        if torch.is_autocast_enabled(x.device.type):
            decision = None
        key = conv.weight.shape, conv.weight.stride(), conv[2:]
        return ShapePlan(plan, why, key, shapes, layout, hands_on, decision)

    def _why_unfused(self, decision: Decision, weight: Tensor, handed: bool) -> str | None:
        """Why a block runs as it is; None where it does not."""
        if decision.plan == "reference":
            return None if handed else decision.reason  # PyTorch's operators too are faster channels-last
        if weight.is_cpu and decision.choice.saves_us < OVERHEAD_US:
            return f"calling it as a block costs more than it saves: {decision.reason}"
        return None

    def _value_shapes(self, function, x: Tensor, conv: Conv, handed: bool) -> list[tuple]:
        """Shape and strides of all values but the last one."""
        with torch.no_grad():
            strides = torch.empty(x.shape, device="meta").stride() if handed else x.stride()
            y = function(
                torch.empty_strided(x.shape, strides, dtype=x.dtype, device="meta"),
                torch.empty_like(conv.weight, dtype=x.dtype, device="meta"),
                None, *conv[2:],
            )  # fmt: skip
            found = [(y.shape, y.stride())]
            for step in self.steps[:-1]:
                if step.kind in ("pool", "max_pool"):
                    y = step.run(y)
                found.append((y.shape, y.stride()))
        return found


def is_faster(ours: Decision, other: Decision) -> bool:
    """Whether to take ``ours`` and not ``other``: by a margin, where one is PyTorch's operators."""
    if "reference" in (ours.plan, other.plan):
        return gains_enough(ours.choice.us, other.choice.us)
    return ours.choice.us <= other.choice.us


def _is_faulty(x: Tensor, conv: Conv, map_shape: torch.Size) -> bool:
    """Whether PyTorch's own convolution is not to be given ``x`` channels-last: csrc/library_limits.h."""
    strided_pointwise = conv.weight[0, 0].numel() == 1 and conv.stride not in (1, (1, 1))
    return x.dtype != torch.float32 or min(x.shape[-1], map_shape[-1]) == 1 or strided_pointwise
