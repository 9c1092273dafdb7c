"""The plan of a chain that was observed: its steps, and how the block runs for each shape of input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnnlstm_fast import _ext
from cnnlstm_fast.functional.epilogue import Program, Sum, program_of, why_not_epilogue
from cnnlstm_fast.fusion import run
from cnnlstm_fast.fusion.calls import Conv, Found, Norm
from cnnlstm_fast.fusion.layout import eager_layout, like_channels_last
from cnnlstm_fast.fusion.match import SLOTS, is_program
from cnnlstm_fast.fusion.ways import Clock, ConvCall, Place, Way, channels_last_like, contiguous_like
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
        carried: input and result lie channels-last where PyTorch's are contiguous.
        head: how many of the steps run in one call with the convolution; all of them in a block.
        program: the other steps, which an epilogue runs; None where there are none.
        pytorch_us: microseconds of PyTorch's operators.
        saves_us: how many fewer the block takes.
    """

    plan: str
    why: str
    conv: tuple
    shapes: list[tuple]
    layout: str
    carried: bool
    head: int
    program: Program | None = None
    pytorch_us: float = 0.0
    saves_us: float = 0.0


class CarriedSite(NamedTuple):
    """How a site runs in a session that carries.

    Attributes:
        plan, shape_plan: the block, which PyTorch's operators run where it has no shapes.
        leaves: the site runs as without carrying, on what PyTorch gives.
        plain_us: microseconds that it takes without carrying.
        saves_us: how many fewer it takes here; conversions are not counted.
    """

    plan: FusionPlan
    shape_plan: ShapePlan
    leaves: bool
    plain_us: float
    saves_us: float


