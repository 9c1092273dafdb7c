"""How blocks are found in any model, and run as one.

A block is found by what really happens to a convolution's result, not by looking at code. Every
convolution of an accelerated model carries one forward pre-hook, a :class:`Capture`:

1. *Observe.* The first call in each mode runs as it is, but its result notes who consumes it
   (:class:`Observed`, a Tensor subclass for as long as it is looked at). A norm, an activation or a
   pool in the order of a block prolongs the chain; anything else ends it there. Loops, masks,
   packing and methods other than ``forward`` need no special care: what was not consumed in this
   order, and by nothing else, is no block.
2. *Defer.* In later calls the convolution and the steps of that chain answer with :class:`Deferred`
   tensors, which have a shape, a gradient function and no memory, and the chain's last step runs
   the whole block. Whoever touches a deferred tensor in any other way, in Python or below it, gets
   its true value, computed by PyTorch's own operators, and its gradient flows as always. The site
   is then observed again.
3. *Hand on.* A block whose result was seen to go to another convolution writes it channels-last, as
   convolutions read it best. Such a :class:`Handed` tensor becomes as PyTorch would have laid it out as
   soon as anybody but such a convolution looks at it.

So a changed flow, hooks set later or a custom ``autograd.Function`` cost time, never the answer.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast, final

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from cnnlstm_fast import functional, patterns, plans
from cnnlstm_fast.patterns import CONVS, Conv, Norm

#: The key of our hook among a module's; a string, since numbers are given out by a counter that
#: starts anew in every process.
HOOK = "cnnlstm_fast"

#: How often the flow behind a convolution may differ from the observed one before it is left alone.
SURPRISES = 3

#: How many shapes of inputs a convolution remembers.
MEMORY = 256

#: Microseconds of PyTorch's own time that deferring a block costs, about. Blocks that would take less
#: than twice that run as they are.
OVERHEAD_US = 40.0
#: Operations and bytes a microsecond of a slow core, for the same estimate.
ARITHMETIC, BANDWIDTH = 5e4, 5e3

_no_function = torch._C.DisableTorchFunctionSubclass
_PLAIN = (Tensor, nn.Parameter)

#: What may be asked of an observed or deferred tensor without consuming it.
_QUESTIONS = {
    *(getattr(Tensor, name).__get__ for name in (
        "shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_sparse", "is_leaf",
        "is_nested",
    )),
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.__len__, torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip


# ---------------------------------------------------------------- what is known of one convolution


class Step:
    """One call behind a convolution: what was called, with which arguments, as which part."""

    __slots__ = ("args", "found", "function", "kind", "kwargs")

    def __init__(self, function, args, kwargs, found: patterns.Found):
        self.function, self.found, self.kind = function, found, found.part.kind
        self.args, self.kwargs = args[1:], kwargs

    def norm(self, args, kwargs) -> Norm | None:
        """The arguments of a norm's call that is like this one; its tensors may be others."""
        try:
            norm = Norm(*args[1:], **kwargs)
        except TypeError:
            return None
        return norm if norm.training == self.found.value.training else None

    def run(self, x: Tensor) -> Tensor:
        return self.function(x, *self.args, **self.kwargs)

    def __str__(self) -> str:
        if self.kind == "norm":
            return "BatchNorm"
        return type(self.found.value).__name__ if self.found.value is not None else "Identity"


class Sized(NamedTuple):
    """What a recipe knows about inputs of one shape.

    Attributes:
        plan, why: which one runs it.
        conv: the weight's shape, and the convolution's arguments that are no tensors.
        shapes: shape and strides of its values; none where it runs as it is.
        layout: of its result.
        hands_on: that is another one than PyTorch's.
        decision: how it runs; None where only the call itself shows that.
    """

    plan: str
    why: str
    conv: tuple
    shapes: list[tuple]
    layout: str
    hands_on: bool
    decision: functional.Decision | None


