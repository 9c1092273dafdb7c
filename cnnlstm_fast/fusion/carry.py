"""Carried maps: they lie channels-last from convolution to convolution, where PyTorch's are contiguous.

Convolutions are faster on channels-last images, the library's in training by a third. A whole program gains
nothing if every convolution converts its input, so in a session that carries, maps stay as they lie through
what PyTorch computes as well that way: norms, activations, pools, sums, products, concatenations of channels.
Anything else gets a map in PyTorch's layout.

The first convolution of a session decides by the shape of its input. A session in which all convolutions had
a plan is followed by a rehearsal: maps lie as PyTorch's, and it adds up what carrying would cost and save, as
predicted or timed, and whether anything reads a map past PyTorch's functions, as extensions in C++ do.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from cnnlstm_fast.functional.epilogue import Program, program_of, run_program
from cnnlstm_fast.fusion.calls import Found, Norm, is_sum, read_call
from cnnlstm_fast.fusion.context import context_of, why_watched
from cnnlstm_fast.fusion.layout import like_channels_last
from cnnlstm_fast.fusion.tensors import (
    METADATA,
    alias,
    awaits_sum,
    no_function,
    outside_of_transforms,
)
from cnnlstm_fast.limits import limit
from cnnlstm_fast.planning import costs, rates, tuner
from cnnlstm_fast.planning.support import records_gradients, why_not_norm_tensors

if TYPE_CHECKING:
    from cnnlstm_fast.fusion.writes import WriteWatch

#: Percent of the convolutions' time that carrying must save, where times are predicted.
GAIN_PERCENT = limit("CARRY_GAIN", 3, -(10**6))
#: Microseconds of a call on carried maps, and how many times as much it is with a graph of gradients.
_CALL_US, _WITH_GRAPH = 35.0, 4.0
#: How many shapes of inputs a convolution remembers.
_MEMORY = 256
#: Of images that are carried.
_DTYPES = (torch.float32, torch.bfloat16)


class _Entering(torch.autograd.Function):
    """A contiguous map channels-last, whose gradient is contiguous.

    PyTorch's gradient of ``instance_norm`` is wrong where it gets a channels-last one.
    """

    @staticmethod
    def forward(ctx, x):
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous()


class _Held(torch.autograd.Function):
    """A channels-last map as another tensor over its memory, whose gradient is channels-last, too."""

    @staticmethod
    def forward(ctx, x):
        return x.data  # with a version counter of its own: the memory may be exchanged

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous(memory_format=torch.channels_last)


class Carry:
    """What a session that carries has done so far.

    Attributes:
        writes: the session's watch for writes.
        rehearses: everything lies as PyTorch's. What carrying would cost and save is added up, and who looks.
        inference: whether the session runs in inference mode.
        maps: weak references to the carried maps, and whether each has been read.
        unseen: a map was never read: code may have read its memory that asks nobody.
        saved_us, plain_us: microseconds that convolutions and their blocks save, and those without carrying.
        spent_us: those of conversions, and of calls on carried maps.
    """

    __slots__ = ("inference", "maps", "plain_us", "rehearses", "saved_us", "spent_us", "unseen", "writes")

    def __init__(self, writes: WriteWatch, rehearses: bool = False):
        self.writes, self.rehearses = writes, rehearses
        self.inference = torch.is_inference_mode_enabled()
        self.maps: list[tuple[weakref.ref, list[bool]]] = []
        self.unseen = False
        self.saved_us = self.plain_us = self.spent_us = 0.0

    def memory(self, value: Any) -> Tensor:
        """An image (:func:`is_image`) as it lies, for a call on it, with its place in the autograd graph."""
        if not isinstance(value, CarriedMap):
            return value
        value._seen[0] = True
        with no_function():
            if value.requires_grad and torch.is_grad_enabled():
                return alias(value)
            return value.detach() if value._map is None else value._map

    def read(self, value: Any) -> Tensor:
        """As :meth:`memory`; a plain image is converted."""
        if isinstance(value, CarriedMap):
            return self.memory(value)
        n, c, h, w = value.shape
        if c == 1 or h * w == 1:
            return value if self.rehearses else value.view(n, h, w, c).permute(0, 3, 1, 2)
        self.converts(value)
        return value if self.rehearses else _Entering.apply(value)

    def hold(self, result: Tensor, changeable: bool = False) -> Tensor:
        """A result as a carried map; as a plain tensor where PyTorch's layout and this one are the same.

        Args:
            result: of a call.
            changeable: no backward reads it, PyTorch's neither.
        """
        c, *sizes = result.shape[1:]
        if self.rehearses:
            if c == 1 or len(sizes) != 2 or sizes[0] * sizes[1] == 1 or not result.is_contiguous():
                return result
            carried: Any = result
        else:
            if result.is_contiguous() or not result.is_contiguous(memory_format=torch.channels_last):
                return in_pytorchs_layout(result)
            carried = _Held.apply(result) if result.requires_grad else result.data
        carried.__class__ = CarriedMap
        carried._carry, carried._changeable, carried._seen = self, changeable, [False]
        carried._map = None if self.rehearses else result
        self.note(carried)
        return carried

    def note(self, carried: CarriedMap) -> None:
        """Note an object that is a carried map."""
        self.maps.append((weakref.ref(carried), carried._seen))

    def converts(self, x: Tensor) -> None:
        """Count a conversion."""
        threads = torch.get_num_threads()
        self.spent_us += costs.conversion_us(x.numel(), x.dtype, records_gradients(), rates.here(), threads)

    def calls(self) -> None:
        """Count a call on carried maps."""
        self.spent_us += _CALL_US * (_WITH_GRAPH if records_gradients() else 1.0)

    def may_pass(self) -> bool:
        """Whether nobody would see that other operators run than PyTorch's."""
        return (
            torch.is_inference_mode_enabled() == self.inference and why_watched(self.writes.alone()) is None
        )

    def close(self) -> None:
        """Make every carried map plain that the program still holds."""
        for ref, seen in self.maps:
            value = ref()
            if type(value) is CarriedMap:
                value.leave()
            elif not seen[0]:
                self.unseen = True

    @property
    def gains(self) -> bool:
        """Whether a session like this is faster than one that does not carry."""
        percent = 0 if tuner.enabled else GAIN_PERCENT
        return not self.unseen and self.saved_us - self.spent_us > percent / 100 * self.plain_us


