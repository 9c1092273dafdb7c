"""The plan of a chain that was observed: its steps, and how the block runs for each shape of input."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cnnlstm_fast.fusion import run
from cnnlstm_fast.fusion.calls import Conv, Found, Norm
from cnnlstm_fast.fusion.layout import eager_layout
from cnnlstm_fast.fusion.match import SLOTS
from cnnlstm_fast.fusion.ways import Clock, ConvCall, Kind, Place, Way, as_handed, as_pytorch
from cnnlstm_fast.limits import limit
from cnnlstm_fast.planning import choose, tuner
from cnnlstm_fast.planning.support import records_gradients

#: How many shapes of inputs a convolution remembers.
MEMORY = 256

#: Microseconds that speculating a block counts for; a block that saves less runs as PyTorch's operators.
#: It takes half of that. As much is what predictions overstate the savings of small blocks by.
OVERHEAD_US = limit("BLOCK_US", 100, 0)
#: How many times that much a norm costs in addition, whose tensors are watched, and a graph of gradients.
_MORE = 1.5


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
        shapes: shape and strides of all values; empty where PyTorch's operators run the block.
        layout: of the block's result.
        hands_on: the result lies channels-last where PyTorch's is contiguous.
        converts: the block gets a channels-last copy of its contiguous input.
    """

    plan: str
    why: str
    conv: tuple
    shapes: list[tuple]
    layout: str
    hands_on: bool
    converts: bool