class Recipe:
    """A chain that was observed, and that the next calls are to run as one block.

    Attributes:
        steps: behind the convolution.
        dtypes: of the values before the last one.
        hands_on: the last value goes to another convolution.
        sizes: by the shape and strides of the input, and whether it was handed on.
    """

    def __init__(self, steps: list[Step], dtypes: list[torch.dtype], hands_on: bool):
        self.steps, self.dtypes, self.hands_on = steps, dtypes, hands_on
        parts = {patterns.SLOTS.get(step.kind): step.found.value for step in steps}
        self.activation, self.pool = parts.get("activation"), parts.get("pool")
        self.norm: Norm | None = parts.get("norm")  # as it was observed
        self.sizes: dict[tuple, Sized] = {}

    def sized(self, function, x: Tensor, conv: Conv, handed: bool) -> Sized:
        """What is known of an input like ``x``, which PyTorch would have contiguous if it was handed on."""
        key = x.shape, x.stride(), handed
        found = self.sizes.get(key)
        if found is None or found.conv != (conv.weight.shape, conv[2:]):
            if len(self.sizes) > MEMORY:
                self.sizes.clear()
            found = self.sizes[key] = self._size(function, x, conv, handed)
        return found

    def _size(self, function, x: Tensor, conv: Conv, handed: bool) -> Sized:
        module = self.norm.module(conv.weight.shape[0], x.dim()) if self.norm is not None else None
        given = x.new_empty(()).expand(x.shape) if handed else x  # not like channels-last
        pooled = self.pool is not None
        layout = patterns.eager_layout(given, conv.weight, pooled, module, self.activation)
        hands_on = self.hands_on and layout == "channels_first" and x.dim() == 4 and x.is_cpu
        if hands_on:
            layout = "channels_last"
        decision, shapes, plan = None, [], "reference"
        try:
            decision = patterns.decide(x, conv, module, self.activation, self.pool, layout)
            shapes = self._shapes(function, x, conv, handed)
            why = self._why_not_deferred(decision, shapes[0][0], conv.weight, handed)
            if why is None:
                plan, why = decision.plan, decision.reason
            else:
                shapes = []
        except (RuntimeError, ValueError) as error:  # PyTorch says it in its own words, if it comes to that
            why = str(error)
        if torch.is_autocast_enabled(x.device.type):
            decision = None
        return Sized(plan, why, (conv.weight.shape, conv[2:]), shapes, layout, hands_on, decision)

    def _why_not_deferred(
        self, decision: functional.Decision, size: tuple, weight: Tensor, handed: bool
    ) -> str | None:
        """Why a block whose convolution gives a map of ``size`` runs as it is; None where it does not."""
        if decision.plan == "reference" and not handed:  # PyTorch's operators too are faster channels-last
            return decision.reason
        if weight.is_cpu and self._eager_us(size, weight) < 2 * OVERHEAD_US:
            return "so small that calling it costs more than computing it"
        return None

    def _eager_us(self, shape: tuple, weight: Tensor) -> float:
        """What PyTorch takes for the block on this machine's processor, roughly, beside its calls."""
        outputs = math.prod(shape)
        return outputs * (weight[0].numel() * 2 / ARITHMETIC + (1 + len(self.steps)) * 4 / BANDWIDTH)

    def _shapes(self, function, x: Tensor, conv: Conv, handed: bool) -> list[tuple]:
        """Of all values but the last one."""
        with torch.no_grad():
            strides = torch.empty(x.shape, device="meta").stride() if handed else x.stride()
            y = function(
                torch.empty_strided(x.shape, strides, dtype=x.dtype, device="meta"),
                torch.empty_like(conv.weight, dtype=x.dtype, device="meta"),
                None, *conv[2:],
            )  # fmt: skip
            found = [(y.shape, y.stride())]
            for step in self.steps[:-1]:
                if step.kind in ("pool", "max_pool"):
                    y = step.run(y)
                found.append((y.shape, y.stride()))
        return found


