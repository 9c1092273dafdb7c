"""Sees writes to what a speculated block was computed from, before they happen.

A block has run when the program has only called its convolution. Should the program then ask for a value
between, PyTorch's operators compute it from the convolution's operands, which must still be what they were.
So while such a value may be asked for, a mode sees every operator: before one writes to an operand, the
values that somebody holds are computed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from cnnlstm_fast.fusion.plan import FusionPlan
    from cnnlstm_fast.fusion.speculate import Speculation

#: So many operators between a block's result and the end of its placeholders say that the program keeps
#: them in variables which it does not read: watching it costs more than it is worth.
PATIENCE = 8


class Token:
    """What the placeholders of one speculated call share: it ends with the last of them."""

    __slots__ = ("__weakref__",)


class WriteWatch(TorchDispatchMode):
    """Of one session, on its thread's stack of modes while placeholders live.

    Attributes:
        speculations: of the session, as weak references.
        watched: by token, the plan of its call and how many operators there had been when the result was
            released, or None before that.
        operators: how many were seen.
    """

    supports_higher_order_operators = True

    def __init__(self, speculations: list[weakref.ref[Speculation]]):
        super().__init__()
        self.speculations = speculations
        self.watched: dict[weakref.ref[Token], tuple[FusionPlan, int | None]] = {}
        self.operators = 0
        self.thread = threading.get_ident()

    def begin(self, plan: FusionPlan) -> tuple[Token, weakref.ref[Token]]:
        """Watch a call from now on, as long as its token lives."""
        token = Token()
        ref = weakref.ref(token, self.end)
        if not self.watched and self not in modes():
            torch._C._push_on_torch_dispatch_stack(self)
        self.watched[ref] = plan, None
        return token, ref

    def released(self, ref: weakref.ref[Token]) -> None:
        """The result is: from now on nobody is expected to read the placeholders."""
        if ref in self.watched:
            plan, _ = self.watched[ref]
            if plan.lingers:
                self.end(ref)
            else:
                self.watched[ref] = plan, self.operators

    def end(self, ref: weakref.ref[Token]) -> None:
        """A call has nothing more to lose."""
        found = self.watched.pop(ref, None)
        if found is None:
            return
        plan, since = found
        if since is not None and self.operators - since > PATIENCE:
            plan.lingers = True
        if not self.watched:
            self._leave()

    def close(self) -> None:
        """The session ends."""
        self.watched.clear()
        self._leave()

    def _leave(self) -> None:
        """Leave the stack, from wherever in it: a mode of the program's may have been entered since.

        While an operator is looked at the mode is off the stack, and comes back behind it.
        """
        if threading.get_ident() != self.thread or self not in modes():
            return
        above = []
        while (mode := torch._C._pop_torch_dispatch_stack(None)) is not self:
            above.append(mode)
        for mode in reversed(above):
            torch._C._push_on_torch_dispatch_stack(mode)

    def alone(self) -> bool:
        """Whether no other mode is active in this thread."""
        active = torch._C._len_torch_dispatch_stack()
        return active == 0 or (active == 1 and torch._C._get_dispatch_stack_at(0) is self)

    def _materialize(self, speculation: Speculation) -> None:
        """Let a call compute its values as if the operator that is about to run had not been called yet."""
        with enable_reentrant_dispatch():  # autograd is to see what is computed here
            torch._C._push_on_torch_dispatch_stack(self)  # as it was then
            try:
                speculation.materialize()
            finally:
                self._leave()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.operators += 1
        written = list(written_by(function, args, kwargs))
        if written:
            for ref in self.speculations:
                speculation = ref()
                if speculation is not None and speculation.reads_any(written):
                    self._materialize(speculation)
        with torch._C.DisableTorchFunctionSubclass():  # a placeholder among the arguments is asked below
            return function(*args, **kwargs)


def modes() -> list[TorchDispatchMode]:
    """Those that are active in this thread, the outermost first."""
    return [torch._C._get_dispatch_stack_at(i) for i in range(torch._C._len_torch_dispatch_stack())]


def written_by(function: Any, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """The arguments that an operator writes to; all of them where it does not say."""
    if function not in _WRITTEN:
        _WRITTEN[function] = _written(function)
    for at, name in _WRITTEN[function] or ():
        value = args[at] if at < len(args) else kwargs.get(name)
        yield from (value,) if isinstance(value, Tensor) else value or ()


_WRITTEN: dict[Callable, tuple[tuple[int, str], ...]] = {}


def _written(function: Any) -> tuple[tuple[int, str], ...]:
    schema = getattr(function, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    return tuple(
        (at, argument.name)
        for at, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
