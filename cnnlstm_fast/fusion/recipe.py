"""What is known of the steps behind one convolution, and of its inputs' shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cnnlstm_fast import functional, patterns
from cnnlstm_fast.limits import limit
from cnnlstm_fast.patterns import Conv, Norm
from cnnlstm_fast.planning.choose import gains_enough

#: How many shapes of inputs a convolution remembers.
MEMORY = 256

#: Microseconds that speculating costs, about. Blocks that save less run as they are.
OVERHEAD_US = limit("BLOCK_US", 40, 0)


class Context(NamedTuple):
    """The modes under which a call ran, which decide what PyTorch's operators do.

    Attributes:
        grad: gradients are enabled.
        inference: ``torch.inference_mode`` is active.
        autocast: the dtype that autocast casts to, or None.
    """

    grad: bool
    inference: bool
    autocast: torch.dtype | None

    @contextlib.contextmanager
    def entered(self, device: str) -> Iterator[None]:
        """The same modes again, without anybody's ``__torch_function__`` and hooks on saved tensors."""
        with (
            torch._C.DisableTorchFunction(),
            torch.inference_mode(self.inference),
            torch.set_grad_enabled(self.grad),
            torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None),
            torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _itself)
            if hooked()
            else contextlib.nullcontext(),
            _outside_transforms()
            if torch._C._are_functorch_transforms_active()
            else contextlib.nullcontext(),
        ):
            yield


def _outside_transforms() -> contextlib.AbstractContextManager:
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack  # loads what few need

    return temporarily_clear_interpreter_stack()


def hooked() -> bool:
    """Whether hooks on saved tensors are active, as in checkpoints, which count them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _itself(x: Tensor) -> Tensor:
    return x


_USUAL = {
    (grad, inference): Context(grad, inference, None) for grad in (True, False) for inference in (True, False)
}


def context_of(x: Tensor) -> Context:
    """The modes that are active now, for operators on ``x``'s device."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return Context(
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_autocast_dtype(device)
        )
    return _USUAL[torch.is_grad_enabled(), torch.is_inference_mode_enabled()]