@final
class Trace:
    """What an observed call has shown so far.

    Attributes:
        limit: the chain may not go beyond this value, because something else reads it.
        hands_on: that is a convolution.
    """

    def __init__(self, x: Tensor, rank: int):
        self.rank, self.state = rank, "conv"
        self.steps: list[Step] = []
        self.limit: int | None = None
        self.hands_on = False
        self.values: list[Callable[[], Any]] = []  # weak references
        self.dtypes: list[torch.dtype] = []
        self.context = _context(x)
        self.x: Tensor | None = x
        # No version counter in inference mode: there the values themselves are compared.
        self.before: Any = x.clone() if x.is_inference() else x._version

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
        if value._at != len(self.steps) or self.limit is not None or _context(value) != self.context:
            return None
        found = patterns.read_call(function, args, kwargs)
        if found is None:
            return None
        state = patterns.follow(self.state, found.part, self.rank)
        if state is None or not self._input_unchanged():
            return None
        self.state = state
        return Step(function, args, kwargs, found)

    def _input_unchanged(self) -> bool:
        x = self.x
        if x is None:
            return False
        return torch.equal(x, self.before) if x.is_inference() else x._version == self.before

    def ends_at(self, at: int, hands_on: bool) -> None:
        if self.limit is None or at < self.limit:
            self.limit, self.hands_on = at, hands_on
        self.x = self.before = None

    def recipe(self) -> Recipe | None:
        """What was learnt, or None while somebody still holds a value that may yet be consumed."""
        end = len(self.steps) if self.limit is None else self.limit
        alive = [at for at, value in enumerate(self.values) if type(value()) is Observed]
        if any(at < end for at in alive) or (self.limit is None and alive):
            return None
        while end and self.steps[end - 1].kind == "identity":
            end -= 1
        return Recipe(self.steps[:end], self.dtypes[:end], self.hands_on)


def _context(x: Tensor) -> tuple:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.is_grad_enabled(), torch.get_autocast_dtype(device)
    return _GRAD if torch.is_grad_enabled() else _NO_GRAD


_GRAD, _NO_GRAD = (True, None), (False, None)


class Observed(Tensor):
    """A true result that notes who consumes it; it becomes a plain Tensor again when it has been."""

    _trace: Trace
    _at: int

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with _no_function():
            if function in _QUESTIONS:
                return function(*args, **kwargs)
            first = args[0] if args and type(args[0]) is Observed else None
            step = None if first is None else first._trace.prolong(first, function, args, kwargs)
            if first is None or step is None:
                for value in tree_iter((args, kwargs)):
                    if type(value) is Observed:
                        value._trace.ends_at(value._at, _reads_channels_last(function, args, kwargs))
                        _release(value)
                return function(*args, **kwargs)
            trace = first._trace
            result = function(*args, **kwargs)
            trace.steps.append(step)
            if result is first:  # in place, or an identity
                trace.values[first._at] = _nobody
                first._at += 1
                trace.values.append(weakref.ref(first))
                trace.dtypes.append(first.dtype)
                return result
            if trace.state == "pooled":  # nothing can follow
                trace.ends_at(len(trace.steps), False)
                _pooled[result] = trace
                return result
            return trace.note(result)


def _reads_channels_last(function, args, kwargs) -> bool:
    """Whether a call is a convolution that channels-last maps are to be handed to.

    Grouped ones are slower on them. Of a strided pointwise one with less than a vector of channels oneDNN
    writes the weight's gradient beyond its memory.
    """
    if function is not torch.conv2d:
        return False
    given = dict(zip(patterns.Conv._fields, args[1:], strict=False)) | kwargs
    _, channels, *kernel = (*getattr(given.get("weight"), "shape", ()), 0, 0)[:4]
    strided = given.get("stride", 1) not in (1, (1, 1), [1, 1])
    return given.get("groups", 1) == 1 and not (strided and channels < 16 and kernel == [1, 1])


#: Results of observed chains that end in a pool, while they live: convolutions that get one tell the trace.
_pooled = WeakTensorKeyDictionary()