# ---------------------------------------------------------------- which sessions carry


class Decisions:
    """Which sessions carry that begin with a convolution, by the kind of its call."""

    def __init__(self) -> None:
        self.by_kind: dict[tuple, bool | None] = {}  # None: to be rehearsed
        self.latest: dict[tuple, bool] = {}  # by kind without the shape: images of another size are alike

    def begin(self, x: Tensor, training: bool, writes: WriteWatch) -> tuple[tuple | None, Carry | None]:
        """The kind of a session by its first convolution's input, and what it carries with, if it does.

        Args:
            x: the input; the kind is None where it is no image.
            training: of the convolution.
            writes: the session's watch for writes.
        """
        if type(x) is not Tensor or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
            return None, None
        if x.dim() != 4:
            return None, None
        autocast = context_of(x).autocast
        kind = x.shape, training, records_gradients(), tuner.enabled, x.dtype, autocast
        found = self.by_kind.get(kind, self.latest.get(kind[1:], False))
        if found is False or autocast not in (None, *_DTYPES) or not x.numel() or not is_image(x):
            return kind, None
        return kind, Carry(writes, rehearses=found is None)

    def learn(self, kind: tuple, carry: Carry | None) -> None:
        """Learn from a session in which every convolution had a plan."""
        if len(self.by_kind) > _MEMORY:
            self.by_kind.clear()
        if carry is not None and carry.plain_us:
            self.by_kind[kind] = self.latest[kind[1:]] = carry.gains
        elif kind not in self.by_kind:
            self.by_kind[kind] = None


