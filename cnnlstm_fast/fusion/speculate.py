"""The block runs where its convolution stands; its values are handed out as they are asked for."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map

from cnnlstm_fast import patterns
from cnnlstm_fast.fusion.handoff import Unviewed, hand_on
from cnnlstm_fast.fusion.observe import QUESTIONS, Unowned, no_function
from cnnlstm_fast.fusion.recipe import Context, Recipe, Sized, context_of, fingerprint, hooked
from cnnlstm_fast.fusion.session import Session
from cnnlstm_fast.fusion.writes import Token
from cnnlstm_fast.patterns import Conv, Norm


class Chain:
    """One speculated call: the block's result, and how far along the recipe the program has come.

    Attributes:
        site: whom to tell of a surprise.
        at: the value at hand: 0 is the convolution's, ``at`` that of the recipe's step ``at - 1``.
        result: the block's, until the last step gives it out.
        norm: the norm's arguments, as they were expected and then as they were given.
        mark, read: of the norm's tensors, as the block has read them, and copies.
        batch: mean and unbiased variance of the batch, until the norm is called.
        versions: of the convolution's operands.
        values: weak references to all placeholders.
        ready: those that are not given out yet, the next one last.
        history: what the gradients need of it, or None where there are none.
        done: the result is given out, or never will be.
        token: under which the session watches for writes to its operands.
        quiet: see :meth:`undisturbed`.
    """

    __slots__ = (
        "__weakref__", "at", "batch", "context", "conv", "done", "function", "handed", "history",
        "mark", "norm", "quiet", "read", "ready", "recipe", "result", "session", "site", "sized",
        "token", "values", "versions", "x",
    )  # fmt: skip

    def __init__(
        self, site, session: Session, recipe: Recipe, sized: Sized, context: Context, function, x: Tensor,
        conv: Conv, handed: bool,
    ):  # fmt: skip
        self.site, self.session, self.recipe, self.sized, self.context = site, session, recipe, sized, context
        self.function, self.x, self.conv, self.handed = function, x, conv, handed
        self.at = 0
        self.norm: Norm | None = recipe.norm
        self.mark: tuple | None = None
        self.read: list[Tensor | None] = []
        self.batch: tuple[Tensor, Tensor] | None = None
        self.history: History | None = None
        self.values: list[weakref.ref] = []
        self.ready: list[Deferred] = []
        self.done = self.quiet = False
        self.token: weakref.ref[Token] | None = None
        self.versions = _versions(x, *conv[:2])
        self.result: Tensor | None = self._run()

    def _run(self) -> Tensor:
        """The whole block, on what its operands are now; running statistics wait for the norm's call."""
        norm, module = self.norm, None
        if norm is not None:
            self.mark = fingerprint(norm.read)
            self.read = [None if t is None else t.detach().clone() for t in norm.read]
            if norm.training and norm.running_mean is not None:
                self.batch = (torch.zeros_like(norm.running_mean), torch.zeros_like(norm.running_var))  # type: ignore[arg-type]
                norm = norm._replace(running_mean=self.batch[0], running_var=self.batch[1], momentum=1.0)
            module = norm.module(self.conv.weight.shape[0], self.x.dim())
        parts = module, self.recipe.activation, self.recipe.pool
        sized = self.sized
        result = patterns.run_block(self.x, self.conv, *parts, layout=sized.layout, decision=sized.decision)
        if sized.hands_on and result.is_contiguous():  # a map of one place or channel, in PyTorch's strides
            result = result.flatten().view(result.shape)
        return result

    def first(self) -> Tensor:
        """What the convolution returns: a placeholder, or the result of a block of one convolution."""
        if not self.recipe.steps:
            return cast(Tensor, self._give_out(None))
        operands = self._operands()
        if self.context.grad and any([t is not None and t.requires_grad for t in operands]):
            self.history = History(self, operands)
            with self.undisturbed():
                self.ready = list(Promise.apply(self.history, *operands))
        else:
            self.ready = self.bare("sizes")
        self.values = [weakref.ref(value) for value in self.ready]
        self.session.chains.append(weakref.ref(self))
        token, self.token = self.session.writes.begin(self.recipe)
        for value in self.ready:
            value._token = token
        self.ready.reverse()
        return self.ready.pop()

    def _operands(self) -> tuple[Tensor | None, ...]:
        """Input, weight and bias, and the norm's weight and bias."""
        return (self.x, *self.conv[:2], *(() if self.norm is None else self.norm[2:4]))

    def bare(self, asks: str) -> list[Deferred]:
        """Placeholders without a history. Where C code asks for device or ``asks``, they get memory."""
        found, device = [], self.x.device
        for slot, place in enumerate(self.recipe.places):
            shape, stride = self.sized.shapes[place]
            value: Deferred = Tensor._make_wrapper_subclass(
                Deferred, shape, strides=stride, dtype=self.recipe.dtypes[place], device=device,
                dispatch_device=True, dispatch_sizes_strides_policy=asks,
            )  # fmt: skip
            torch._C._set_throw_on_mutable_data_ptr(value)  # who asks for neither gets an error, not a crash
            value._chain, value._at, value._slot = self, place, slot
            found.append(value)
        return found

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Whoever asks a placeholder for device or sizes meanwhile does not want its values."""
        self.quiet = True
        try:
            yield
        finally:
            self.quiet = False

    def follow(self, value: Deferred, function, args, kwargs) -> Tensor | None:
        """The result of a call that was expected, or None."""
        at = self.at
        if self.done or value._at != at:
            return None
        steps = self.recipe.steps
        step = steps[at]
        if function is not step.function or context_of(self.x) != self.context or hooked():
            return None
        if step.kind == "norm":
            if not self._norm_as_expected(args, kwargs):
                return None
        elif args[1:] != step.args or kwargs != step.kwargs:
            return None
        if at + 1 == len(steps):
            return self._give_out(value if step.same_object else None)
        self.at = at + 1
        if step.same_object:
            value._at = at + 1
            return value
        return self.ready.pop()

    def _norm_as_expected(self, args, kwargs) -> bool:
        """Whether a norm's call reads what the block has read; if so its running statistics count now."""
        expected = self.norm
        assert expected is not None
        try:
            given = Norm(*args[1:], **kwargs)
        except TypeError:
            return False
        if given.training != expected.training or given.eps != expected.eps:
            return False
        if any([a is not b for a, b in zip(given[:4], expected[:4], strict=True)]):
            self.recipe.norm = given  # of the next call it may be right
            return False
        if self.mark is None or fingerprint(given.read) != self.mark:
            return False
        self.norm = given
        if self.batch is not None:
            with torch.no_grad(), no_function():
                # As PyTorch's norm does, past the version counter: an earlier call's graph may hold them.
                running = [given.running_mean.data, given.running_var.data]  # type: ignore[union-attr]
                torch._foreach_lerp_(running, list(self.batch), float(given.momentum))
        return True

    def _give_out(self, value: Deferred | None) -> Tensor | None:
        """The result; after a call in place ``value`` becomes it. None where C code holds on to ``value``."""
        result = self.result
        assert result is not None
        if self.history is not None:
            with self.undisturbed():
                result = Link.apply(self.history, result, *self._held())
        elif result._is_view():  # PyTorch's results are none
            result = Unviewed.apply(result) if result.requires_grad else result.detach()
        hands_on = self.sized.hands_on and not result.is_contiguous()
        if hands_on:
            result = hand_on(result, self.recipe)
        if value is not None:
            if not _exchange(value, result if self.history is not None or hands_on else result.detach()):
                return None
            result = value
        if hands_on:
            self.session.handed.append(weakref.ref(result))
        self.result, self.done, self.at = None, True, len(self.recipe.steps)
        if self.history is not None:
            self.history.chain = None
        if self.token is not None:
            self.session.writes.given_out(self.token)
        return result

    # ------------------------------------------------------------ surprises

    def reads_any(self, tensors: Iterable[Tensor]) -> bool:
        """Whether values that somebody holds are still to be computed from what ``tensors`` are views of."""
        operands = [t for t in (self.x, *self.conv[:2]) if t is not None]
        aliases = [torch._C._is_alias_of(t, a) for t in tensors for a in operands]  # type: ignore[attr-defined]
        return any(aliases) and bool(self._held())

    def _held(self) -> list[Deferred]:
        """The placeholders that somebody holds and that have no value."""
        found = [ref() for ref in self.values]
        return [v for v in found if type(v) is Deferred and not hasattr(v, "_true")]

    def close(self) -> None:
        """The session ends."""
        self.ready, self.result = [], None
        if self._held():
            self.site.leave_alone("its values are still held when the model's forward has ended")
            self.realize()
        self.done = True

    def realize(self, below: bool = False) -> None:
        """Compute by PyTorch's own operators all values that somebody holds.

        Before the result is given out, they take the places of the placeholders. Afterwards, as in C code
        (``below``) that reads a placeholder, these stay where they are in the graph and get memory.
        """
        if self.token is not None:
            self.session.writes.end(self.token)
        late, expected = self.done and self.history is not None, self.result
        if late:
            self.site.leave_alone("its values are used after the block has run")
        elif not self.done:
            self.site.surprise(self.recipe)
        self.done, self.result, self.ready = True, None, []
        held = {value._at: value for value in self._held()}
        x, conv, norm, history = self.x, self.conv, self._norm_as_read(), self.history
        if _versions(x, *conv[:2]) != self.versions:
            self._give_up()
        with self.context.entered(x.device.type):
            if history is not None:
                # Where an operand depends on another, that path is not this block's.
                operands: list[Any] = [t if t is None else Unowned.apply(t) for t in (x, *conv[:2])]
                if norm is not None:
                    operands += [t if t is None else Unowned.apply(t) for t in norm[2:4]]
                    norm = norm._replace(weight=operands[3], bias=operands[4])
                history.operands = tuple(operands)
                x, weight, bias, *_ = operands
                conv = conv._replace(weight=weight, bias=bias)
            y = self.function(x.contiguous() if self.handed else x, *conv)
            if expected is not None:
                self._check(y.detach(), expected)
            for at in range(max(held, default=-1) + 1):
                if at:
                    y = self._step(at - 1, y, norm)
                if at in held:
                    y = held[at].settle(y, history, keep=late or below)
        self.history = None

    def _norm_as_read(self) -> Norm | None:
        """The norm's arguments with the values that the block has read."""
        norm = self.norm
        if norm is None or fingerprint(norm.read) == self.mark:
            return norm
        then: list[Any] = [
            None if t is None or read is None else t + (read - t).detach()
            for t, read in zip(norm.read, self.read, strict=True)
        ]
        if norm.training:
            return norm._replace(weight=then[0], bias=then[1])
        return norm._replace(**dict(zip(Norm._fields[:4], then, strict=True)))

    def _check(self, y: Tensor, expected: Tensor) -> None:
        """Whether a convolution's value, computed now, leads to the result that was computed then."""
        with torch.no_grad():
            error, size = (self.tail(0, y) - expected).float().norm(), expected.float().norm()
        if error.isfinite() and error > 0.05 * size + 1e-6:
            self._give_up()

    def _give_up(self) -> None:
        self.site.leave_alone("its operands are changed in place before its result is used")
        raise RuntimeError(
            "an operand of a convolution was changed in place before the convolution's result was used, "
            "and not as in the calls that cf.accelerate has seen: the result cannot be computed any "
            "more. From now on this convolution runs as it is"
        )

    def _step(self, number: int, y: Tensor, norm: Norm | None) -> Tensor:
        """A step that the program has taken, once more; batch statistics have been counted."""
        step = self.recipe.steps[number]
        if step.kind != "norm":
            return step.run(y)
        assert norm is not None
        return step.function(y, *(norm.uncounted() if norm.training else norm))

    def tail(self, at: int, y: Tensor) -> Tensor:
        """The result from the value ``at``."""
        norm = self._norm_as_read()
        for number in range(at, len(self.recipe.steps)):
            inplace = self.recipe.steps[number].found.inplace
            y = self._step(number, y.clone() if inplace else y, norm)
        return y


