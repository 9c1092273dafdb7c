"""The modes under which a convolution is called, and what its operands hold at that moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Context(NamedTuple):
    """The modes under which a call ran; PyTorch's operators depend on them.

    Attributes:
        grad: gradients are enabled.
        inference: ``torch.inference_mode`` is active.
        autocast: the dtype that autocast casts to, or None.
    """

    grad: bool
    inference: bool
    autocast: torch.dtype | None

    @property
    def records(self) -> bool:
        """Whether autograd records what runs: in inference mode it does not, whatever ``grad`` is."""
        return self.grad and not self.inference

    @contextlib.contextmanager
    def entered(self, device: str) -> Iterator[None]:
        """Enter the same modes, with ``__torch_function__`` and hooks on saved tensors disabled."""
        with (
            torch._C.DisableTorchFunction(),
            torch.inference_mode(self.inference),
            torch.set_grad_enabled(self.grad),
            torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None),
            torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _itself)
            if has_saved_tensor_hooks()
            else contextlib.nullcontext(),
            _outside_transforms()
            if torch._C._are_functorch_transforms_active()
            else contextlib.nullcontext(),
        ):
            yield


def _outside_transforms() -> contextlib.AbstractContextManager:
    from torch._functorch.pyfunctorch import (
        temporarily_clear_interpreter_stack,
    )  # an expensive import that few need

    return temporarily_clear_interpreter_stack()


def has_saved_tensor_hooks() -> bool:
    """Whether hooks on saved tensors are active. Checkpoints have them, and count what is saved."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def why_watched(alone: bool) -> str | None:
    """Who sees that other operators run than PyTorch's, as a sentence; None if nobody does.

    Args:
        alone: no mode sees operators (``__torch_dispatch__``), but for our own watch for writes.
    """
    if torch.jit.is_tracing():
        return "is being traced"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are being computed"
    if has_saved_tensor_hooks():
        return "hooks on saved tensors are active (checkpointing)"
    if not alone or torch._C._len_torch_function_stack() > 0:
        return "a mode that watches PyTorch's functions is active"
    return None


def _itself(x: Tensor) -> Tensor:
    return x


_WITHOUT_AUTOCAST = {
    (grad, inference): Context(grad, inference, None) for grad in (True, False) for inference in (True, False)
}


def context_of(x: Tensor) -> Context:
    """The modes that are active now, for operators on ``x``'s device."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return Context(
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_autocast_dtype(device)
        )
    return _WITHOUT_AUTOCAST[torch.is_grad_enabled(), torch.is_inference_mode_enabled()]


def fingerprint(tensors: Iterable[Tensor | None], by_reading: bool = False) -> tuple | None:
    """A value that changes when the contents of up to four tensors change; None where none is cheap.

    On the CPU it is a hash of their memory, so that every kind of write shows. Elsewhere it is their version
    counters. Inference tensors have no version counter: ``by_reading`` takes their sum instead.
    """
    given = [t.detach() if t.is_contiguous() else t.detach().contiguous() for t in tensors if t is not None]
    try:
        if given and all([t.is_cpu for t in given]):
            return (torch.ops.cnnlstm_fast.fingerprint.default(*given, *_NONE[len(given) :]),)
        return tuple([float(t.sum()) if by_reading and t.is_inference() else t._version for t in given])
    except (AttributeError, RuntimeError):  # no compiled kernels, no version counter, not strided
        return None


_NONE = (None, None, None, None)


def hash_of(t: Tensor) -> int:
    """A hash of what one small tensor on the CPU holds, as cheap as a call can be."""
    given = t if t.is_contiguous() else t.detach().contiguous()
    return torch.ops.cnnlstm_fast.fingerprint.default(given, None, None, None)


class Contents:
    """What small tensors held at a moment: copies of them all.

    On the CPU every kind of write to them shows. Elsewhere only what their version counters count does.

    Attributes:
        tensors: the tensors.
        copies: of each of them; on the CPU their bytes in one tensor, each from a multiple of 16 on. None
            where what happens to them is unknown.
        versions: of the tensors, where they are not on the CPU.
    """

    __slots__ = ("copies", "tensors", "versions")

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = tensors
        self.copies: Tensor | list[Tensor] | None = None
        self.versions: list[int] | None = None
        try:
            if tensors and tensors[0].is_cpu:
                with torch._C._AutoDispatchBelowAutograd():
                    self.copies = torch.ops.cnnlstm_fast.copy_contents.default(tensors)
            else:
                self.versions = [t._version for t in tensors]
                self.copies = [t.detach().clone() for t in tensors]
        except (AttributeError, RuntimeError):  # no compiled kernels, no version counter, not strided
            pass

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors``, the first ones or all, hold what they held then."""
        if self.copies is None:
            return False
        if self.versions is not None:
            return [t._version for t in tensors] == self.versions[: len(tensors)]
        with torch._C._AutoDispatchBelowAutograd():
            return not tensors or torch.ops.cnnlstm_fast.same_contents.default(self.copies, tensors)

    def then(self, t: Tensor) -> Tensor | None:
        """What ``t`` held, as a new tensor; None where it holds the same, or is not among the tensors."""
        at = 0
        for number, one in enumerate(self.tensors):
            size = one.numel() * one.element_size()
            if one is t and self.copies is not None:
                if self.versions is not None:
                    then, same = self.copies[number], self.versions[number] == t._version
                else:
                    then = cast(Tensor, self.copies)[at : at + size].view(t.dtype).view(t.shape)
                    same = torch.equal(_bits(then), _bits(t.detach()))
                return None if same else torch.empty_like(t.detach()).copy_(then)
            at += -(-size // 16) * 16
        return None


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().flatten().view(torch.uint8)