def _nobody() -> None:
    """In the place of a weak reference to a value that is no more."""


def _release(value: Observed) -> None:
    value.__class__ = Tensor  # type: ignore[assignment]  # what it was before it was observed
    del value._trace, value._at


# ---------------------------------------------------------------- deferring


class Chain:
    """One deferred call: the convolution's arguments, and how far along the recipe it has come.

    Attributes:
        at: the value at hand: 0 is the convolution's, ``at`` that of the recipe's step ``at - 1``.
        places: which value each promise stands for.
        ready: promises made in advance, the next one last.
        done: the block has run, or it never will.
        counted: the batch statistics have been added to the running ones.
        out: the last value where that was computed in place of an earlier one.
    """

    __slots__ = (
        "at", "capture", "context", "conv", "counted", "done", "function", "handed", "norm", "out", "places",
        "ready", "recipe", "sized", "version", "x",
    )  # fmt: skip

    def __init__(self, capture: Capture, recipe: Recipe, sized, context, function, x, conv, handed):
        self.capture, self.recipe, self.sized, self.context = capture, recipe, sized, context
        self.handed = handed
        self.function, self.x, self.conv = function, x, conv
        self.version = -1 if x.is_inference() else x._version
        self.at = 0
        self.norm: Norm | None = None
        self.places: list[int] = []
        self.ready: list[Deferred] = []
        self.done = self.counted = False
        self.out: Tensor | None = None

    def promise(self) -> Deferred:
        """A deferred tensor in the place of the value at hand."""
        if self.ready:
            return self.ready.pop()
        if self.context[0]:
            norm = self.norm or self.recipe.norm
            tensors = (self.x, *self.conv[:2], *(() if norm is None else norm[2:4]))
            if any([t is not None and t.requires_grad for t in tensors]):
                values = Promise.apply(self, *tensors)
                for value in reversed(values):
                    value._chain = self
                    self.ready.append(value)
                return self.ready.pop()
        value = self.bare(self.at)
        value._chain = self
        return value

    def bare(self, at: int) -> Deferred:
        shape, stride = self.sized.shapes[at]
        value = Tensor._make_wrapper_subclass(
            Deferred, shape, strides=stride, dtype=self.recipe.dtypes[at], device=self.x.device
        )
        value._place = len(self.places)
        self.places.append(at)
        return value

    def follow(self, value: Deferred, function, args, kwargs) -> Tensor | None:
        """The result of a call that was expected, or None."""
        at = self.at
        if self.places[value._place] != at or self.done:
            return None
        steps = self.recipe.steps
        step = steps[at]
        if function is not step.function or _context(self.x) != self.context:
            return None
        if step.kind == "norm":
            norm = step.norm(args, kwargs)
            if norm is None:
                return None
            self.norm, expected = norm, step.found.value
            if norm.weight is not expected.weight or norm.bias is not expected.bias:
                self.ready.clear()  # their gradients would go elsewhere
        elif args[1:] != step.args or kwargs != step.kwargs:
            return None
        self.at = at = at + 1
        if at == len(steps):
            self.check_input()
            result = self.run()
            self.done = self.counted = True
            if step.found.inplace:
                self.out, self.places[value._place] = result, at
            return result
        if step.kind == "identity":
            if self.ready:
                self.ready.pop()
            self.places[value._place] = at
            return value
        if step.found.inplace:
            self.places[value._place] = at
        return self.promise()

    def check_input(self) -> None:
        if self.version >= 0 and self.x._version != self.version:
            self.capture.leave_alone("its input is changed in place before its result is used")
            raise RuntimeError(
                "the input of a convolution was changed in place before the result of the convolution was "
                "used, which did not happen when cf.accelerate observed it: from now on it runs as it is"
            )

    def run(self) -> Tensor:
        norm, conv, recipe = self.norm, self.conv, self.recipe
        module = None if norm is None else norm.module(conv.weight.shape[0], self.x.dim())
        parts = module, recipe.activation, recipe.pool
        sized = self.sized
        result = patterns.run_block(self.x, conv, *parts, layout=sized.layout, decision=sized.decision)
        if self.sized.hands_on and not result.is_contiguous():
            return Handed.of(result, recipe)
        return result

    def true_value(self, at: int) -> Tensor:
        """A value by PyTorch's own operators; batch statistics count once, whoever computes them."""
        self.check_input()
        return self._compute(at, self.x, self.conv, self.norm)

    def true_values(self, ats: list[int], tensors: Sequence[Any]) -> list[Tensor]:
        """The same from other tensors in the place of input, weight and bias, and of the norm's."""
        norm = self.norm
        if norm is not None:
            norm = norm._replace(weight=tensors[3], bias=tensors[4])
        conv = self.conv._replace(weight=tensors[1], bias=tensors[2])
        return [self._compute(at, tensors[0], conv, norm) for at in ats]

    def _compute(self, at: int, x: Tensor, conv: Conv, norm: Norm | None) -> Tensor:
        y = self.function(x.contiguous() if self.handed else x, *conv)
        for step in self.recipe.steps[:at]:
            if step.kind == "norm":
                assert norm is not None  # `follow` has met it
                if norm.training and self.counted:
                    norm = norm._replace(running_mean=None, running_var=None)
                self.counted = True
                y = step.function(y, *norm)
            else:
                y = step.run(y.clone() if step.found.inplace else y)
        return y

    def break_off(self) -> None:
        """Somebody looks at a value: the rest runs as it is, and the site is observed again."""
        if not self.done:
            self.done = True
            self.ready.clear()
            self.capture.surprise(self.recipe)

    def __del__(self):
        norm = self.norm
        if norm is not None and norm.training and norm.running_mean is not None and not self.counted:
            with torch.no_grad(), _no_function():
                self.true_value(self.at)


