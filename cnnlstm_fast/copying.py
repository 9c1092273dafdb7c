"""``copy.deepcopy`` of a model whose tensors are shared, and what cannot be copied with them."""

from __future__ import annotations

import collections
import copy
import copyreg
import functools
import gc
import types
import weakref
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["copy_sharing_tensors", "held_modules"]

#: Types without parts to copy.
_ATOMIC = (
    type, types.FunctionType, types.BuiltinFunctionType, types.CodeType, property, str, bytes, range,
    int, float, complex, type(None),
)  # fmt: skip
#: Types that a copy shares: all kinds of tensors, and objects from which the whole program can be reached.
_SHARED = (
    Tensor, torch.UntypedStorage, torch.TypedStorage, torch.ScriptObject, torch.jit.ScriptModule,
    types.ModuleType, types.FrameType, types.TracebackType,
)  # fmt: skip
#: Types that are copied whatever they hold, because their copying does not depend on their parts.
_CONTAINERS = (
    list, tuple, dict, set, frozenset, collections.OrderedDict, collections.defaultdict, collections.deque,
    functools.partial, types.MethodType,
)  # fmt: skip
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
_WEAK_DICTS = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
_WEAK = (weakref.ref, weakref.WeakMethod, *_PROXIES, *_WEAK_DICTS)
#: The dictionaries that every module has.
_PARTS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))


def copy_sharing_tensors(model: nn.Module) -> nn.Module:
    """A copy of ``model`` by ``copy.deepcopy``, over the same parameters, buffers and other tensors.

    Beside what ``copy.deepcopy`` does:

    - Tensors, storages, TorchScript modules and TorchScript objects are shared, even if a module has a
      ``__deepcopy__`` of its own. The dictionaries of buffers are shared too, so that ``.to()`` of one model
      changes both.
    - An object that cannot be copied (it holds a lock, a file, a stream or a thread) is shared whole. If it
      refers to a module of the model, or to a dictionary of one, the copy gets an object of its own, which
      refers to the copied module and shares only the part that cannot be copied.
    - Weak references, proxies and dictionaries that refer to a part of the model refer to its copy.
    - What ``torch.compile`` put around a module's call or methods is left out.
    - Attributes, hooks and children that a module's own ``__deepcopy__`` or ``__getstate__`` leaves out are
      copied too.

    ``model`` does not change. The result is ``model`` itself if it cannot be copied.
    """
    held = _Held(model)
    memo = _Memo(held)
    for module in reversed(
        held.modules
    ):  # the innermost first, so that deep nesting does not overflow the stack
        copy.deepcopy(module, memo)
    result = copy.deepcopy(model, memo)
    pairs = [(module, memo[id(module)]) for module in held.modules if id(module) in memo]
    seen: set[int] = set()
    for module, twin in pairs:
        if id(twin) in seen or id(twin) in held.things or not issubclass(type(twin), nn.Module):
            continue
        seen.add(id(twin))
        _complete(module, twin, memo)
        pairs += [(child, twin._modules[name]) for name, child in module._modules.items()]
    return result


def held_modules(model: nn.Module) -> list[nn.Module]:
    """All modules that ``model`` holds, also in containers and attributes: each once, ``model`` first."""
    return _Held(model).modules


class _Held:
    """All objects that can be reached from an object.

    Attributes:
        things: by id, the nearest first.
        modules: the modules among them, without TorchScript's, the nearest first.
        knowing: ids of objects from which a module, or a dictionary of one, can be reached.
    """

    def __init__(self, root: Any):
        self.things: dict[int, Any] = {id(root): root}
        holders: dict[int, list[int]] = {}
        queue = [root]
        for thing in queue:  # the loop appends to it
            for value in _referents(thing):
                key = id(value)
                holders.setdefault(key, []).append(id(thing))
                if key not in self.things:
                    self.things[key] = value
                    queue.append(value)
        for key, thing in self.things.items():
            if _is_weak(thing):
                meant = _meant_by(thing)
                meant = meant.__self__ if type(meant) is types.MethodType else meant
                holders.setdefault(id(meant), []).append(key)
        self.modules = [
            m for m in queue if issubclass(type(m), nn.Module) and not issubclass(type(m), _SHARED)
        ]
        self.knowing = set(map(id, self.modules))
        for module in self.modules:
            self.knowing |= {id(module.__dict__), *(id(module.__dict__.get(name)) for name in _PARTS)}
        self.knowing.discard(id(None))
        leading = list(self.knowing)
        for key in leading:  # the loop appends to it
            new = set(holders.get(key, ())) - self.knowing
            self.knowing |= new
            leading += new


def _referents(thing: Any) -> list:
    if issubclass(type(thing), _SHARED):
        return []
    held = [thing.__wrapped__] if _is_compiled(thing) else gc.get_referents(thing)
    return [x for x in held if not issubclass(type(x), _ATOMIC) or _is_compiled(x)]