def _versions(*tensors: Tensor | None) -> list[int]:
    return [t._version for t in tensors if t is not None and not t.is_inference()]


def _exchange(value: Deferred, true: Tensor) -> bool:
    """Let the Python object ``value`` be the tensor ``true``, unless C code holds on to one of them."""
    with no_function():
        if value._use_count() > 1 or true._use_count() > 1:  # type: ignore[attr-defined]
            return False
    torch._C._swap_tensor_impl(value, true)
    for name in ("_chain", "_at", "_slot", "_token"):
        del value.__dict__[name]
    value.__dict__.update(true.__dict__)
    value.__class__ = type(true)  # type: ignore[assignment]
    return True


# ---------------------------------------------------------------- gradients


class History:
    """What the graph knows of a chain, whose placeholders stand between its operands and its result.

    :class:`Promise` leads from the operands to the placeholders, :class:`Link` from these and the block to
    the result. Gradients flow from ``Link`` through the block itself; those of a placeholder are computed
    only where somebody holds it.

    Attributes:
        chain: until its result is given out.
        needs: which operands want a gradient.
        operands: aliases of them that ``true`` was computed from.
        true: by slot, what became of a placeholder: its chain, the steps before it and its true value.
        given: by slot, the gradient that ``Link`` gave in the backward that runs.
    """

    def __init__(self, chain: Chain, operands: tuple):
        self.chain: Chain | None = chain
        self.needs = [t is not None and t.requires_grad for t in operands]
        self.operands: tuple = ()
        self.true: dict[int, tuple[Chain, int, Tensor]] = {}
        self.given: dict[int, Tensor] = {}