class Promise(torch.autograd.Function):
    """The gradient of deferred tensors that were used in another way than expected."""

    @staticmethod
    def forward(ctx, chain, *tensors):
        ctx.chain, ctx.first, ctx.tensors = chain, len(chain.places), tensors
        ctx.set_materialize_grads(False)
        return tuple([chain.bare(at) for at in range(chain.at, len(chain.recipe.steps))])

    @staticmethod
    def backward(ctx, *grads):
        chain, needs = ctx.chain, ctx.needs_input_grad[1:]
        given = [(chain.places[ctx.first + i], grad) for i, grad in enumerate(grads) if grad is not None]
        if not given:
            return None, *(None for _ in needs)
        normed = any(step.kind == "norm" for at, _ in given for step in chain.recipe.steps[:at])
        needed = [i for i, need in enumerate(needs) if need and (i < 3 or normed)]

        def values(*tensors):
            replaced = list(ctx.tensors)
            for i, tensor in zip(needed, tensors, strict=True):
                replaced[i] = tensor
            return chain.true_values([at for at, _ in given], replaced)

        chain.check_input()
        with torch.enable_grad(), _no_function():  # vjp, because one of the tensors may depend on another
            pull_back = torch.func.vjp(values, *(ctx.tensors[i] for i in needed))[1]
            found = dict(zip(needed, pull_back([grad for _, grad in given]), strict=True))
        return None, *(found.get(i) for i in range(len(needs)))