def _is_compiled(thing: Any) -> bool:
    """Whether a function is one that ``torch.compile`` has put around another one."""
    return (
        type(thing) is types.FunctionType
        and "__wrapped__" in thing.__dict__
        and str(thing.__globals__.get("__name__")).startswith("torch._dynamo.")
    )


def _is_weak(thing: Any) -> bool:
    return issubclass(type(thing), weakref.ref) or type(thing) in _PROXIES


def _meant_by(weak: Any) -> Any:
    """The object to which a weak reference or proxy refers; None if it no longer exists."""
    if type(weak) not in _PROXIES:
        return weak()
    try:
        return weak.__init__.__self__  # a proxy does not give its object, only the object's attributes
    except (ReferenceError, AttributeError):
        return None


class _Memo(dict):
    """The memo of one ``copy.deepcopy``, which looks here for each object before it copies it."""

    def __init__(self, held: _Held):
        super().__init__()
        self[id(self)] = []  # where deepcopy keeps its originals alive; stays when a copy is undone
        self.held = held
        self.underway: set[int] = set()
        self.whole = False  # a part is being copied of something that is copied or shared as a whole
        for thing in held.things.values():
            if issubclass(type(thing), _SHARED):
                self._share(thing)
                if issubclass(type(thing), Tensor):
                    with torch._C.DisableTorchFunctionSubclass():
                        self._share(thing._backward_hooks)
                        self._share(thing._post_accumulate_grad_hooks)
        for module in held.modules:
            if module.__dict__.get("_buffers"):
                self._share(module._buffers)

    def _share(self, thing: Any) -> None:
        self[id(thing)] = thing

    def get(self, key, default=None):
        if key not in self and key not in self.underway and key in self.held.things:
            thing = self.held.things[key]
            if type(thing) in _WEAK or _is_compiled(thing):
                self[key] = self._redirected(thing)
            elif not self.whole and type(thing) not in _CONTAINERS:
                self._copy(key, thing)
        return super().get(key, default)

    def _copy(self, key: int, thing: Any) -> None:
        """Copy a thing, or share it if that fails."""
        knows, size = key in self.held.knowing, len(self)
        self.underway.add(key)
        self.whole = not knows
        try:
            self[key] = copy.deepcopy(thing, self)
        except Exception as error:
            if knows and isinstance(error, RecursionError):
                raise  # another thing is the one that cannot be copied
            while len(self) > size:  # remove what refers to the unfinished copy
                self.popitem()
            self._share(thing)
            if not knows:
                self._share_parts(thing)
        finally:
            self.whole = False
            self.underway.remove(key)

    def _share_parts(self, thing: Any) -> None:
        """Share all that a shared thing holds, so that other holders see the same objects."""
        queue = [thing]
        for thing in queue:  # the loop appends to it
            for value in _referents(thing):
                if id(value) not in self:
                    self._share(value)
                    queue.append(value)

    def _redirected(self, thing: Any) -> Any:
        """A weak reference, proxy or dictionary of the model's copies; the function inside a compiled one."""
        if _is_compiled(thing):
            original = self._twin(thing.__wrapped__)
            return thing if original is thing.__wrapped__ else original
        if type(thing) in _WEAK_DICTS:
            twin = type(thing)()
            self[id(thing)] = twin  # before the loop, since a dictionary may hold itself
            for key, value in list(thing.items()):
                twin[self._twin(key)] = self._twin(value)
            return twin
        meant = _meant_by(thing)
        twin = self._twin(meant)
        if meant is None or twin is meant:
            return thing
        if type(thing) in _PROXIES:
            return weakref.proxy(twin)
        if type(thing) is weakref.WeakMethod:
            return weakref.WeakMethod(twin)
        return weakref.ref(twin, copy.deepcopy(thing.__callback__, self))

    def _twin(self, thing: Any) -> Any:
        """The copy of a thing that the model holds; any other thing itself."""
        held = id(thing) in self.held.things or (
            type(thing) is types.MethodType and id(thing.__self__) in self.held.things
        )
        return copy.deepcopy(thing, self) if held else thing


def _complete(module: nn.Module, twin: nn.Module, memo: _Memo) -> None:
    """Give a copy what its module's own ``__deepcopy__`` or ``__getstate__`` left out or made anew."""
    ours, theirs = twin.__dict__, module.__dict__
    ours.pop("_compiled_call_impl", None)
    for name, value in list(theirs.items()):
        if name not in ours or (name in _PARTS and not ours[name] and value):
            if name != "_compiled_call_impl":
                ours[name] = copy.deepcopy(value, memo)
    for name in copyreg._slotnames(type(module)):  # type: ignore[attr-defined]  # as copy itself does
        if hasattr(module, name) and not hasattr(twin, name):
            setattr(twin, name, copy.deepcopy(getattr(module, name), memo))
    twin._parameters.update(module._parameters)
    if module._buffers:
        ours["_buffers"] = module._buffers
    for name, child in module._modules.items():
        if name not in twin._modules:
            twin._modules[name] = copy.deepcopy(child, memo)