class FusionPlan:
    """A chain that was observed, and that later calls run as one block.

    A value of the chain has the number of steps before it: value 0 is the convolution's.

    Attributes:
        call: the convolution's, as it was observed.
        steps: behind the convolution.
        dtypes: of all values.
        norm: the norm's arguments in the last call, or None without a norm.
        own_values: numbers of the values that are tensors of their own, without the last one; a step in place
            returns the tensor of the value before it. A sum in place has another place in the graph.
        by_shape: by an input's shape and strides, whether it is carried, and whether ways are timed.
        carried: by a carried input's shape, and whether ways are timed.
        carries: whether the last call was in a session that carries.
        lingers: the program keeps values between the steps in variables that it does not read.
        is_program: the convolution and an epilogue run the steps, and not one block.
        sum_at: which step is a sum, or None.
        others: plans for inputs where this one does not pay: of a program its steps up to the sum, and its
            first steps as a block; of a block the steps before its pool as a program.
    """

    def __init__(
        self, call: ConvCall, steps: list[Step], dtypes: list[torch.dtype], as_program: bool = False
    ):
        self.call, self.steps, self.dtypes = call, steps, dtypes
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
        self.carried: dict[tuple, CarriedSite] = {}
        self.carries = False
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
        return FusionPlan(self.call, self.steps[:end], self.dtypes[: end + 1], as_program=as_program)

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
        self, x: Tensor, conv: Conv, carried: bool = False, clock: Clock | None = None
    ) -> ShapePlan:
        """How the block runs for ``x``.

        Args:
            x, conv: input of the convolution and its other arguments.
            carried: ``x`` lies channels-last, where PyTorch's own is contiguous.
            clock: times the ways to run the block; they are predicted without one.
        """
        key = x.shape, x.stride(), carried, clock is not None
        found = self.by_shape.get(key)
        if found is None or found.conv != (conv.weight.shape, conv.weight.stride(), conv[2:]):
            if len(self.by_shape) > MEMORY:
                self.by_shape.clear()
            found = self.by_shape[key] = self._plan_shape(x, conv, carried, clock)
        return found

    def best_for(
        self, x: Tensor, conv: Conv, carried: bool = False, clock: Clock | None = None
    ) -> tuple[FusionPlan, ShapePlan]:
        """This plan or one of the others, and how it runs for ``x``: the first that pays."""
        found = []
        for plan in (self, *self.others):
            found.append((plan, plan.for_shape(x, conv, carried, clock)))
            if found[-1][1].shapes:
                break
        return _first_that_pays(found)

    def carried_site(self, x: Tensor, conv: Conv, clock: Clock | None = None) -> CarriedSite:
        """How the site runs for an image ``x`` that is carried, or will be."""
        key = x.shape, clock is not None
        found = self.carried.get(key)
        if found is None or found.shape_plan.conv != (conv.weight.shape, conv.weight.stride(), conv[2:]):
            if len(self.carried) > MEMORY:
                self.carried.clear()
            found = self.carried[key] = self._plan_carried(x, conv, clock)
        return found

    def _plan_carried(self, x: Tensor, conv: Conv, clock: Clock | None) -> CarriedSite:
        contiguous, x = contiguous_like(x, clock is not None), channels_last_like(x, clock is not None)
        _, plain = self.best_for(contiguous, conv, False, clock)
        plain_us = self.for_shape(contiguous, conv, False, clock).pytorch_us - plain.saves_us
        plan, shape_plan = self.best_for(x, conv, True, clock)
        saves_us = plain_us - (self.for_shape(x, conv, True, clock).pytorch_us - shape_plan.saves_us)
        leaves = not self._carries(contiguous, x, conv, bool(shape_plan.shapes), saves_us)
        return CarriedSite(plan, shape_plan, leaves, plain_us, 0.0 if leaves else saves_us)

    def _carries(self, contiguous: Tensor, x: Tensor, conv: Conv, as_block: bool, saves_us: float) -> bool:
        """Whether the site takes carried maps, rather than having them converted and giving PyTorch's."""
        try:
            shapes = self.value_shapes(contiguous, conv)
        except (RuntimeError, ValueError):  # PyTorch's operators will raise their own error
            return False
        if like_channels_last(conv.weight):  # then PyTorch's result lies so, too
            return False
        if not as_block and _is_faulty(x, self.dtypes[0], conv, shapes[0][0]):
            return False
        trained, threads = records_gradients(), torch.get_num_threads()
        return saves_us > -sum(
            costs.conversion_us(shape.numel(), x.dtype, trained, rates.here(), threads)
            for shape in (x.shape, shapes[-1][0])
        )

    def seen(self) -> list[tuple[FusionPlan, ShapePlan]]:
        """What :meth:`best_for` found for each shape, on maps that lie as those of the last call."""
        plans = (self, *self.others)
        return [
            _first_that_pays([(plan, plan.by_shape[key]) for plan in plans if key in plan.by_shape])
            for key, found in self.by_shape.items()
            if found.carried == self.carries
        ]

    def _plan_shape(self, x: Tensor, conv: Conv, carried: bool, clock: Clock | None) -> ShapePlan:
        why: str | None
        timed, key = clock is not None, (conv.weight.shape, conv.weight.stride(), conv[2:])
        place = Place(self.call.function, conv, x, carried, timed)
        plain = Way("channels_first", None, 0.0)
        try:
            shapes = self.value_shapes(contiguous_like(x, False) if carried else x, conv)
            place = place._replace(shapes=shapes)
            why = self._why_no_program(place) if self.is_program else None
            ways = self._ways(place, why is None)
            seconds = None if clock is None or len(ways) == 1 else clock(self, place, ways)
            if seconds is not None:
                timed_ways = zip(ways, seconds, strict=True)
                ways = [way._replace(us=1e6 * s, overhead_us=0.0) for way, s in timed_ways]
            plain, block = ways[0], ways[-1]
            if block is not plain:
                why = self._why_unfused(plain, block, seconds is not None)
            elif why is None:
                why = "the library's convolutions of such channels-last maps have faults"
            if why is None and block.call is not None:
                why, program = block.reason(plain, seconds is not None), None
                if self.is_program:
                    program = self.program(block.head, conv, x)
                    names = ", ".join(map(str, self.steps[block.head :]))
                    why = f"{names} in one pass behind the convolution: {why}"
                how = block.call.plan, why, key, shapes, block.layout, carried, block.head, program
                return ShapePlan(*how, plain.us, plain.us - block.total_us)
        except (RuntimeError, ValueError) as error:  # PyTorch's operators will raise their own error
            why = str(error)
        return ShapePlan("reference", why or "", key, [], plain.layout, carried, 0, None, plain.us)

    def _ways(self, place: Place, with_block: bool) -> list[Way]:
        """The ways to run the site, PyTorch's operators first, with their predicted costs."""
        conv, x, carried = place.conv, place.x, place.carried
        saves_us, head = 0.0, len(self.steps)
        if self.is_program and with_block:
            head = self._head(conv, x.dim())
            saves_us = self._program_saves_us(place, head)
        norm, activation = self.head_parts(head, conv, x)
        pool = None if self.is_program else self.pool
        layout = (
            "channels_last" if carried else eager_layout(x, conv.weight, pool is not None, norm, activation)
        )
        call = run.plan_block(x, conv, norm, activation, pool, layout)
        if self.is_program and head and call.plan == "reference":
            # PyTorch's operators would run each step alone; the epilogue runs all of them.
            head, call = 0, run.plan_block(x, conv, None, None, None, layout)
        us = call.choice.us
        plain = Way(layout, None, us + call.choice.saves_us + saves_us, carried=carried)
        if not with_block or (self.is_program and head == len(self.steps)):  # no step is left for an epilogue
            return [plain]
        if carried and call.plan == "reference" and _is_faulty(x, self.dtypes[0], conv, place.shapes[0][0]):
            return [plain]
        return [plain, Way(layout, call, us, self._overhead_us(place), carried, head)]

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
        trained, threads = self.needs_graph(place), torch.get_num_threads()
        sizes = shape.numel(), self.dtypes[0]
        kinds = self.program(head, place.conv, place.x).kinds
        return costs.epilogue_saves(*sizes, kinds, of_batch, trained, rates.here(), threads)

    def needs_graph(self, place: Place) -> bool:
        """Whether the result needs a gradient, where any is recorded."""
        operands = (place.x, *place.conv[:2], *(() if self.norm is None else self.norm[2:4]))
        return records_gradients() and any([t is not None and t.requires_grad for t in operands])

    def _overhead_us(self, place: Place) -> float:
        """Microseconds that speculating the block costs."""
        more = _WITH_NORM if self.norm is not None else 1.0
        return OVERHEAD_US * more * (_WITH_GRAPH if self.needs_graph(place) else 1.0)

    def _why_unfused(self, plain: Way, block: Way, timed: bool) -> str | None:
        """Why PyTorch's operators run the block, or None where it runs as one call."""
        assert block.call is not None
        same_conv = self.is_program and block.call.plan == "reference"
        if block.call.plan == "reference" and not same_conv:
            return block.call.reason
        if timed:
            return None if block.total_us <= tuner.TIE * plain.total_us else block.reason(plain, timed)
        least = 0.0 if same_conv else choose.GAIN_PERCENT / 100 * plain.us
        if plain.us and plain.us - block.us < least:  # on CUDA microseconds are not predicted
            return block.call.reason
        if plain.us and plain.us - block.total_us < least:
            return f"calling it as a block costs more than it saves: {block.call.reason}"
        return None

    def value_shapes(self, x: Tensor, conv: Conv) -> list[tuple]:
        """Shape and strides that PyTorch's operators give all values."""
        with torch.no_grad():
            y = self.call.function(
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"),
                torch.empty_like(conv.weight, dtype=x.dtype, device="meta"),
                None, *conv[2:],
            )  # fmt: skip
            if eager_layout(x, conv.weight, False, None, None) == "channels_last":
                at = y.dim() - conv.weight.dim() + 1  # meta convolutions are contiguous, whatever they read
                y = y.new_empty(y.movedim(at, -1).shape).movedim(-1, at)
            found = [(y.shape, y.stride())]
            for step in self.steps:
                if step.kind in ("pool", "max_pool"):
                    y = step.run(y)
                found.append((y.shape, y.stride()))
        return found


def _first_that_pays(found: list[tuple[FusionPlan, ShapePlan]]) -> tuple[FusionPlan, ShapePlan]:
    for plan, shape_plan in found:
        if shape_plan.shapes:
            return plan, shape_plan
    return next((one for one in found if not one[0].is_program), found[0])


def _is_faulty(x: Tensor, dtype: torch.dtype, conv: Conv, map_shape: torch.Size) -> bool:
    """Whether PyTorch's convolution in ``dtype`` must not get ``x`` channels-last.

    csrc/library_limits.h says why.
    """
    if not x.is_cpu:
        return False
    if not _ext.loaded:  # nobody knows
        return True
    # Stride, padding, dilation and groups as in the schema of conv_block; nothing depends on the padding.
    args = [*_pair(conv.stride), 0, 0, *_pair(conv.dilation), conv.groups]
    given = x.new_empty((), dtype=dtype).expand(x.shape)
    contiguous, contiguous_grad, _ = torch.ops.cnnlstm_fast.library_limits(
        given, conv.weight, args, map_shape[-1]
    )
    return contiguous or (contiguous_grad and records_gradients())


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    """A convolution's parameter for both axes."""
    return [*value, *value][:2] if isinstance(value, Sequence) else [value, value]
