"""Which functions read a convolution's result in a running program: noted in its first call."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from cnnlstm_fast.fusion.calls import CONVS, Conv, Found, is_sum, read_call, read_sum
from cnnlstm_fast.fusion.carry import CarriedMap
from cnnlstm_fast.fusion.context import context_of, fingerprint
from cnnlstm_fast.fusion.match import follow
from cnnlstm_fast.fusion.plan import FusionPlan, Step
from cnnlstm_fast.fusion.session import Session
from cnnlstm_fast.fusion.tensors import METADATA, alias, no_function
from cnnlstm_fast.fusion.ways import ConvCall, Kind


@final
class Observation:
    """What one call of a convolution has shown so far.

    Attributes:
        rank: of the input.
        state: of the block, as :data:`~cnnlstm_fast.fusion.match.FOLLOWS` names it.
        steps: behind the convolution.
        values: weak references to the values between them; :func:`_no_value` where a step in place made one
            value of another.
        limit: number of the value at which the chain ends, because something else reads it too.
        call: the convolution's.
        plan: the result of the observation, once the session has ended.
        repeats: observations of further calls of the same convolution in that session.
    """

    #: How many calls of a session are observed.
    MOST = 16

    def __init__(self, session: Session, function: Callable, x: Tensor, conv: Conv):
        self.rank, self.state = CONVS[function], "conv"
        bias = None if conv.bias is None else Kind.of(conv.bias)
        self.call = ConvCall(function, Kind.of(conv.weight), bias, conv[2:])
        self.steps: list[Step] = []
        self.limit: int | None = None
        self.values: list[Callable[[], Any]] = []
        self.dtypes: list[torch.dtype] = []
        self.context = context_of(x)
        # A block would read all operands at once. They must not change before eager has read the last one.
        self.operands: tuple | None = (x, *conv[:2])
        self.before = fingerprint(self.operands, by_reading=True)
        self.plan: FusionPlan | None = None
        self.repeats: list[Observation] = []
        session.observations.append(self)

    def observe(self, value: Tensor) -> Tensor:
        """Let ``value``, the result of the last step, note its reader."""
        value.__class__ = ObservedTensor
        observed = cast(ObservedTensor, value)
        observed._observation, observed._at = self, len(self.values)
        self.values.append(weakref.ref(value))
        self.dtypes.append(value.dtype)
        return value

    def extend(self, value: ObservedTensor, function, args, kwargs) -> Step | None:
        """The call as the chain's next step, or None where it ends the chain."""
        if value._at != len(self.steps) or self.limit is not None or context_of(value) != self.context:
            return None
        found = self._read(value, function, args, kwargs)
        if found is None:
            return None
        state = follow(self.state, found.part, self.rank, programs=True)
        if state is None or self.operands is None or self.before is None:
            return None
        if fingerprint(self.operands, by_reading=True) != self.before:
            return None
        self.state = state
        return Step(function, args, kwargs, found)

    def _read(self, value: ObservedTensor, function, args, kwargs) -> Found | None:
        """The call as a part of a block; of a sum the other operand must be no value of the same chain."""
        if not is_sum(function):
            return read_call(function, args, kwargs) if args[0] is value else None
        for other in args:
            if other is not value and type(other) is ObservedTensor and other._observation is self:
                return None
        return read_sum(function, value, args, kwargs)

    def end_at(self, at: int) -> None:
        """End the chain at value ``at``."""
        if self.limit is None or at < self.limit:
            self.limit = at
        self.operands = None

    def close(self) -> None:
        """End the observation with its session. A value that the program still holds ends the chain."""
        for ref in self.values:
            value = ref()
            if type(value) is ObservedTensor:
                value.close()
        end = len(self.steps) if self.limit is None else self.limit
        while end and self.steps[end - 1].kind == "identity":
            end -= 1
        self.plan = FusionPlan(self.call, self.steps[:end], self.dtypes[: end + 1])
        self.operands = None

    def common_plan(self) -> FusionPlan | None:
        """The plan that all calls of the session agree on, or None."""
        assert self.plan is not None
        for repeat in self.repeats:
            if repeat.plan is None or repeat.plan.calls() != self.plan.calls():
                return None
        return self.plan


class ObservedTensor(Tensor):
    """A value that notes its reader, and becomes a plain Tensor again when something has read it."""

    waits_for_sums = True
    _observation: Observation
    _at: int

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_sum(function) and any([hasattr(value, "is_placeholder") for value in args]):
            return NotImplemented  # a speculated call may wait for this sum
        with no_function():
            if function in METADATA:
                return function(*args, **kwargs)
            first, step = _extended(function, args, kwargs)
            for value in tree_iter((args, kwargs)):
                if type(value) is ObservedTensor and (step is None or value is not first):
                    value.close()
                elif type(value) is CarriedMap:
                    value.leave()
            if first is None or step is None:
                return function(*args, **kwargs)
            observation = first._observation
            if not step.same_object:  # what autograd saves is not held by the program
                args = tuple([alias(first) if value is first else value for value in args])
            result = function(*args, **kwargs)
            observation.steps.append(step)
            if result is first:  # a step in place, or an identity
                observation.values[first._at] = _no_value
                first._at += 1
                observation.values.append(weakref.ref(first))
                observation.dtypes.append(first.dtype)
                return result
            return observation.observe(result)

    def close(self) -> None:
        """Become a plain tensor: the chain ends here."""
        observation, at = self._observation, self._at
        self.__class__ = Tensor  # type: ignore[assignment]  # its type before it was observed
        del self._observation, self._at
        observation.end_at(at)


def _extended(function, args, kwargs) -> tuple[ObservedTensor | None, Step | None]:
    """The observed value whose chain a call extends, and the step; None where it extends none."""
    for value in args[: 2 if is_sum(function) else 1]:
        if type(value) is ObservedTensor:
            step = value._observation.extend(value, function, args, kwargs)
            if step is not None:
                return value, step
    return None, None


def _no_value() -> None:
    """Stands for a weak reference to a value that no longer exists."""