class Promise(torch.autograd.Function):
    """From a block's operands to the placeholders of its values."""

    @staticmethod
    def forward(ctx, history, *tensors):
        ctx.history = history
        ctx.set_materialize_grads(False)
        values = history.chain.bare("strides")
        if not any(history.needs[:3]):  # it is the norm's parameters that want gradients
            ctx.mark_non_differentiable(*(value for value in values if value._at == 0))
        return tuple(values)

    @staticmethod
    def backward(ctx, *grads):
        history: History = ctx.history
        nothing = (None,) * len(ctx.needs_input_grad)
        given, history.given = history.given, {}
        extra = {}  # what others than the block itself have to say
        for slot, grad in enumerate(grads):
            if grad is not None and grad is not given.get(slot):
                extra[slot] = grad - given[slot] if slot in given else grad
        if not extra:
            return nothing
        values = [history.true[slot][2] for slot in extra]
        needed = [i for i, need in enumerate(history.needs) if need]
        operands = [history.operands[i] for i in needed]
        found = torch.autograd.grad(
            values, operands, list(extra.values()), retain_graph=True, create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )  # fmt: skip
        by_operand = dict(zip(needed, found, strict=True))
        return None, *(by_operand.get(i) for i in range(len(history.needs)))


class Link(torch.autograd.Function):
    """From a block's own result and its placeholders to the result that is given out."""

    @staticmethod
    def forward(ctx, history, result, *values):
        ctx.history, ctx.slots = history, [value._slot for value in values]
        ctx.set_materialize_grads(False)
        return result.data

    @staticmethod
    def backward(ctx, grad):
        true: dict = ctx.history.true
        given: dict[int, Tensor] = {}
        if grad is not None:
            for slot in ctx.slots:
                if slot in true:
                    chain, at, value = true[slot]
                    given[slot] = _gradient_at(chain, at, value, grad)
            ctx.history.given = given
        return None, grad, *(given.get(slot) for slot in ctx.slots)