class Realize(torch.autograd.Function):
    """The true value of a deferred tensor."""

    @staticmethod
    def forward(ctx, value):
        chain = value._chain
        return chain.true_value(chain.places[value._place]).detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Deferred(Tensor):
    """A value of a chain that nobody is expected to look at."""

    #: For `explain`: a module that returns one is part of a block.
    is_deferred = True
    _chain: Chain
    _place: int
    _real: Tensor  # once somebody has asked
    _raw: Tensor

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and type(args[0]) is Deferred:
            result = args[0]._chain.follow(args[0], function, args, kwargs)
            if result is not None:
                return result
        if function in _QUESTIONS:
            with _no_function():
                return function(*args, **kwargs)
        args, kwargs = tree_map(_real, (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method, as its documentation has it
        cls, function, types, args=(), kwargs=None
    ):
        args, kwargs = tree_map(_raw, (args, kwargs or {}))
        return function(*args, **kwargs)


def _real(value):
    """The true value, with its gradient."""
    if type(value) is not Deferred:
        return value
    chain = value._chain
    if chain.out is not None and chain.places[value._place] == len(chain.recipe.steps):
        return chain.out  # the last step was in place
    chain.break_off()
    if not hasattr(value, "_real"):
        with _no_function(), torch.set_grad_enabled(value.requires_grad):
            value._real = Realize.apply(value)
    return value._real


def _raw(value):
    """The true value, below autograd."""
    if type(value) is not Deferred:
        return value
    chain = value._chain
    chain.break_off()
    if not hasattr(value, "_raw"):
        with torch.no_grad(), _no_function():
            value._raw = chain.true_value(chain.places[value._place])
    return value._raw


# ---------------------------------------------------------------- handing on


class Unviewed(torch.autograd.Function):
    """The same tensor as no view: whose memory may be exchanged, and which may change in place after that."""

    @staticmethod
    def forward(ctx, view):
        return view.data

    @staticmethod
    def backward(ctx, grad):
        return grad


class Handed(Tensor):
    """A block's result on its way to a convolution, channels-last where PyTorch's would be contiguous."""

    _recipe: Recipe

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in _QUESTIONS and not _returns_itself(function, args, kwargs):
            for value in tree_iter((args, kwargs)):
                if type(value) is Handed:
                    value.settle()
        with _no_function():
            return function(*args, **kwargs)

    @staticmethod
    def of(result: Tensor, recipe: Recipe) -> Handed:
        handed: Any = Unviewed.apply(result) if result.requires_grad else result.data
        handed.__class__ = Handed
        handed._recipe = recipe
        return handed

    def settle(self) -> None:
        """Become a plain tensor in PyTorch's layout, once and for all."""
        recipe = self._recipe
        del self._recipe
        self.__class__ = Tensor  # type: ignore[assignment]  # the point of it
        recipe.hands_on = False
        recipe.sizes.clear()
        with torch.no_grad():
            self.data = self.detach().contiguous()


def _returns_itself(function, args, kwargs) -> bool:
    """Whether a call gives back its first argument, as dropout does in evaluation."""
    found = patterns.read_call(function, args, kwargs)
    return found is not None and found.part.kind == "identity"


# ---------------------------------------------------------------- the hook


class Capture:
    """The forward pre-hook on a convolution: decides whether a call runs as it is, observed or deferred.

    A copy of it, by whatever way, knows nothing yet.
    """

    def __init__(self) -> None:
        self.known: dict[tuple, Trace | Recipe] = {}
        self.surprises = 0
        self.left_alone: str | None = None
        self.why_plain: str | None = None
        self.plain: set[tuple] = set()  # calls like these (`_call_key`) a rule has left to PyTorch
        self.idle = self.busy = False  # whether calls had nothing to do here, or had (`resting`)

    def __reduce__(self):
        return Capture, ()

    def __call__(self, module: nn.Module, args: tuple):
        if torch.compiler.is_compiling():
            return None
        if self.plain and plans.observer is None and len(args) == 1 and type(args[0]) is Tensor:
            try:
                if _call_key(module, args[0]) in self.plain:
                    self.idle = True
                    return None
            except (RuntimeError, TypeError):  # sparse and nested tensors have no strides, symbols no hash
                pass
        if self.left_alone:
            self.idle = True
            self.runs_plain(module, self.left_alone)
            return None
        self.busy = True
        why = _why_plain(module, args)
        if why is not None:
            self.runs_plain(module, why)
            return None
        return (Input(args[0], self, module),)

    def leave_alone(self, why: str) -> None:
        self.known.clear()
        self.left_alone = why

    def surprise(self, recipe: Recipe) -> None:
        self.surprises += 1
        if self.surprises >= SURPRISES:
            self.leave_alone("what follows it changes from call to call")
        else:
            self.plain.clear()
            self.known = {key: known for key, known in self.known.items() if known is not recipe}

    def leave_calls(self, module: nn.Module, x: Tensor) -> None:
        """Calls like this one need not be looked at closely again: at 2 us in place of 8 to 18."""
        if len(self.plain) >= MEMORY:
            self.plain.clear()
        self.plain.add(_call_key(module, x))

    def runs_plain(self, module: nn.Module, why: str) -> None:
        self.why_plain = why
        if plans.observer is not None:
            plans.observer.as_is(module, why)

    def convolve(self, function, x: Tensor, module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        """The convolution of a module, or what stands for its result."""
        conv = Conv(*args, **kwargs)
        if type(conv.weight) not in _PLAIN or x.dim() != CONVS[function]:
            self.runs_plain(module, "its weight is a Tensor subclass or its input has no batch dimension")
            return function(x, *conv)
        context = _context(x)
        key = (module.training, x.dtype, x.device.type, *context)
        known = self.known.get(key)
        if known is None:
            self.runs_plain(module, "is being observed: the first call in this mode")
            if (before := _pooled.get(x)) and _reads_channels_last(function, (x, *conv), {}):
                before.hands_on = True
            y = function(x, *conv)
            if type(y) is Tensor:
                trace = self.known[key] = Trace(x, CONVS[function])
                trace.note(y)
            return y
        if type(known) is Trace:
            recipe = known.recipe()
            if recipe is None:
                self.runs_plain(module, "is being observed: results of its first call are still held")
                return function(x, *conv)
            known = self.known[key] = recipe
        given = x if type(x) is Handed else None
        handed = given is not None
        if given is not None:
            with _no_function():
                x = given.as_subclass(Tensor)
        sized = known.sized(function, x, conv, handed)
        if not sized.shapes:
            if given is not None:
                given.settle()
                x = given
            elif module.padding_mode == "zeros" and context[1] is None:
                self.leave_calls(module, x)  # else x is not what the module was called with, or is to be cast
            self.runs_plain(module, sized.why)
            return function(x, *conv)
        chain = Chain(self, known, sized, context, function, x, conv, handed)
        return chain.promise() if known.steps else chain.run()


class Input:
    """In the place of a convolution's input for as long as its ``forward`` runs."""

    __slots__ = ("capture", "module", "x")

    def __init__(self, x: Tensor, capture: Capture, module: nn.Module):
        self.x, self.capture, self.module = x, capture, module

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        given = args[0]
        kwargs = kwargs or {}
        if function in CONVS:
            return given.capture.convolve(function, given.x, given.module, args[1:], kwargs)
        # Padding of another mode than zeros comes before the convolution.
        return Input(function(given.x, *args[1:], **kwargs), given.capture, given.module)


def _call_key(module: nn.Module, x: Tensor) -> tuple:
    """What the choice of a plan depends on, for one site."""
    return (
        x.shape, x.stride(), x.dtype, x.is_cpu, module.training,
        torch.is_grad_enabled(), torch._C._is_any_autocast_enabled(),
    )  # fmt: skip


def _why_plain(module: nn.Module, args: tuple) -> str | None:
    """Why a call of a convolution runs as it is, as a sentence; None if it need not."""
    if (
        module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
        or len(module._forward_pre_hooks) > 1 or functional.global_hooks()
    ):  # fmt: skip
        return "has hooks"
    if len(args) != 1 or type(args[0]) not in _ACCEPTED:
        return "its input is not a plain tensor"
    if args[0].layout is not torch.strided or args[0].is_nested:
        return "its input is not a plain tensor"
    if torch.jit.is_tracing():
        return "is being traced"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are being computed"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks on saved tensors are active (checkpointing)"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a dispatch mode is active"
    return None


_ACCEPTED = (Tensor, nn.Parameter, Observed, Handed)
