"""The plan of a chain that was observed: its steps, and how the block runs for each shape of input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnnlstm_fast.functional.conv_block import CallPlan
from cnnlstm_fast.functional.epilogue import Program, Sum, program_of, why_not_epilogue
from cnnlstm_fast.fusion import run
from cnnlstm_fast.fusion.calls import Conv, Found, Norm
from cnnlstm_fast.fusion.layout import eager_layout
from cnnlstm_fast.fusion.match import SLOTS, is_program
from cnnlstm_fast.limits import limit
from cnnlstm_fast.planning import costs
from cnnlstm_fast.planning.choose import gains_enough
from cnnlstm_fast.planning.support import folds, records_gradients

#: How many shapes of inputs a convolution remembers.
MEMORY = 256

#: About how many microseconds a speculation costs. A block that saves less runs as PyTorch's operators.
OVERHEAD_US = limit("BLOCK_US", 40, 0)


#: How many times as much a program costs.
_IN_INFERENCE, _IN_TRAINING = 2, 4

#: How many times its predicted time a convolution may take on a map that was handed on. Where it refuses the
#: map, all other readers lose theirs, and predictions err by about as much.
_MOST_LOSS = 1.25


class Step:
    """One call behind a convolution: the function, its arguments, and which part of a block it is."""

    __slots__ = ("args", "found", "function", "kind", "kwargs")

    def __init__(self, function, args, kwargs, found: Found):
        self.function, self.found, self.kind = function, found, found.part.kind
        self.args, self.kwargs = () if self.kind == "sum" else args[1:], kwargs

    @property
    def same_object(self) -> bool:
        """Whether the call returns the tensor object that it was given."""
        return self.found.inplace or self.kind == "identity"

    def run(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Call the function on ``x``; ``other`` is the other operand of a sum."""
        if self.kind == "sum":
            both = (x, other) if self.found.value.first else (other, x)
            return self.function(*both, **self.kwargs)
        return self.function(x, *self.args, **self.kwargs)

    @property
    def constants(self) -> tuple:
        """What two calls of the same step have in common. A norm's arguments may differ from call to call."""
        if self.kind == "norm":
            return (self.function,)
        return self.function, self.args, self.kwargs, self.kind == "sum" and self.found.value

    def __str__(self) -> str:
        if self.kind == "norm":
            return "BatchNorm"
        if self.kind == "sum":
            return "sum"
        return type(self.found.value).__name__ if self.found.value is not None else "Identity"


class ShapePlan(NamedTuple):
    """How the block runs for inputs of one shape.

    Attributes:
        plan, why: the kernel plan that runs it, and the reason.
        conv: the weight's shape and strides, and the convolution's arguments that are not tensors.
        shapes: shape and strides of the values between the steps; empty where PyTorch's operators run them.
        layout: of the block's result.
        hands_on: the result lies channels-last where PyTorch's is contiguous.
        head: how many of the steps run in one call with the convolution; all of them in a block.
        pays: it is faster than PyTorch's operators; otherwise these run it, on a map that was handed on.
        program: the other steps, which an epilogue runs; None where there are none.
    """

    plan: str
    why: str
    conv: tuple
    shapes: list[tuple]
    layout: str
    hands_on: bool
    head: int
    pays: bool
    program: Program | None = None


