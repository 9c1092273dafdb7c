"""Timing the ways to run a site, where it stands: what speculating a block costs counts too."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from cnnlstm_fast import backends
from cnnlstm_fast.fusion.calls import Norm
from cnnlstm_fast.fusion.carry import Carry
from cnnlstm_fast.fusion.context import Context, context_of
from cnnlstm_fast.fusion.plan import FusionPlan, ShapePlan, Step
from cnnlstm_fast.fusion.session import Session
from cnnlstm_fast.fusion.speculate import Speculation
from cnnlstm_fast.fusion.ways import Kind, Place, Way
from cnnlstm_fast.fusion.writes import WriteWatch
from cnnlstm_fast.planning import observer, tuner


def seconds_of_ways(plan: FusionPlan, place: Place, ways: Sequence[Way]) -> list[float] | None:
    """Seconds of each of ``ways``, forward and backward, timed in turn or kept from an earlier time.

    All tensors that a run changes are copies. None where nothing may be timed now, or a way raises an error.
    """
    context = context_of(place.x)
    names = [way.name for way in ways]
    conv = place.conv
    kinds = [Kind.of(t) for t in (place.x, *conv[:2]) if t is not None]
    steps = tuple(map(_described, plan.steps))
    settings = backends.allow_transforms, torch.get_num_threads()
    call = (place.function.__name__, *kinds, *conv[2:], steps, context, *settings, *names)

    def key() -> dict:
        return {"site": [str(part) for part in call]}

    def run(name: str) -> None:
        _run(plan, place, ways[names.index(name)], context)

    if not tuner.may_time() and not tuner.knows(call):
        return None
    watched, observer.current = observer.current, None
    try:
        return list(tuner.seconds_of(call, key, names, run).values())
    except Exception:  # whatever a run raises; the call itself raises it where it is PyTorch's own
        return None
    finally:
        observer.current = watched


def _described(step: Step) -> str:
    """A step's function and arguments; of a norm, what decides its time."""
    value = step.found.value
    if isinstance(value, Norm):
        return f"norm {value.training} {value.running_mean is not None} {value.weight is not None}"
    return f"{step.kind} {value} {step.found.inplace}"


class _Nobody:
    """Stands for the site of a call that is only timed."""

    def mispredicted(self, plan: FusionPlan) -> None: ...

    def disable(self, why: str) -> None: ...


def _run(plan: FusionPlan, place: Place, way: Way, context: Context) -> None:
    """Run a site once, as a program would: the convolution, then its steps, then the backward."""
    x, weight, bias = (_leaf(t) for t in (place.x, *place.conv[:2]))
    conv = place.conv._replace(weight=weight, bias=bias)
    norm = None if plan.norm is None else plan.norm._replace(
        running_mean=_copy(plan.norm.running_mean), running_var=_copy(plan.norm.running_var),
        weight=_leaf(plan.norm.weight), bias=_leaf(plan.norm.bias),
    )  # fmt: skip
    shapes = place.shapes
    needs_graph = plan.needs_graph(place)
    others = [  # what sums add, whose place in memory is that of what it is added to
        Kind(shape, strides, dtype, needs_graph).tensor(True) if step.kind == "sum" else None
        for step, (shape, strides), dtype in zip(plan.steps, shapes, plan.dtypes, strict=False)
    ]
    if way.call is None:
        y = place.function(x, *conv)
        session = None
    else:
        copied = copy.copy(plan)
        copied.norm = norm
        program = plan.program(way.head, conv, x) if plan.is_program else None
        how = way.call.plan, "", (), shapes, way.layout, way.carried, way.head, program
        shape_plan = ShapePlan(*how)
        session = Session()
        session.writes = WriteWatch()
        carry = Carry(session.writes) if way.carried else None
        y = Speculation(
            _Nobody(), session, copied, shape_plan, context, place.function, x, conv, carry
        ).start()
    for step, other in zip(plan.steps, others, strict=True):
        y = step.run(y, other) if step.kind != "norm" else step.function(y, *cast(Norm, norm))
    if session is not None:
        session.close()
        if carry is not None:
            carry.close()
    if y.requires_grad:
        y.backward(torch.ones_like(y))


def _leaf(x: Tensor | None) -> Any:
    return None if x is None else x.detach().requires_grad_(x.requires_grad)


def _copy(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().clone()
