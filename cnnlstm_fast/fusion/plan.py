"""The plan of a chain that was observed: its steps, and how the block runs for each shape of input."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnnlstm_fast.functional.epilogue import Program, Sum, program_of, why_not_epilogue
from cnnlstm_fast.fusion import run
from cnnlstm_fast.fusion.calls import Conv, Found, Norm
from cnnlstm_fast.fusion.layout import eager_layout
from cnnlstm_fast.fusion.match import SLOTS, is_program
from cnnlstm_fast.fusion.ways import Clock, ConvCall, Kind, Place, Way, as_handed, as_pytorch
from cnnlstm_fast.limits import limit
from cnnlstm_fast.planning import choose, costs, rates, tuner
from cnnlstm_fast.planning.support import folds, records_gradients

#: How many shapes of inputs a convolution remembers.
MEMORY = 256

#: Microseconds that speculating a block counts for; a block that saves less runs as PyTorch's operators.
#: It takes half of that. As much is what predictions overstate the savings of small blocks by.
OVERHEAD_US = limit("BLOCK_US", 100, 0)
#: How many times as much it is with a norm, whose tensors are watched, and with a graph of gradients.
_WITH_NORM, _WITH_GRAPH = 2.5, 3.0


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
        shapes: shape and strides of all values; empty where PyTorch's operators run the block.
        layout: of the block's result.
        hands_on: the result lies channels-last where PyTorch's is contiguous.
        converts: the block gets a channels-last copy of its contiguous input.
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
    converts: bool
    head: int
    pays: bool
    program: Program | None = None


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
            returns the tensor of the value before it. A sum in place has another place in the graph.
        by_shape: by an input's shape and strides, whether it was handed on, and whether ways are timed.
        outlooks: by an input's kind and the same two, microseconds of this site and its readers.
        lingers: the program keeps values between the steps in variables that it does not read.
        is_program: the convolution and an epilogue run the steps, and not one block.
        sum_at: which step is a sum, or None.
        others: plans for inputs where this one does not pay: of a program its steps up to the sum, and its
            first steps as a block; of a block the steps before its pool as a program.
    """

    def __init__(
        self, call: ConvCall, steps: list[Step], dtypes: list[torch.dtype], hands_on: bool,
        reader: tuple[weakref.ref, tuple] | None, as_program: bool = False,
    ):  # fmt: skip
        self.call, self.steps, self.dtypes, self.hands_on = call, steps, dtypes, hands_on
        self.reader = reader
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
        self.outlooks: dict[tuple, float] = {}
        self.lingers = False
        self.others = [] if as_program else self._others(kinds)

    def _others(self, kinds: list[str]) -> list[FusionPlan]:
        if not self.is_program:
            end = next((n for n, kind in enumerate(kinds) if SLOTS.get(kind) == "pool"), len(kinds))
            while end and kinds[end - 1] == "identity":
                end -= 1
            return [self._first(end, as_program=True)] if end else []
        first = self._first(next(n for n in range(len(kinds), -1, -1) if not is_program(kinds[:n])))
        found = [first, *first.others]
        if self.sum_at is not None and self.sum_at + 1 < len(kinds):
            found.insert(0, self._first(self.sum_at + 1, as_program=True))
        return found

    def _first(self, end: int, as_program: bool = False) -> FusionPlan:
        """The plan of the steps before ``end``."""
        whole = end == len(self.steps)
        hands_on, reader = whole and self.hands_on, self.reader if whole else None
        return FusionPlan(
            self.call, self.steps[:end], self.dtypes[: end + 1], hands_on, reader, as_program=as_program
        )

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

    def program(self, head: int, conv: Conv, x: Tensor) -> Program:
        """The steps behind the first ``head`` ones, for an epilogue that can run all steps."""
        found = program_of(self.stages(head, conv, x))
        assert isinstance(found, Program)
        return found

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

    def best_for(
        self, x: Tensor, conv: Conv, source: FusionPlan | None, clock: Clock | None = None
    ) -> tuple[FusionPlan, ShapePlan]:
        """This plan or one of the others, and how it runs for ``x``: the first that pays, or runs at all."""
        found = [(self, self.for_shape(x, conv, source, clock))]
        for other in self.others:
            if found[-1][1].pays:
                break
            found.append((other, other.for_shape(x, conv, source, clock)))
        return _first_that_pays(found)

    def seen(self) -> list[tuple[FusionPlan, ShapePlan]]:
        """What :meth:`best_for` found for each shape."""
        plans = (self, *self.others)
        return [
            _first_that_pays([(plan, plan.by_shape[key]) for plan in plans if key in plan.by_shape])
            for key in self.by_shape
        ]

    def _plan_shape(self, x: Tensor, conv: Conv, source: FusionPlan | None, clock: Clock | None) -> ShapePlan:
        plan, shapes, layout, hands_on, converts = "reference", [], "channels_first", False, False
        head = len(self.steps)
        program: Program | None = None
        handed = source is not None
        first = as_pytorch(x, clock is not None) if handed else x
        place = Place(self.call.function, conv, first, x if handed else None, clock is not None)
        try:
            place = place._replace(shapes=self.value_shapes(place))
            way, why = self._best(place, handed, clock)
            if source is not None and source.reader_plan() is not self:  # it did not reckon with this site
                other, _ = self._best(place, False, clock)
                if other.total_us < way.total_us:
                    way, why = other, f"faster on its input as PyTorch lays it out: {why}"
            if way.call is not None and way.handed == handed:
                plan, layout, hands_on, converts = way.call.plan, way.layout, way.hands_on, way.converts
                shapes, head = place.shapes, way.head
                if self.is_program:
                    program = self.program(head, conv, x)
                    names = ", ".join(map(str, self.steps[head:]))
                    why = f"{names} in one pass behind the convolution: {why}"
        except (RuntimeError, ValueError) as error:  # PyTorch's operators will raise their own error
            why, shapes = str(error), []
        key = conv.weight.shape, conv.weight.stride(), conv[2:]
        timed = clock is not None
        pays = bool(shapes) and (self.is_program or timed or plan != "reference" or not handed)
        return ShapePlan(plan, why, key, shapes, layout, hands_on, converts, head, pays, program)

    def _best(
        self, place: Place, handed: bool, clock: Clock | None, before: tuple[FusionPlan, ...] = ()
    ) -> tuple[Way, str]:
        """The best way to run the site for an input that is ``handed`` on or not, and the reason in words."""
        why_not = self._why_no_program(place) if self.is_program else None
        ways = self._ways(place) if why_not is None else [Way("channels_first", None, 0.0)]
        seconds = None if clock is None or len(ways) == 1 else clock(self, place, ways)
        if seconds is None:
            ways = [way for way in ways if not way.converts]
        else:
            ways = [way._replace(us=1e6 * s, overhead_us=0.0) for way, s in zip(ways, seconds, strict=True)]
        ways = self._with_readers(place, ways, clock, before)
        plain, blocks = ways[0], [way for way in ways[1:] if way.handed == handed]
        if not blocks:
            return plain, why_not or "the library's convolutions of such channels-last maps have faults"
        block = min(blocks, key=lambda way: way.total_us)
        why = self._why_unfused(plain, block, seconds is not None, handed)
        return (block, block.reason(plain, seconds is not None)) if why is None else (plain, why)

    def _ways(self, place: Place) -> list[Way]:
        """The ways to run the site, PyTorch's operators first, with their predicted costs."""
        conv, x = place.conv, place.x
        saves_us, head = 0.0, len(self.steps)
        if self.is_program:
            head = self._head(conv, x.dim())
            saves_us = self._program_saves_us(place, head)
        norm, activation = self.head_parts(head, conv, x)
        pool = None if self.is_program else self.pool
        layout = eager_layout(x, conv.weight, pool is not None, norm, activation)
        layouts = [layout]
        if self.hands_on and layout == "channels_first" and x.dim() == 4 and x.is_cpu and self.reader_plan():
            layouts.append("channels_last")
        found: list[Way] = []
        for given, handed, converts in place.inputs():
            for number, written in enumerate(layouts):
                hands_on, last, joined = number > 0, handed or converts, head
                call = run.plan_block(given, conv, norm, activation, pool, written)
                if self.is_program and head and call.plan == "reference":
                    # PyTorch's operators would run each step alone; the epilogue runs all of them.
                    joined, call = 0, run.plan_block(given, conv, None, None, None, written)
                us = call.choice.us
                if not found:
                    found.append(Way(layout, None, us + call.choice.saves_us + saves_us))
                    overhead = self._overhead_us(place)
                if self.is_program and joined == len(self.steps):
                    continue  # no step is left for an epilogue
                if call.plan == "reference":
                    if _is_faulty(given, conv, place.shapes[0][0]) if last else hands_on:
                        continue
                    if hands_on or last or not self.is_program:  # channels-last too must promise to gain
                        us *= 1 + max(choose.GAIN_PERCENT, 0) / 100
                found.append(Way(written, call, us, overhead, handed, converts, hands_on, head=joined))
        return found

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
        """How many steps of a program run in one call with the convolution.

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

    def _why_no_program(self, place: Place) -> str | None:
        """Why no epilogue runs the steps, as a sentence; None if one does."""
        conv, x = place.conv, place.x
        shape, _ = place.shapes[0]
        if len(shape) != x.dim() or conv.weight.shape[0] == 1 or shape[2:].numel() < 2 or shape.numel() == 0:
            return "a map of one channel or one position"
        if len({*self.dtypes}) > 1 or self.dtypes[0] not in (torch.float32, torch.bfloat16):
            return "values between the steps differ in dtype"
        z = x.new_empty(()).to(self.dtypes[0]).expand(shape)
        return why_not_epilogue(z, program_of(self.stages(0, conv, x)), records_gradients())

    def _program_saves_us(self, place: Place, head: int) -> float:
        """Microseconds that one pass behind the convolution saves, over a pass for each step."""
        shape, _ = place.shapes[0]
        of_batch = self.norm is not None and self.norm.training
        kinds = [step.kind for step in self.steps[head:]]
        trained, threads = self.needs_graph(place), torch.get_num_threads()
        sizes = shape.numel(), self.dtypes[0]
        return costs.epilogue_saves(*sizes, kinds, of_batch, trained, rates.here(), threads)

    def _with_readers(
        self, place: Place, ways: list[Way], clock: Clock | None, before: tuple[FusionPlan, ...]
    ) -> list[Way]:
        """``ways`` with what the sites take that read their result, where that depends on the way."""
        reader = self.reader_plan()
        if reader is None or reader in (*before, self) or not any([way.hands_on for way in ways]):
            return ways
        shape, _ = place.shapes[-1]
        result = Kind(shape, None, self.dtypes[-1], self.needs_graph(place))
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
            place = place._replace(shapes=self.value_shapes(place))
            way, _ = self._best(place, handed, clock, before)
            found = way.total_us if way.handed == handed else math.inf
            if way.call is None and self.others:
                found = min(found, self.others[0].outlook(x, handed, clock, before))
            self.outlooks[key] = found
        return self.outlooks[key]

    def needs_graph(self, place: Place) -> bool:
        """Whether the result needs a gradient, where any is recorded."""
        operands = (place.x, *place.conv[:2], *(() if self.norm is None else self.norm[2:4]))
        return records_gradients() and any([t is not None and t.requires_grad for t in operands])

    def _overhead_us(self, place: Place) -> float:
        """Microseconds that speculating the block costs."""
        more = _WITH_NORM if self.norm is not None else 1.0
        return OVERHEAD_US * more * (_WITH_GRAPH if self.needs_graph(place) else 1.0)

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
        same_conv = self.is_program and block.call.plan == "reference"
        if not (handed or block.converts or same_conv):  # channels-last PyTorch may gain too
            least = choose.GAIN_PERCENT / 100 * plain.us
            if block.call.plan == "reference" or (saved < least and not timed):
                return block.call.reason
        if block.handed and not self.is_program:
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


def _first_that_pays(found: list[tuple[FusionPlan, ShapePlan]]) -> tuple[FusionPlan, ShapePlan]:
    for wanted in (lambda shape_plan: shape_plan.pays, lambda shape_plan: shape_plan.shapes):
        for plan, shape_plan in found:
            if wanted(shape_plan):
                return plan, shape_plan
    return next((one for one in found if not one[0].is_program), found[0])


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
