"""The plan of a chain that was observed: its steps, and how the block runs for each shape of input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cnnlstm_fast.functional.conv_block import CallPlan
from cnnlstm_fast.fusion import run
from cnnlstm_fast.fusion.calls import Conv, Found, Norm
from cnnlstm_fast.fusion.layout import eager_layout
from cnnlstm_fast.fusion.match import SLOTS
from cnnlstm_fast.limits import limit
from cnnlstm_fast.planning.choose import gains_enough

#: How many shapes of inputs a convolution remembers.
MEMORY = 256

#: About how many microseconds a speculation costs. A block that saves less runs as PyTorch's operators.
OVERHEAD_US = limit("BLOCK_US", 40, 0)


class Step:
    """One call behind a convolution: the function, its arguments, and which part of a block it is."""

    __slots__ = ("args", "found", "function", "kind", "kwargs")

    def __init__(self, function, args, kwargs, found: Found):
        self.function, self.found, self.kind = function, found, found.part.kind
        self.args, self.kwargs = args[1:], kwargs

    @property
    def same_object(self) -> bool:
        """Whether the call returns the tensor object that it was given."""
        return self.found.inplace or self.kind == "identity"

    def run(self, x: Tensor) -> Tensor:
        return self.function(x, *self.args, **self.kwargs)

    def __str__(self) -> str:
        if self.kind == "norm":
            return "BatchNorm"
        return type(self.found.value).__name__ if self.found.value is not None else "Identity"


class ShapePlan(NamedTuple):
    """How the block runs for inputs of one shape.

    Attributes:
        plan, why: the kernel plan that runs it, and the reason.
        conv: the weight's shape and strides, and the convolution's arguments that are not tensors.
        shapes: shape and strides of the values between the steps; empty where PyTorch's operators run them.
        layout: of the block's result.
        hands_on: the result lies channels-last where PyTorch's is contiguous.
    """

    plan: str
    why: str
    conv: tuple
    shapes: list[tuple]
    layout: str
    hands_on: bool


class FusionPlan:
    """A chain that was observed, and that later calls run as one block.

    A value of the chain has the number of steps before it: value 0 is the convolution's.

    Attributes:
        steps: behind the convolution.
        dtypes: of all values but the last one.
        hands_on: only another convolution reads the last value.
        norm: the norm's arguments in the last call, or None without a norm.
        own_values: numbers of the values that are tensors of their own, without the last one; a step in place
            returns the tensor of the value before it.
        by_shape: by an input's shape and strides, and whether it was handed on.
        lingers: the program keeps values between the steps in variables that it does not read.
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
        """Functions of the steps, and their arguments. A norm's arguments may differ from call to call."""
        return [
            (step.function, *(() if step.kind == "norm" else (step.args, step.kwargs))) for step in self.steps
        ]

    def for_shape(self, function, x: Tensor, conv: Conv, handed: bool) -> ShapePlan:
        """How the block runs for ``x``; PyTorch's own ``x`` is contiguous where ours was ``handed`` on."""
        key = x.shape, x.stride(), handed
        found = self.by_shape.get(key)
        if found is None or found.conv != (conv.weight.shape, conv.weight.stride(), conv[2:]):
            if len(self.by_shape) > MEMORY:
                self.by_shape.clear()
            found = self.by_shape[key] = self._plan_shape(function, x, conv, handed)
        return found

    def _plan_shape(self, function, x: Tensor, conv: Conv, handed: bool) -> ShapePlan:
        module = None if self.norm is None else self.norm.module(conv.weight.shape[0], x.dim())
        given = x.new_empty(()).expand(x.shape) if handed else x  # not channels-last
        pooled = self.pool is not None
        layout = eager_layout(given, conv.weight, pooled, module, self.activation)
        hands_on = self.hands_on and layout == "channels_first" and x.dim() == 4 and x.is_cpu
        shapes, plan = [], "reference"
        parts = conv, module, self.activation, self.pool
        try:
            call = run.plan_block(x, *parts, layout)
            if hands_on:
                handing = run.plan_block(x, *parts, "channels_last")
                hands_on = handing.plan != "reference" and is_faster(handing, call)
                call, layout = (handing, "channels_last") if hands_on else (call, layout)
            shapes = self._value_shapes(function, x, conv, handed)
            why = self._why_unfused(call, conv.weight, handed)
            if why is None and handed and call.plan == "reference" and _is_faulty(x, conv, shapes[0][0]):
                why = "the library's convolutions of such channels-last maps have faults"
            if why is None and handed:
                other = run.plan_block(x.contiguous(), *parts, layout)
                if not is_faster(call, other):
                    why = f"faster on its input as PyTorch lays it out: {other.reason}"
            if why is None:
                plan, why = call.plan, call.reason
            else:
                shapes = []
        except (RuntimeError, ValueError) as error:  # PyTorch's operators will raise their own error
            why = str(error)
        key = conv.weight.shape, conv.weight.stride(), conv[2:]
        return ShapePlan(plan, why, key, shapes, layout, hands_on)

    def _why_unfused(self, call: CallPlan, weight: Tensor, handed: bool) -> str | None:
        """Why PyTorch's operators run the block, or None where it runs as one call."""
        if call.plan == "reference":
            return None if handed else call.reason  # for PyTorch too, channels-last is the faster one
        if weight.is_cpu and call.choice.saves_us < OVERHEAD_US:
            return f"calling it as a block costs more than it saves: {call.reason}"
        return None

    def _value_shapes(self, function, x: Tensor, conv: Conv, handed: bool) -> list[tuple]:
        """Shape and strides that PyTorch's operators give all values but the last one."""
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


def is_faster(ours: CallPlan, other: CallPlan) -> bool:
    """Whether ``ours`` is predicted to be faster; by a margin, where one is PyTorch's operators."""
    if "reference" in (ours.plan, other.plan):
        return gains_enough(ours.choice.us, other.choice.us)
    return ours.choice.us <= other.choice.us


def _is_faulty(x: Tensor, conv: Conv, map_shape: torch.Size) -> bool:
    """Whether PyTorch's convolution must not get ``x`` channels-last (csrc/library_limits.h says why)."""
    if x.dtype != torch.float32 or not x.is_cpu:
        return x.dtype != torch.float32
    # Stride, padding, dilation and groups as in the schema of conv_block; nothing depends on the padding.
    args = [*_pair(conv.stride), 0, 0, *_pair(conv.dilation), conv.groups]
    return any(torch.ops.cnnlstm_fast.library_limits(x, conv.weight, args, map_shape[-1]))


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    """A convolution's parameter for both axes."""
    return [*value, *value][:2] if isinstance(value, Sequence) else [value, value]