# ---------------------------------------------------------------- what is called on carried maps

_CAT = (torch.cat, torch.concat, torch.concatenate)
_PRODUCTS = (torch.mul, Tensor.mul)


class Passage(NamedTuple):
    """A call whose result is carried on.

    Attributes:
        run: of the tensors that it reads.
        reads: these, carried or not.
        inplace: PyTorch's result is the first of them.
        changeable: no backward reads the result.
        writes: it may write to tensors that existed before.
    """

    run: Callable[..., Tensor]
    reads: tuple
    inplace: bool = False
    changeable: bool = True
    writes: bool = False


def find_passage(
    function: Callable, args: tuple, kwargs: dict[str, Any], found: Found | None
) -> Passage | None:
    """A call as a passage, or None where its carried maps leave."""
    if function in _CAT:
        return _read_cat(args, kwargs)
    if is_sum(function) or function in _PRODUCTS:
        return _read_arithmetic(function, args, kwargs)
    if not args or type(args[0]) is not CarriedMap:
        return None
    if found is None or any([type(value) is CarriedMap for value in (*args[1:], *kwargs.values())]):
        return None
    if isinstance(found.value, Norm):
        return _read_norm(function, args, kwargs, found.value)
    if found.inplace and not args[0]._changeable and not args[0]._carry.rehearses:
        return Passage(found.value, args[:1], True, False)
    changeable = found.part.kind in ("pool", "max_pool")
    run = partial(_call, function, args[1:], kwargs)
    return Passage(run, args[:1], found.inplace, changeable, writes=found.inplace)


#: What :func:`read_call` finds for a function and arguments that are hashed by their values.
_found: dict[tuple, Found | None] = {}