class Step:
    """One call behind a convolution: what was called, with which arguments, as which part."""

    __slots__ = ("args", "found", "function", "kind", "kwargs")

    def __init__(self, function, args, kwargs, found: patterns.Found):
        self.function, self.found, self.kind = function, found, found.part.kind
        self.args, self.kwargs = args[1:], kwargs

    @property
    def same_object(self) -> bool:
        """Whether the result is the very tensor that the step was given."""
        return self.found.inplace or self.kind == "identity"

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
        conv: the weight's shape and strides, and the convolution's arguments that are no tensors.
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
    """A chain that was observed, and that later calls run as one block.

    Attributes:
        steps: behind the convolution.
        dtypes: of the values before the last one.
        hands_on: the last value goes to another convolution.
        norm: the norm's arguments in the last call, or None; whose module's :meth:`Norm.module` they are.
        places: the values before the last one that are objects of their own, as numbers of steps before them.
        sizes: by the shape and strides of the input, and whether it was handed on.
    """

    def __init__(self, steps: list[Step], dtypes: list[torch.dtype], hands_on: bool):
        self.steps, self.dtypes, self.hands_on = steps, dtypes, hands_on
        parts = {patterns.SLOTS.get(step.kind): step.found.value for step in steps}
        self.activation, self.pool = parts.get("activation"), parts.get("pool")
        self.norm: Norm | None = parts.get("norm")
        self.places = [0, *(i + 1 for i, step in enumerate(steps[:-1]) if not step.same_object)]
        self.sizes: dict[tuple, Sized] = {}

    def calls(self) -> list[tuple]:
        """What the steps call, and with which arguments beside tensors that may change."""
        return [
            (step.function, *(() if step.kind == "norm" else (step.args, step.kwargs))) for step in self.steps
        ]

    def sized(self, function, x: Tensor, conv: Conv, handed: bool) -> Sized:
        """What is known of an input like ``x``, which PyTorch would have contiguous if it was handed on."""
        key = x.shape, x.stride(), handed
        found = self.sizes.get(key)
        if found is None or found.conv != (conv.weight.shape, conv.weight.stride(), conv[2:]):
            if len(self.sizes) > MEMORY:
                self.sizes.clear()
            found = self.sizes[key] = self._size(function, x, conv, handed)
        return found

    def _size(self, function, x: Tensor, conv: Conv, handed: bool) -> Sized:
        module = None if self.norm is None else self.norm.module(conv.weight.shape[0], x.dim())
        given = x.new_empty(()).expand(x.shape) if handed else x  # not like channels-last
        pooled = self.pool is not None
        layout = patterns.eager_layout(given, conv.weight, pooled, module, self.activation)
        hands_on = self.hands_on and layout == "channels_first" and x.dim() == 4 and x.is_cpu
        decision, shapes, plan = None, [], "reference"
        parts = conv, module, self.activation, self.pool
        try:
            decision = patterns.decide(x, *parts, layout)
            if hands_on:
                handing = patterns.decide(x, *parts, "channels_last")
                hands_on = handing.plan != "reference" and gains(handing, decision)
                decision, layout = (handing, "channels_last") if hands_on else (decision, layout)
            shapes = self._shapes(function, x, conv, handed)
            why = self._why_plain(decision, conv.weight, handed)
            if why is None and handed and decision.plan == "reference" and _is_faulty(x, conv, shapes[0][0]):
                why = "the library's convolutions of such channels-last maps have faults"
            if why is None and handed:
                other = patterns.decide(x.contiguous(), *parts, layout)
                if not gains(decision, other):
                    why = f"faster on its input as PyTorch lays it out: {other.reason}"
            if why is None:
                plan, why = decision.plan, decision.reason
            else:
                shapes = []
        except (RuntimeError, ValueError) as error:  # PyTorch says it in its own words, if it comes to that
            why = str(error)
        if torch.is_autocast_enabled(x.device.type):
            decision = None
        key = conv.weight.shape, conv.weight.stride(), conv[2:]
        return Sized(plan, why, key, shapes, layout, hands_on, decision)

    def _why_plain(self, decision: functional.Decision, weight: Tensor, handed: bool) -> str | None:
        """Why a block runs as it is; None where it does not."""
        if decision.plan == "reference":
            return None if handed else decision.reason  # PyTorch's operators too are faster channels-last
        if weight.is_cpu and decision.choice.saves_us < OVERHEAD_US:
            return f"calling it as a block costs more than it saves: {decision.reason}"
        return None

    def _shapes(self, function, x: Tensor, conv: Conv, handed: bool) -> list[tuple]:
        """Shape and strides of all values but the last one."""
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


def gains(ours: functional.Decision, other: functional.Decision) -> bool:
    """Whether to take ``ours`` and not ``other``: by a margin, where one is PyTorch's operators."""
    if "reference" in (ours.plan, other.plan):
        return gains_enough(ours.choice.us, other.choice.us)
    return ours.choice.us <= other.choice.us


def _is_faulty(x: Tensor, conv: Conv, map_shape: torch.Size) -> bool:
    """Whether PyTorch's own convolution is not to be given ``x`` channels-last: csrc/library_limits.h."""
    if x.dtype != torch.float32:
        return True
    # Stride, padding, dilation and groups as in the schema of conv_block; nothing depends on the padding.
    args = [*_pair(conv.stride), 0, 0, *_pair(conv.dilation), conv.groups]
    return any(torch.ops.cnnlstm_fast.library_limits(x, conv.weight, args, map_shape[-1]))


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    """A convolution's parameter for both axes."""
    return [*value, *value][:2] if isinstance(value, Sequence) else [value, value]


def fingerprint(tensors: Iterable[Tensor | None], by_reading: bool = False) -> tuple | None:
    """A mark of what up to four tensors hold, or None where there is no cheap one.

    On the CPU it is a hash of their memory, which no way of writing escapes; elsewhere their versions.
    Inference tensors have none: of them, ``by_reading`` takes a sum.
    """
    given = [t.detach() if t.is_contiguous() else t.detach().contiguous() for t in tensors if t is not None]
    try:
        if given and all([t.is_cpu for t in given]):
            return (torch.ops.cnnlstm_fast.fingerprint.default(*given, *_NONE[len(given) :]),)
        return tuple([float(t.sum()) if by_reading and t.is_inference() else t._version for t in given])
    except (AttributeError, RuntimeError):  # no kernels, no version, another layout
        return None


_NONE = (None, None, None, None)
