"""Watching for writes to the operands of speculated calls.

A speculated block runs when the program calls its convolution. If the program later reads a placeholder,
PyTorch's operators compute its value from the convolution's operands, which must not have changed. So a
dispatch mode sees every operator as long as there are placeholders. Before an operator writes to an operand,
the values of the placeholders that the program holds are computed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from cnnlstm_fast.fusion.plan import FusionPlan

#: If more operators than this run between a block's result and the end of its placeholders, the program keeps
#: the placeholders in variables that it does not read. Watching such a program costs more than it gains.
PATIENCE = 8


class Token:
    """Shared by the placeholders of one speculated call; it dies with the last of them."""

    __slots__ = ("__weakref__",)


class Speculated(Protocol):
    """A speculated call, as far as it is watched."""

    plan: FusionPlan

    def reads_any(self, tensors: Iterable[Tensor]) -> bool: ...

    def materialize(self) -> None: ...


class WriteWatch(TorchDispatchMode):
    """The mode of one thread. It is on the thread's stack of modes while there are placeholders.

    Attributes:
        watched: by token, the speculated call, its plan, and the number of operators when its result was
            released, or None before that.
        operators: how many the mode has seen.
        inference: inference mode was active when the mode was pushed.
        multithreading: whether autograd was allowed several threads then.
    """

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self.watched: dict[weakref.ref[Token], tuple[weakref.ref[Speculated], FusionPlan, int | None]] = {}
        self.operators = 0
        self.inference = self.multithreading = False
        self.thread = threading.get_ident()

    def begin(self, speculation: Speculated) -> tuple[Token, weakref.ref[Token]]:
        """Watch a call for as long as its token lives."""
        token = Token()
        ref = weakref.ref(token, self.end)
        if not self.watched and not self._is_active():  # it may have come back, see `_leave`
            self._note_inference_mode()
            torch._C._push_on_torch_dispatch_stack(self)
        self.watched[ref] = weakref.ref(speculation), speculation.plan, None
        return token, ref

    def released(self, ref: weakref.ref[Token]) -> None:
        """Note that a call's result was released; the program should no longer read its placeholders."""
        if ref in self.watched:
            speculation, plan, _ = self.watched[ref]
            if plan.lingers:
                self.end(ref)
            else:
                self.watched[ref] = speculation, plan, self.operators

    def end(self, ref: weakref.ref[Token]) -> None:
        """Stop watching a call."""
        found = self.watched.pop(ref, None)
        if found is None:
            return
        _, plan, since = found
        if since is not None and self.operators - since > PATIENCE:
            plan.lingers = True
        if not (self.watched or self._must_stay()):
            self._leave()

    def _note_inference_mode(self) -> None:
        """Note in which inference mode the mode is pushed, for :meth:`_must_stay`."""
        self.inference = torch.is_inference_mode_enabled()
        if self.inference:
            self.multithreading = torch._C._is_multithreading_enabled()
            torch._C._set_multithreading_enabled(True)

    def _must_stay(self) -> bool:
        """Whether the mode may not leave the stack here, in another inference mode than it was pushed in.

        ``torch.inference_mode`` puts the thread's dispatch keys back as they were when it was entered. They
        say that there are modes, and PyTorch fails where the stack is empty then. An inference mode that is
        entered in another one shows by autograd's threads, which it forbids, and which mean nothing there.
        """
        inference = torch.is_inference_mode_enabled()
        return inference != self.inference or (inference and not torch._C._is_multithreading_enabled())

    def pause(self) -> bool:
        """Leave the stack while our own operators run, if the mode is on top of it; whether it was."""
        active = torch._C._len_torch_dispatch_stack()
        if active == 0 or torch._C._get_dispatch_stack_at(active - 1) is not self:
            return False
        torch._C._pop_torch_dispatch_stack(None)
        return True

    def resume(self) -> None:
        """Enter the stack again, if there is anything to watch, or if the mode may not leave here."""
        if self.watched or self._must_stay():
            torch._C._push_on_torch_dispatch_stack(self)

    def close(self) -> None:
        """Stop watching, at the end of a session."""
        self.watched.clear()
        self._leave()
        if torch._C._len_torch_dispatch_stack() == 0 and _expects_modes():  # see `_must_stay`
            torch._C._push_on_torch_dispatch_stack(self)
            torch._C._pop_torch_dispatch_stack(None)

    def _is_active(self) -> bool:
        for at in range(torch._C._len_torch_dispatch_stack()):
            if torch._C._get_dispatch_stack_at(at) is self:
                return True
        return False

    def _leave(self) -> None:
        """Leave the stack for good.

        While the mode handles an operator, PyTorch takes it off the stack, and puts it back afterwards.
        """
        self._pop()
        if self.inference and torch.is_inference_mode_enabled():
            torch._C._set_multithreading_enabled(self.multithreading)

    def _pop(self) -> None:
        """Take the mode off the stack, wherever in it it is; the program may have entered modes since."""
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
        """Compute the values of all calls that read one of the tensors that will be written."""
        for ref, _, _ in [*self.watched.values()]:
            speculation = ref()
            if speculation is None or not speculation.reads_any(written):
                continue
            with enable_reentrant_dispatch():  # autograd must record what is computed here
                torch._C._push_on_torch_dispatch_stack(self)  # as when the calls began
                try:
                    speculation.materialize()
                finally:
                    self._pop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.operators += 1
        if function not in _WRITTEN:
            _WRITTEN[function] = _written(function)
        if _WRITTEN[function] and self.watched:
            self._materialize(_tensors(_WRITTEN[function], args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():  # a placeholder answers in its __torch_dispatch__
            return function(*args, **kwargs)


def _expects_modes() -> bool:
    """Whether PyTorch takes the stack of modes for not empty."""
    return torch._C._dispatch_tls_is_dispatch_key_included("Python")


#: By operator, position and name of each argument that it writes to.
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
