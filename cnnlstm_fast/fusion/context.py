"""The modes under which a convolution is called, and what its operands hold at that moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


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