def _read(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Found | None:
    """As :func:`read_call`, remembered where no argument behind the first one is a tensor."""
    rest = *args[1:], *kwargs.values()
    if any([type(value) not in (int, float, bool, str, NoneType) for value in rest]):
        return read_call(function, args, kwargs)
    key = function, len(args), rest, *kwargs
    if key not in _found:
        if len(_found) > _MEMORY:
            _found.clear()
        _found[key] = read_call(function, args, kwargs)
    return _found[key]


def _read_norm(function: Callable, args: tuple, kwargs: dict, norm: Norm) -> Passage | None:
    """PyTorch sums statistics of channels-last batches in float32, and of contiguous ones in float64."""
    x = args[0]
    if not norm.training or x._carry.rehearses:
        return Passage(partial(_call, function, args[1:], kwargs), (x,))
    if any([t is not None and type(t) not in (Tensor, nn.Parameter) for t in norm[:4]]):
        return None
    program = program_of([norm.module(x.shape[1], 4)])
    if not isinstance(program, Program) or program.norm is None:
        return None
    count = x._map.numel() // x.shape[1]
    if why_not_norm_tensors(x.device, x.dtype, program.norm, count) is not None:
        return None
    return Passage(lambda x: run_program(x, program), (x,), writes=True)


def _call(function: Callable, rest: tuple, kwargs: dict[str, Any], x: Tensor) -> Tensor:
    return function(x, *rest, **kwargs)


def _read_cat(args: tuple, kwargs: dict[str, Any]) -> Passage | None:
    given = dict(zip(("tensors", "dim"), args, strict=False)) | kwargs
    tensors, dim = given.get("tensors"), given.get("dim", 0)
    if len(args) > 2 or given.keys() - {"tensors", "dim"} or dim not in (1, -3):
        return None
    if not isinstance(tensors, (list, tuple)) or not all([is_image(t) for t in tensors]):
        return None
    return Passage(lambda *reads: torch.cat(reads, 1), tuple(tensors))


def _read_arithmetic(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Passage | None:
    """A sum or a product of two maps of one shape, or of a map and a number or one number a channel."""
    inplace = function is Tensor.add_
    if len(args) != 2 or kwargs.keys() - {"alpha"} or (inplace and type(args[0]) is not CarriedMap):
        return None
    shapes = [t.shape for t in args if type(t) is CarriedMap]
    for t in args:
        if type(t) in (int, float):
            continue
        if not shapes or not is_image(t):
            return None
        if t.shape != shapes[0] and (t.shape[1] != shapes[0][1] or t.shape[2:].numel() > 1):
            return None
        if inplace and torch.promote_types(t.dtype, args[0].dtype) != args[0].dtype:
            return None
    if inplace:
        function = Tensor.add
    return Passage(partial(function, **kwargs), args, inplace)


def is_image(value: Any) -> bool:
    """Whether a value is a carried map, or a tensor that lies as PyTorch's maps do where it is carried."""
    if type(value) is CarriedMap:
        return True
    if type(value) not in (Tensor, nn.Parameter) or value.dim() != 4 or value.dtype not in _DTYPES:
        return False
    if not value.is_cpu or value.layout is not torch.strided or not value.is_contiguous():
        return False
    return not like_channels_last(value)  # one channel may lie either way


def in_pytorchs_layout(x: Tensor) -> Tensor:
    """A channels-last image as a contiguous one, with those strides where one channel may lie either way."""
    return x.flatten().view(x.shape) if x.is_contiguous() else x.contiguous()


class CarriedMap(Tensor):
    """A map that lies channels-last where PyTorch's is contiguous, until something else looks at it."""

    _carry: Carry
    _map: Tensor | None  # what is read: autograd saves this tensor, and not the one that the program holds
    _seen: list[bool]  # whether a call has read it
    _changeable: bool  # a call in place may overwrite it, as PyTorch's does

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_sum(function) and awaits_sum(args):
            return NotImplemented  # the other operand's class answers
        if function in METADATA:
            with no_function():
                return function(*args, **kwargs)
        others = any([one not in (CarriedMap, Tensor, nn.Parameter) for one in types])
        with no_function():
            found = _read(function, args, kwargs)
            if found is not None and found.part.kind == "identity":  # as dropout in eval mode
                return function(*args, **kwargs)
            passage = None if others else find_passage(function, args, kwargs, found)
            if passage is not None:
                result = _pass(passage)
                if result is not None:
                    return result
            for value in tree_iter((args, kwargs)):
                if type(value) is CarriedMap:
                    value.leave()
            return NotImplemented if others else function(*args, **kwargs)

    def leave(self) -> None:
        """Become a plain tensor in PyTorch's layout."""
        carry = self._carry
        carry.converts(self)
        self._seen[0] = True
        del self._carry, self._map, self._changeable, self._seen
        self.__class__ = Tensor  # type: ignore[assignment]  # from here on the object is plain
        if not carry.rehearses:
            with torch.no_grad(), outside_of_transforms(), torch.inference_mode(carry.inference):
                self.data = self.detach().contiguous()


def _pass(passage: Passage) -> Tensor | None:
    """The result of a passage; None where somebody watches, or C code holds the object that is the result."""
    carry = next(t._carry for t in passage.reads if type(t) is CarriedMap)
    first = passage.reads[0]
    if not carry.may_pass():
        return None
    if passage.inplace and (first._use_count() > 1 or (first.requires_grad and not torch.is_grad_enabled())):
        return None
    reads = [carry.read(t) if is_image(t) and t.shape[2:].numel() > 1 else t for t in passage.reads]
    carry.calls()
    watching = not passage.writes and carry.writes.pause()
    try:
        result = carry.hold(passage.run(*reads), passage.changeable)
    finally:
        if watching:
            carry.writes.resume()
    if not passage.inplace:
        return result
    torch._C._swap_tensor_impl(first, result)
    first.__dict__.clear()
    first.__dict__.update(result.__dict__)
    first.__class__ = type(result)
    return first
