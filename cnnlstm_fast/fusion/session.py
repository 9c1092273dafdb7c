"""Sessions: the outermost ``forward`` of an accelerated model, inside of which calls are speculated.

A session holds what the calls of its thread have not finished yet. Two hooks on the model begin and end it.
The second hook runs after an exception, too.
"""

from __future__ import annotations

import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from cnnlstm_fast.fusion.writes import WriteWatch

if TYPE_CHECKING:
    from cnnlstm_fast.fusion.carry import Carry, Decisions

#: The key of our hooks in a module's dictionaries. It is a string, because PyTorch's own keys are numbers
#: from a counter that starts again in each process.
HOOK = "cnnlstm_fast"


class Unfinished(Protocol):
    """What a session ends when it ends itself."""

    def close(self) -> None: ...


class Session:
    """What the running ``forward`` has not finished yet.

    Attributes:
        entered: the models whose ``forward`` runs, the outermost first.
        observations: calls that are observed.
        speculations: weak references to calls that are speculated.
        carry: of a session whose maps lie channels-last (:mod:`~cnnlstm_fast.fusion.carry`), or None.
        decisions: who decides whether such sessions carry, and the kind of this one; None before an image.
        settled: every convolution had a plan.
        writes: watches for writes to the operands of speculated calls.
    """

    __slots__ = ("carry", "decisions", "entered", "observations", "settled", "speculations", "writes")

    def __init__(self) -> None:
        self.entered: list[nn.Module] = []
        self.observations: list[Unfinished] = []
        self.speculations: list[weakref.ref] = []
        self.carry: Carry | None = None
        self.decisions: tuple[Decisions, tuple] | None = None
        self.settled = True
        self.writes = _local.writes

    def close(self) -> None:
        """Make every tensor plain that the program still holds."""
        self.writes.close()
        for observation in self.observations:
            observation.close()
        for ref in self.speculations:
            speculation = ref()
            if speculation is not None:
                speculation.close()
        if self.carry is not None:
            self.carry.close()
        if self.decisions is not None and self.settled:
            decisions, kind = self.decisions
            decisions.learn(kind, self.carry)


class _Local(threading.local):
    session: Session | None = None

    def __init__(self) -> None:
        self.writes = WriteWatch()


_local = _Local()


def current() -> Session | None:
    """This thread's session, or None outside of any."""
    return _local.session


def begin(module: nn.Module, args: tuple) -> None:
    """The forward pre-hook of an accelerated model: begin a session, or enter the one that runs."""
    if torch.compiler.is_compiling():
        return
    session = _local.session
    if session is not None and not _runs(session.entered):
        session.close()  # PyTorch runs no hook after a KeyboardInterrupt, so the session did not end
        session = None
    if session is None:
        session = _local.session = Session()
    session.entered.append(module)


def end(module: nn.Module, args: tuple, result: Any) -> None:
    """The forward hook of an accelerated model, which is always called: end the outermost session."""
    if torch.compiler.is_compiling():
        return
    session = _local.session
    if session is not None and session.entered:
        session.entered.pop()
        if not session.entered:
            _local.session = None
            session.close()


_CALL = nn.Module._call_impl.__code__


def callers(depth: int) -> list[nn.Module]:
    """The modules whose ``__call__`` runs in this thread, the innermost first."""
    found, frame = [], sys._getframe(depth)
    while frame is not None:
        if frame.f_code is _CALL:
            found.append(frame.f_locals["self"])
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _runs(entered: list[nn.Module]) -> bool:
    """Whether all calls that entered a session still run, not counting the one that begins now."""
    calls = [id(m) for m in callers(3)][1:]
    return all(calls.count(id(m)) >= entered.count(m) for m in entered)


# ---------------------------------------------------------------- what a model carries

_SCRIPTABLE = "__prepare_scriptable__"


class Scriptable:
    """``__prepare_scriptable__`` of a module: gives ``torch.jit.script`` a module without our attributes.

    Its presence also marks the module as part of an accelerated model.
    """

    def __init__(self, module: nn.Module):
        self.module = weakref.ref(module)

    def __reduce__(self):
        return Scriptable, (self.module(),)

    def __call__(self) -> nn.Module:
        """A plain module over the same children, which ``torch.jit.script`` prepares in turn."""
        module: Any = self.module()
        kind: Any = getattr(type(module), "twin", type(module))
        plain = kind.__new__(kind)
        plain.__dict__.update(
            (name, value.copy() if isinstance(value, dict) else value)
            for name, value in module.__dict__.items()
            if name not in (_SCRIPTABLE, "_conv_forward", "report")
        )
        unwatch(plain)
        return plain


def mark(module: nn.Module) -> None:
    """Mark a module as part of an accelerated model."""
    module.__dict__[_SCRIPTABLE] = Scriptable(module)


def watch(module: nn.Module) -> None:
    """Make each outermost call of ``module`` a session."""
    hooks: Any = module
    hooks._forward_pre_hooks[HOOK] = begin
    hooks._forward_hooks[HOOK] = end
    hooks._forward_hooks_always_called[HOOK] = True


def unwatch(module: nn.Module) -> None:
    hooks: Any = module
    for found in (hooks._forward_pre_hooks, hooks._forward_hooks, hooks._forward_hooks_always_called):
        found.pop(HOOK, None)


def watch_caller(module: nn.Module) -> None:
    """Make calls of the outermost accelerated module that is calling ``module`` sessions from now on.

    For parts of a model that the program calls by themselves.
    """
    for caller in reversed(callers(2)):
        if caller is not module and isinstance(caller.__dict__.get(_SCRIPTABLE), Scriptable):
            if any(m is module for m in caller.modules()):
                watch(caller)
                return
