"""Convolutions that a rule leaves to PyTorch carry no hook while their model runs.

A hook costs microseconds a call even where it does nothing, which is a tenth of a model of many tiny layers.
The accelerated model itself has a pair of hooks, :class:`Rest` and :class:`Wake`, of which the first takes
those of its convolutions away that had nothing to do in earlier calls like this one, and the second puts
them back: whoever calls a part of the model finds it as it is. Some calls are watched, the first ones and
later each :data:`WATCHED`-th. Where a resting convolution would have had something to do after all, time is
lost, never the answer.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cnnlstm_fast import plans
from cnnlstm_fast.capture import HOOK, MEMORY, Capture

#: Convolutions that a model must have: the pair of hooks has its price too.
LEAST = 8
#: Calls alike of which all hooks are kept: the first ones, and then each so many-th.
FIRST, WATCHED = 4, 64


class _Site:
    """A convolution whose hook may be taken away."""

    __slots__ = ("attributes", "capture", "hooks", "none")

    def __init__(self, module: nn.Module, capture: Capture):
        self.attributes, self.capture = module.__dict__, capture
        self.hooks = module._forward_pre_hooks
        # Another dictionary, not a changed one, which a thread may be reading.
        self.none: OrderedDict[Any, Any] = OrderedDict()

    def rest(self) -> None:
        if self.attributes["_forward_pre_hooks"] is self.hooks and len(self.hooks) == 1:
            self.attributes["_forward_pre_hooks"] = self.none

    def wake(self) -> None:
        if self.none:  # somebody has set a hook meanwhile, whose handle knows this dictionary
            self.none.setdefault(HOOK, self.capture)
        elif self.attributes["_forward_pre_hooks"] is self.none:
            self.attributes["_forward_pre_hooks"] = self.hooks


class _Habit:
    """Calls alike: how many there were, and what rests in the next one."""

    __slots__ = ("calls", "resting")

    def __init__(self) -> None:
        self.calls = 0
        self.resting: list[_Site] = []


class Rest:
    """The forward pre-hook, with keyword arguments, of an accelerated model.

    A copy of it, by whatever way, knows nothing yet.
    """

    def __init__(self) -> None:
        self.sites: list[_Site] | None = None
        self.habits: dict[tuple, _Habit] = {}
        self.resting: dict[int, list[_Site]] = {}  # by thread
        self.watched: dict[int, _Habit] = {}

    def __reduce__(self):
        return Rest, ()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling():
            return
        self.wake()  # an earlier call may have been interrupted
        if plans.observer is not None or torch.jit.is_tracing():
            return
        if self.sites is None:
            self.sites = [
                _Site(m, capture)
                for m in module.modules()
                if isinstance(capture := m._forward_pre_hooks.get(HOOK), Capture)  # type: ignore[call-overload]
            ]
        key = self._key(args, kwargs)
        if key is None:
            return
        habit = self.habits.get(key)
        if habit is None:
            if len(self.habits) >= MEMORY:
                self.habits.clear()
            habit = self.habits[key] = _Habit()
        habit.calls += 1
        thread = threading.get_ident()
        if habit.calls <= FIRST or habit.calls % WATCHED == 0:
            for site in self.sites:
                site.wake()
                site.capture.idle = site.capture.busy = False
            self.watched[thread] = habit
        elif habit.resting:
            self.resting[thread] = habit.resting
            for site in habit.resting:
                site.rest()

    def _key(self, args: tuple, kwargs: dict) -> tuple | None:
        """What calls alike have in common; None for inputs that are not looked into."""
        assert self.sites is not None
        key: list[Any] = [site.attributes["training"] for site in self.sites]
        key += (torch.is_grad_enabled(), torch._C._is_any_autocast_enabled(), *kwargs)
        try:
            _describe((*args, *kwargs.values()), key)
            found = tuple(key)
            hash(found)
        except (RuntimeError, TypeError):  # no strides (sparse, nested), no hash (symbols), other objects
            return None
        return found

    def wake(self) -> None:
        """End this thread's call."""
        thread = threading.get_ident()
        for site in self.resting.pop(thread, ()):
            site.wake()
        habit = self.watched.pop(thread, None)
        if habit is not None and self.sites is not None:
            habit.resting = [site for site in self.sites if site.capture.idle and not site.capture.busy]


def _describe(values: Iterable, key: list) -> None:
    for value in values:
        if isinstance(value, Tensor):
            key += (value.shape, value.stride(), value.dtype)
        elif isinstance(value, (tuple, list)):
            key.append(len(value))
            _describe(value, key)
        elif value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
            key.append(value)
        else:  # not to be kept alive
            raise TypeError(type(value))


class Wake:
    """The forward hook of an accelerated model, called whatever happens; of the same :class:`Rest`."""

    def __init__(self, rest: Rest):
        self.rest = rest

    def __call__(self, module: nn.Module, args: tuple, result: Any) -> None:
        if not torch.compiler.is_compiling():
            self.rest.wake()


def let_rest(model: nn.Module) -> None:
    """Give an accelerated model its pair of hooks, if it has convolutions enough."""
    found = [m for m in model.modules() if HOOK in m._forward_pre_hooks]
    if len(found) < LEAST:
        return
    rest = Rest()
    hooks: Any = model
    hooks._forward_pre_hooks[HOOK] = rest
    hooks._forward_pre_hooks_with_kwargs[HOOK] = True
    hooks._forward_hooks[HOOK] = Wake(rest)
    hooks._forward_hooks_always_called[HOOK] = True