class FusionPlan:
    """A chain that was observed, and that later calls run as one block.

    A value of the chain has the number of steps before it: value 0 is the convolution's.

    Attributes:
        steps: behind the convolution.
        dtypes: of all values but the last one.
        hands_on: only another convolution reads the last value.
        norm: the norm's arguments in the last call, or None without a norm.
        own_values: numbers of the values that are tensors of their own, without the last one; a step in place
            returns the tensor of the value before it. A sum in place has another place in the graph.
        by_shape: by an input's shape and strides, and whether it was handed on.
        lingers: the program keeps values between the steps in variables that it does not read.
        is_program: the convolution and an epilogue run the steps, and not one block.
        sum_at: which step is a sum, or None.
        others: plans for inputs where this one does not pay: of a program its steps up to the sum, and its
            first steps as a block; of a block the steps before its pool as a program.
    """

    def __init__(
        self, steps: list[Step], dtypes: list[torch.dtype], hands_on: bool, as_program: bool = False
    ):
        self.steps, self.dtypes, self.hands_on = steps, dtypes, hands_on
        kinds = [step.kind for step in steps]
        self.is_program = as_program or is_program(kinds)
        self.sum_at = kinds.index("sum") if "sum" in kinds else None
        parts = {SLOTS.get(step.kind): step.found.value for step in steps}
        self.activation, self.pool = parts.get("activation"), parts.get("pool")
        self.norm: Norm | None = parts.get("norm")
        self.own_values = [
            0, *(i + 1 for i, step in enumerate(steps[:-1]) if not step.same_object or step.kind == "sum")
        ]  # fmt: skip
        self.by_shape: dict[tuple, ShapePlan] = {}
        self.lingers = False
        self.others: list[FusionPlan] = []
        if as_program:
            return
        if self.is_program:
            end = next(n for n in range(len(kinds), -1, -1) if not is_program(kinds[:n]))
            first = FusionPlan(steps[:end], dtypes[:end], False)
            self.others = [first, *first.others]
            if self.sum_at is not None and self.sum_at + 1 < len(steps):
                summed = self.sum_at + 1
                self.others.insert(0, FusionPlan(steps[:summed], dtypes[:summed], False, as_program=True))
        else:
            end = next((n for n, kind in enumerate(kinds) if SLOTS.get(kind) == "pool"), len(kinds))
            while end and kinds[end - 1] == "identity":
                end -= 1
            if end:
                self.others = [FusionPlan(steps[:end], dtypes[:end], hands_on and end == len(kinds), True)]

    def calls(self) -> list[tuple]:
        """Functions of the steps, and their arguments."""
        return [step.constants for step in self.steps]

    def stages(self, begin: int, conv: Conv, x: Tensor) -> list[nn.Module | Sum]:
        """Steps from ``begin`` on as stages of an epilogue."""
        found: list[nn.Module | Sum] = []
        for step in self.steps[begin:]:
            value = step.found.value
            if step.kind == "sum":
                found.append(Sum(value.alpha if value.first else 1.0))
            elif step.kind == "norm":
                found.append(value.module(conv.weight.shape[0], x.dim()))
            elif step.kind != "identity":
                found.append(value)
        return found

    def for_shape(self, function, x: Tensor, conv: Conv, handed: bool) -> ShapePlan:
        """How the block runs for ``x``; PyTorch's own ``x`` is contiguous where ours was ``handed`` on."""
        key = x.shape, x.stride(), handed
        found = self.by_shape.get(key)
        if found is None or found.conv != (conv.weight.shape, conv.weight.stride(), conv[2:]):
            if len(self.by_shape) > MEMORY:
                self.by_shape.clear()
            found = self.by_shape[key] = self._plan_shape(function, x, conv, handed)
        return found

    def best_for(self, function, x: Tensor, conv: Conv, handed: bool) -> tuple[FusionPlan, ShapePlan]:
        """This plan or one of the others, and how it runs for ``x``: the first that pays, or runs at all."""
        found = [(self, self.for_shape(function, x, conv, handed))]
        for other in self.others:
            if found[-1][1].pays:
                break
            found.append((other, other.for_shape(function, x, conv, handed)))
        return _first_that_pays(found)

    def seen(self) -> list[tuple[FusionPlan, ShapePlan]]:
        """What :meth:`best_for` found for each shape."""
        plans = (self, *self.others)
        return [
            _first_that_pays([(plan, plan.by_shape[key]) for plan in plans if key in plan.by_shape])
            for key in self.by_shape
        ]

    def _plan_shape(self, function, x: Tensor, conv: Conv, handed: bool) -> ShapePlan:
        if self.is_program:
            return self._plan_program(function, x, conv, handed)
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
                hands_on = (handed or handing.plan != "reference") and is_faster(handing, call)
                call, layout = (handing, "channels_last") if hands_on else (call, layout)
            shapes = self._value_shapes(function, x, conv, handed)
            why = self._why_unfused(call, conv.weight, handed)
            if why is None and handed and call.plan == "reference" and _is_faulty(x, conv, shapes[0][0]):
                why = "the library's convolutions of such channels-last maps have faults"
            if why is None and handed:
                other = run.plan_block(x.contiguous(), *parts, layout)
                if call.choice.us > _MOST_LOSS * other.choice.us:
                    why = f"faster on its input as PyTorch lays it out: {other.reason}"
            if why is None:
                plan, why = call.plan, call.reason
            else:
                shapes = []
        except (RuntimeError, ValueError) as error:  # PyTorch's operators will raise their own error
            why = str(error)
        key = conv.weight.shape, conv.weight.stride(), conv[2:]
        pays = bool(shapes) and (plan != "reference" or not handed)
        return ShapePlan(plan, why, key, shapes, layout, hands_on, len(self.steps), pays)

    def _plan_program(self, function, x: Tensor, conv: Conv, handed: bool) -> ShapePlan:
        """As :meth:`_plan_shape`, where an epilogue runs the last steps behind the convolution."""
        given = x.new_empty(()).expand(x.shape) if handed else x
        layout = eager_layout(given, conv.weight, False, None, None)
        may_hand_on = self.hands_on and layout == "channels_first" and x.dim() == 4 and x.is_cpu
        head = self._head(conv, x.dim())
        hands_on, plan, shapes, program = False, "reference", [], None
        try:
            call = run.plan_block(x, conv, *self.head_parts(head, conv, x), None, layout)
            if head and call.plan == "reference":
                head = 0  # PyTorch's operators would run each step alone
                call = run.plan_block(x, conv, None, None, None, layout)
            if may_hand_on:
                handing = run.plan_block(x, conv, *self.head_parts(head, conv, x), None, "channels_last")
                hands_on = (handed or handing.plan != "reference") and is_faster(handing, call)
                call, layout = (handing, "channels_last") if hands_on else (call, layout)
            shapes = self._value_shapes(function, x, conv, handed)
            program = program_of(self.stages(head, conv, x))
            why = self._why_no_program(x, conv, shapes, head, program, call)
            if why is None and handed and call.plan == "reference" and _is_faulty(x, conv, shapes[0][0]):
                why = "the library's convolutions of such channels-last maps have faults"
            if why is None:
                names = ", ".join(map(str, self.steps[head:]))
                plan, why = call.plan, f"{names} in one pass behind the convolution: {call.reason}"
            else:
                shapes = []
        except (RuntimeError, ValueError) as error:  # PyTorch's operators will raise their own error
            why, shapes = str(error), []
        key = conv.weight.shape, conv.weight.stride(), conv[2:]
        program = program if shapes and isinstance(program, Program) else None
        return ShapePlan(plan, why, key, shapes, layout, hands_on, head, bool(shapes), program)

    def head_parts(self, head: int, conv: Conv, x: Tensor, norm: Norm | None = None) -> tuple[Any, Any]:
        """Norm and activation among the first ``head`` steps; ``norm`` is the norm's call if it ran."""
        found: dict[str, Any] = {"norm": None, "activation": None}
        for step in self.steps[:head]:
            value = step.found.value
            if step.kind == "norm":
                value = (norm or value).module(conv.weight.shape[0], x.dim())
            if SLOTS.get(step.kind) is not None:
                found[SLOTS[step.kind]] = value
        return found["norm"], found["activation"]

    def _head(self, conv: Conv, rank: int) -> int:
        """How many steps run in one call with the convolution.

        In inference a norm that is folded into the weights, and an activation. What a backward would read of
        them is more than an epilogue keeps.
        """
        head = 0
        for kind in ("norm", "activation"):
            if head == len(self.steps):
                break
            step = self.steps[head]
            if SLOTS.get(step.kind) == kind:
                if kind == "norm" and not folds(step.found.value.module(conv.weight.shape[0], rank)):
                    break
                if kind == "activation" and records_gradients() and head == 0:
                    break
                head += 1
        return head

    def _why_no_program(
        self, x: Tensor, conv: Conv, shapes: list[tuple], head: int, program: Program | str, call: CallPlan
    ) -> str | None:
        """Why the steps don't run as a program, as a sentence; None if they do."""
        shape, _ = shapes[0]
        if len(shape) != x.dim() or conv.weight.shape[0] == 1 or shape[2:].numel() < 2 or shape.numel() == 0:
            return "a map of one channel or one position"
        if len({*self.dtypes}) > 1 or self.dtypes[0] not in (torch.float32, torch.bfloat16):
            return "values between the steps differ in dtype"
        trained = records_gradients()
        z = x.new_empty(()).to(self.dtypes[0]).expand(shape)
        why = why_not_epilogue(z, program, trained)
        if why is not None:
            return why
        trained = trained and conv.weight.requires_grad
        of_batch = self.norm is not None and self.norm.training
        kinds = [step.kind for step in self.steps[head:]]
        saved = call.choice.saves_us + costs.epilogue_saves(
            shape.numel(), self.dtypes[0].itemsize, kinds, of_batch, trained, torch.get_num_threads()
        )
        if saved < OVERHEAD_US * (_IN_TRAINING if trained else _IN_INFERENCE):
            return f"one pass behind the convolution costs more than it saves: {saved:.0f} us"
        return None

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


def _first_that_pays(found: list[tuple[FusionPlan, ShapePlan]]) -> tuple[FusionPlan, ShapePlan]:
    for wanted in (lambda shape_plan: shape_plan.pays, lambda shape_plan: shape_plan.shapes):
        for plan, shape_plan in found:
            if wanted(shape_plan):
                return plan, shape_plan
    return next((one for one in found if not one[0].is_program), found[0])


def is_faster(ours: CallPlan, other: CallPlan) -> bool:
    """Whether ``ours`` is predicted to be faster; by a margin, where one is PyTorch's operators."""
    if ours.plan != other.plan and "reference" in (ours.plan, other.plan):
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
