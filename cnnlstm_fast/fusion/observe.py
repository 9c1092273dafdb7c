"""What follows a convolution in a running program: the first call runs as it is, and notes it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from cnnlstm_fast import patterns
from cnnlstm_fast.fusion.recipe import Recipe, Step, context_of, fingerprint
from cnnlstm_fast.fusion.session import Session
from cnnlstm_fast.patterns import Conv

no_function = torch._C.DisableTorchFunctionSubclass

#: What may be asked of an observed tensor or a placeholder without consuming it.
QUESTIONS = {
    *(getattr(Tensor, name).__get__ for name in (
        "shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_sparse", "is_leaf",
        "is_nested",
    )),
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.__len__, torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip


@final
class Trace:
    """What an observed call has shown so far.

    Attributes:
        steps: behind the convolution.
        values: weak references to the values between them; :func:`_nobody` where one became another.
        limit: the chain may not go beyond this value, because something else reads it.
        hands_on: that is a convolution.
        recipe: what was learnt, once the session has ended.
        others: further calls of the same convolution in that session.
    """

    #: How many calls of a session are observed.
    MOST = 16

    def __init__(self, session: Session, x: Tensor, conv: Conv, rank: int):
        self.rank, self.state = rank, "conv"
        self.steps: list[Step] = []
        self.limit: int | None = None
        self.hands_on = False
        self.values: list[Callable[[], Any]] = []
        self.dtypes: list[torch.dtype] = []
        self.context = context_of(x)
        # What eager reads now must be what the whole block would read: at each step it is looked at again.
        self.operands: tuple | None = (x, *conv[:2])
        self.before = fingerprint(self.operands, by_reading=True)
        self.recipe: Recipe | None = None
        self.others: list[Trace] = []
        session.traces.append(self)

    def note(self, value: Tensor) -> Tensor:
        """Let ``value`` note who consumes it."""
        value.__class__ = Observed
        observed = cast(Observed, value)
        observed._trace, observed._at = self, len(self.values)
        self.values.append(weakref.ref(value))
        self.dtypes.append(value.dtype)
        return value

    def prolong(self, value: Observed, function, args, kwargs) -> Step | None:
        """The call as the chain's next step, or None where it is none."""
        if value._at != len(self.steps) or self.limit is not None or context_of(value) != self.context:
            return None
        found = patterns.read_call(function, args, kwargs)
        if found is None:
            return None
        state = patterns.follow(self.state, found.part, self.rank)
        if state is None or self.operands is None or self.before is None:
            return None
        if fingerprint(self.operands, by_reading=True) != self.before:
            return None
        self.state = state
        return Step(function, args, kwargs, found)

    def ends_at(self, at: int, hands_on: bool = False) -> None:
        if self.limit is None or at < self.limit:
            self.limit, self.hands_on = at, hands_on
        self.operands = None

    def close(self) -> None:
        """The session ends: a value that is still held is the end of the block."""
        for ref in self.values:
            value = ref()
            if type(value) is Observed:
                value.close()
        end = len(self.steps) if self.limit is None else self.limit
        while end and self.steps[end - 1].kind == "identity":
            end -= 1
        self.recipe = Recipe(self.steps[:end], self.dtypes[:end], self.hands_on)
        self.operands = None

    def agreed(self) -> Recipe | None:
        """What all calls of the session have shown alike, or None."""
        assert self.recipe is not None
        for other in self.others:
            if other.recipe is None or other.recipe.calls() != self.recipe.calls():
                return None
            self.recipe.hands_on &= other.recipe.hands_on
        return self.recipe


class Observed(Tensor):
    """A true result that notes who consumes it; it becomes a plain Tensor again when it has been."""

    _trace: Trace
    _at: int

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with no_function():
            if function in QUESTIONS:
                return function(*args, **kwargs)
            first = args[0] if args and type(args[0]) is Observed else None
            step = None if first is None else first._trace.prolong(first, function, args, kwargs)
            if first is None or step is None:
                for value in tree_iter((args, kwargs)):
                    if type(value) is Observed:
                        value.close(patterns.reads_channels_last(function, args, kwargs))
                return function(*args, **kwargs)
            trace = first._trace
            if not step.same_object:  # what autograd saves must not look as if the program held it
                args = (Unowned.apply(first), *args[1:])
            result = function(*args, **kwargs)
            trace.steps.append(step)
            if result is first:  # in place, or an identity
                trace.values[first._at] = _nobody
                first._at += 1
                trace.values.append(weakref.ref(first))
                trace.dtypes.append(first.dtype)
                return result
            return trace.note(result)

    def close(self, hands_on: bool = False) -> None:
        """Become a plain tensor: the chain ends here."""
        trace, at = self._trace, self._at
        self.__class__ = Tensor  # type: ignore[assignment]  # what it was before it was observed
        del self._trace, self._at
        trace.ends_at(at, hands_on)


class Unowned(torch.autograd.Function):
    """The same memory and version behind the same gradient, as a tensor that is no view of the argument."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def _nobody() -> None:
    """In the place of a weak reference to a value that is no more."""