def _gradient_at(chain: Chain, at: int, value: Tensor, grad: Tensor) -> Tensor:
    again = torch.is_grad_enabled()
    with chain.context.entered(value.device.type):
        if not again:
            value = value.detach().requires_grad_()
        (found,) = torch.autograd.grad(
            chain.tail(at, value), value, grad.to(chain.recipe.dtypes[-1]), create_graph=again
        )
    return found


# ---------------------------------------------------------------- placeholders


class Deferred(Tensor):
    """The placeholder of a value that nobody is expected to look at.

    It has a shape, strides and a place in the graph, and no memory before somebody looks.
    """

    #: For `explain`: a module that returns one is part of a block.
    is_deferred = True
    _chain: Chain
    _at: int
    _slot: int
    _token: Token
    _true: Tensor  # its value, where it could not become that

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and type(args[0]) is Deferred:
            result = args[0]._chain.follow(args[0], function, args, kwargs)
            if result is not None:
                return result
        if function in QUESTIONS:
            with args[0]._chain.undisturbed(), no_function():
                return function(*args, **kwargs)
        _look_at(args, kwargs)
        if function in _NEEDS_MEMORY:
            args, kwargs = tree_map(_plain, (args, kwargs))
        with no_function():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method, as its documentation has it
        cls, function, types, args=(), kwargs=None
    ):
        """What C code asks for, past :meth:`__torch_function__`."""
        chain = getattr(args[0], "_chain", None) if args else None
        if chain is not None and chain.quiet:
            if function is torch.ops.prim.device.default:
                return chain.x.device
            shape, strides = chain.sized.shapes[chain.recipe.places[args[0]._slot]]
            return function(torch.empty_strided(shape, strides, device="meta"), *args[1:], **(kwargs or {}))
        _look_at(args, kwargs, below=True)
        args, kwargs = tree_map(_memory, (args, kwargs or {}))
        return function(*args, **kwargs)

    def settle(self, true: Tensor, history: History | None, keep: bool) -> Tensor:
        """Be the value ``true``, or have it as memory; returns what later steps are to read."""
        if history is not None:  # C code may have noted the placeholder's place in the graph
            history.true[self._slot] = self._chain, self._at, Unowned.apply(true)
        if not keep and _exchange(self, true):
            return self
        self._true = true.detach()
        with torch.no_grad():
            self.data = self._true
        return true


def _look_at(args, kwargs, below: bool = False) -> None:
    """Let all placeholders among the arguments have values."""
    for value in tree_iter((args, kwargs)):
        if type(value) is Deferred and not hasattr(value, "_true"):
            value._chain.realize(below)


#: What wants a tensor that is no subclass, to reach its memory or to write it down.
_NEEDS_MEMORY = {
    Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.untyped_storage, Tensor.storage, Tensor.data_ptr,
    Tensor.__reduce_ex__, Tensor.__deepcopy__, Tensor.__dlpack__, Tensor.__repr__, Tensor.__format__,
    *(getattr(Tensor, name).__get__ for name in ("data", "__cuda_array_interface__")),
}  # fmt: skip


class Plain(torch.autograd.Function):
    """The plain tensor of a placeholder that could not become one."""

    @staticmethod
    def forward(ctx, value):
        return value._true.view_as(value._true)

    @staticmethod
    def backward(ctx, grad):
        return grad


def _plain(value):
    if type(value) is not Deferred or not hasattr(value, "_true"):
        return value
    with no_function():
        return Plain.apply(value) if value.requires_grad else value._true


def _memory(value):
    return value._true if type(value) is Deferred else value