class FusionPlan:
    """A chain that was observed, and that later calls run as one block.

    A value of the chain has the number of steps before it: value 0 is the convolution's.

    Attributes:
        call: the convolution's, as it was observed.
        steps: behind the convolution.
        dtypes: of all values.
        hands_on: only another convolution reads the last value.
        reader: that convolution's site, and the key of its plan there.
        norm: the norm's arguments in the last call, or None without a norm.
        own_values: numbers of the values that are tensors of their own, without the last one; a step in place
            returns the tensor of the value before it.
        by_shape: by an input's shape and strides, whether it was handed on, and whether ways are timed.
        outlooks: by an input's kind and the same two, microseconds of this site and its readers.
        lingers: the program keeps values between the steps in variables that it does not read.
    """

    def __init__(
        self, call: ConvCall, steps: list[Step], dtypes: list[torch.dtype], hands_on: bool,
        reader: tuple[weakref.ref, tuple] | None,
    ):  # fmt: skip
        self.call, self.steps, self.dtypes, self.hands_on = call, steps, dtypes, hands_on
        self.reader = reader
        parts = {SLOTS.get(step.kind): step.found.value for step in steps}
        self.activation, self.pool = parts.get("activation"), parts.get("pool")
        self.norm: Norm | None = parts.get("norm")
        self.own_values = [0, *(i + 1 for i, step in enumerate(steps[:-1]) if not step.same_object)]
        self.by_shape: dict[tuple, ShapePlan] = {}
        self.outlooks: dict[tuple, float] = {}
        self.lingers = False

    def calls(self) -> list[tuple]:
        """Functions of the steps, and their arguments. A norm's arguments may differ from call to call."""
        return [
            (step.function, *(() if step.kind == "norm" else (step.args, step.kwargs))) for step in self.steps
        ]

    def for_shape(
        self, x: Tensor, conv: Conv, source: FusionPlan | None, clock: Clock | None = None
    ) -> ShapePlan:
        """How the block runs for ``x``.

        Args:
            x, conv: input of the convolution and its other arguments.
            source: the plan that handed ``x`` on, where PyTorch's own is contiguous.
            clock: times the ways to run the block; they are predicted without one.
        """
        key = x.shape, x.stride(), source is not None, clock is not None
        found = self.by_shape.get(key)
        if found is None or found.conv != (conv.weight.shape, conv.weight.stride(), conv[2:]):
            if len(self.by_shape) > MEMORY:
                self.by_shape.clear()
            found = self.by_shape[key] = self._plan_shape(x, conv, source, clock)
        return found

    def _plan_shape(self, x: Tensor, conv: Conv, source: FusionPlan | None, clock: Clock | None) -> ShapePlan:
        plan, shapes, layout, hands_on, converts = "reference", [], "channels_first", False, False
        handed = source is not None
        first = as_pytorch(x, clock is not None) if handed else x
        place = Place(self.call.function, conv, first, x if handed else None, clock is not None)
        try:
            way, why = self._best(place, handed, clock)
            if source is not None and source.reader_plan() is not self:  # it did not reckon with this site
                other, _ = self._best(place, False, clock)
                if other.total_us < way.total_us:
                    way, why = other, f"faster on its input as PyTorch lays it out: {why}"
            if way.call is not None and way.handed == handed:
                plan, layout, hands_on, converts = way.call.plan, way.layout, way.hands_on, way.converts
                shapes = self.value_shapes(place)
        except (RuntimeError, ValueError) as error:  # PyTorch's operators will raise their own error
            why, shapes = str(error), []
        key = conv.weight.shape, conv.weight.stride(), conv[2:]
        return ShapePlan(plan, why, key, shapes, layout, hands_on, converts)

    def _best(
        self, place: Place, handed: bool, clock: Clock | None, before: tuple[FusionPlan, ...] = ()
    ) -> tuple[Way, str]:
        """The best way to run the site for an input that is ``handed`` on or not, and the reason in words."""
        ways = self._ways(place)
        seconds = None if clock is None else clock(self, place, ways)
        if seconds is None:
            ways = [way for way in ways if not way.converts]
        else:
            ways = [way._replace(us=1e6 * s, overhead_us=0.0) for way, s in zip(ways, seconds, strict=True)]
        ways = self._with_readers(place, ways, clock, before)
        plain, blocks = ways[0], [way for way in ways[1:] if way.handed == handed]
        if not blocks:
            return plain, "the library's convolutions of such channels-last maps have faults"
        block = min(blocks, key=lambda way: way.total_us)
        why = self._why_unfused(plain, block, seconds is not None, handed)
        return (block, block.reason(plain, seconds is not None)) if why is None else (plain, why)

    def _ways(self, place: Place) -> list[Way]:
        """The ways to run the site, PyTorch's operators first, with their predicted costs."""
        conv, x = place.conv, place.x
        module = None if self.norm is None else self.norm.module(conv.weight.shape[0], x.dim())
        layout = eager_layout(x, conv.weight, self.pool is not None, module, self.activation)
        layouts = [layout]
        if self.hands_on and layout == "channels_first" and x.dim() == 4 and x.is_cpu and self.reader_plan():
            layouts.append("channels_last")
        found: list[Way] = []
        for given, handed, converts in place.inputs():
            for number, written in enumerate(layouts):
                hands_on, last = number > 0, handed or converts
                call = run.plan_block(given, conv, module, self.activation, self.pool, written)
                us = call.choice.us
                if not found:
                    found.append(Way(layout, None, us + call.choice.saves_us))
                    overhead = self._overhead_us(place)
                if call.plan == "reference":
                    if _is_faulty(given, conv, self.value_shapes(place)[0][0]) if last else hands_on:
                        continue
                    us *= 1 + max(choose.GAIN_PERCENT, 0) / 100  # channels-last too must promise to gain
                found.append(Way(written, call, us, overhead, handed, converts, hands_on))
        return found

    def _with_readers(
        self, place: Place, ways: list[Way], clock: Clock | None, before: tuple[FusionPlan, ...]
    ) -> list[Way]:
        """``ways`` with what the sites take that read their result, where that depends on the way."""
        reader = self.reader_plan()
        if reader is None or reader in (*before, self) or not any([way.hands_on for way in ways]):
            return ways
        shape, _ = self.value_shapes(place)[-1]
        result = Kind(shape, None, self.dtypes[-1], self._needs_graph(place))
        behind = [reader.outlook(result, last, clock, (*before, self)) for last in (False, True)]
        return [way._replace(behind_us=behind[way.hands_on]) for way in ways]

    def outlook(self, x: Kind, handed: bool, clock: Clock | None, before: tuple[FusionPlan, ...]) -> float:
        """Microseconds that this site and its readers take.

        Args:
            x: the input as PyTorch lays it out.
            handed: it is handed on channels-last instead.
            clock: times the ways to run a site; they are predicted without one.
            before: the plans of the sites in front of this one.
        """
        key = x, handed, clock is not None
        if key not in self.outlooks:
            if len(self.outlooks) > MEMORY:
                self.outlooks.clear()
            filled = clock is not None
            function, weight, bias, rest = self.call
            first = x.tensor(filled)
            conv = Conv(weight.tensor(filled), None if bias is None else bias.tensor(filled), *rest)
            place = Place(function, conv, first, as_handed(first, filled), filled)
            way, _ = self._best(place, handed, clock, before)
            self.outlooks[key] = way.total_us if way.handed == handed else math.inf
        return self.outlooks[key]

    def _needs_graph(self, place: Place) -> bool:
        """Whether the result needs a gradient, where any is recorded."""
        operands = (place.x, *place.conv[:2], *(() if self.norm is None else self.norm[2:4]))
        return records_gradients() and any([t is not None and t.requires_grad for t in operands])

    def _overhead_us(self, place: Place) -> float:
        """Microseconds that speculating the block costs."""
        return OVERHEAD_US * (1 + _MORE * ((self.norm is not None) + self._needs_graph(place)))

    def reader_plan(self) -> FusionPlan | None:
        """The plan of the site that reads the last value, where that is another convolution alone."""
        site, key = self.reader or (None, None)
        found = None if site is None else site()
        known = None if found is None else found.known.get(key)
        if known is None or type(known) is FusionPlan:
            return known
        return None if known.plan is None else known.common_plan()

    def _why_unfused(self, plain: Way, block: Way, timed: bool, handed: bool) -> str | None:
        """Why PyTorch's operators run the block, or None where it runs as one call."""
        assert block.call is not None
        saved = max(plain.total_us - block.total_us + block.overhead_us, 0.0)
        if not (handed or block.converts):  # channels-last PyTorch's operators may be worth it too
            least = choose.GAIN_PERCENT / 100 * plain.us
            if block.call.plan == "reference" or (saved < least and not timed):
                return block.call.reason
        if block.handed:
            return None
        if timed:
            return None if block.total_us <= tuner.TIE * plain.total_us else block.reason(plain, timed)
        if plain.us and saved < block.overhead_us:  # on CUDA microseconds are not predicted
            return f"calling it as a block costs more than it saves: {block.call.reason}"
        return None

    def value_shapes(self, place: Place) -> list[tuple]:
        """Shape and strides that PyTorch's operators give all values."""
        x, conv = place.x, place.conv
        with torch.no_grad():
            y = place.function(
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"),
                torch.empty_like(conv.weight, dtype=x.dtype, device="meta"),
                None, *conv[2:],
            )  # fmt: skip
            found = [(y.shape, y.stride())]
            for step in self.steps:
                if step.kind in ("pool", "max_pool"):
                    y = step.run(y)
                found.append((y.shape, y.stride()))
        return found


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
