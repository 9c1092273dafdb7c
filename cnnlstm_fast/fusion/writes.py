"""Sees writes to what a speculated block was computed from, before they happen.

A block has run when the program has only called its convolution. Should the program then ask for a value
between, PyTorch's operators compute it from the convolution's operands, which must still be what they were.
So while such a value may be asked for, a mode sees every operator: before one writes to an operand, the
values that somebody holds are computed.
"""

from __future__ import annotations

import threading
import weakref
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
    """Of one thread, on its stack of modes while placeholders live that may be asked for a value.

    Attributes:
        watched: by token, the speculated call, its plan and how many operators there had been when the result
            was released, or None before that.
        operators: how many were seen.
    """

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self.watched: dict[weakref.ref[Token], tuple[weakref.ref[Speculation], FusionPlan, int | None]] = {}
        self.operators = 0
        self.thread = threading.get_ident()

    def begin(self, speculation: Speculation) -> tuple[Token, weakref.ref[Token]]:
        """Watch for a call from now on, as long as its token lives."""
        token = Token()
        ref = weakref.ref(token, self.end)
        if not self.watched and not self._is_active():  # it may have come back, see `_leave`
            torch._C._push_on_torch_dispatch_stack(self)
        self.watched[ref] = weakref.ref(speculation), speculation.plan, None
        return token, ref

    def released(self, ref: weakref.ref[Token]) -> None:
        """The result is: from now on nobody is expected to read the placeholders."""
        if ref in self.watched:
            speculation, plan, _ = self.watched[ref]
            if plan.lingers:
                self.end(ref)
            else:
                self.watched[ref] = speculation, plan, self.operators

    def end(self, ref: weakref.ref[Token]) -> None:
        """A call has nothing more to lose."""
        found = self.watched.pop(ref, None)
        if found is None:
            return
        _, plan, since = found
        if since is not None and self.operators - since > PATIENCE:
            plan.lingers = True
        if not self.watched:
            self._leave()

    def pause(self) -> bool:
        """Look away while our own operators run; whether there is something to :meth:`resume`."""
        active = torch._C._len_torch_dispatch_stack()
        if active == 0 or torch._C._get_dispatch_stack_at(active - 1) is not self:
            return False
        torch._C._pop_torch_dispatch_stack(None)
        return True

    def resume(self) -> None:
        if self.watched:
            torch._C._push_on_torch_dispatch_stack(self)

    def close(self) -> None:
        """The session ends."""
        self.watched.clear()
        self._leave()

    def _is_active(self) -> bool:
        for at in range(torch._C._len_torch_dispatch_stack()):
            if torch._C._get_dispatch_stack_at(at) is self:
                return True
        return False

    def _leave(self) -> None:
        """Leave the stack, from wherever in it: a mode of the program's may have been entered since.

        While an operator is looked at the mode is off the stack, and comes back behind it.
        """
        if threading.get_ident() != self.thread or not self._is_active():
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

    def _materialize(self, written: list[Tensor]) -> None:
        """Let calls that read what will be written to compute their values first."""
        for ref, _, _ in [*self.watched.values()]:
            speculation = ref()
            if speculation is None or not speculation.reads_any(written):
                continue
            with enable_reentrant_dispatch():  # autograd is to see what is computed here
                torch._C._push_on_torch_dispatch_stack(self)  # as it was then
                try:
                    speculation.materialize()
                finally:
                    self._leave()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.operators += 1
        if function not in _WRITTEN:
            _WRITTEN[function] = _written(function)
        if _WRITTEN[function] and self.watched:
            self._materialize(_tensors(_WRITTEN[function], args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():  # a placeholder among the arguments is asked below
            return function(*args, **kwargs)


#: Which arguments an operator writes to, by position and name.
_WRITTEN: dict[Any, tuple[tuple[int, str], ...]] = {}


def _written(function: Any) -> tuple[tuple[int, str], ...]:
    schema = getattr(function, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    return tuple(
        (at, argument.name)
        for at, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _tensors(written: tuple[tuple[int, str], ...], args: tuple, kwargs: dict) -> list[Tensor]:
    found: list[Tensor] = []
    for at, name in written:
        value = args[at] if at < len(args) else kwargs.get(name)
        found += (value,) if isinstance(value, Tensor) else value or ()
    return found
