"""What the Tensor subclasses of this package share: observed tensors, placeholders and carried maps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

no_function = torch._C.DisableTorchFunctionSubclass

#: What a program may ask of such a tensor without reading its values.
METADATA = {
    *(getattr(Tensor, name).__get__ for name in (
        "shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_sparse", "is_leaf",
        "is_nested",
    )),
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.__len__, torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip


class _Alias(torch.autograd.Function):
    """The identity, whose result is another tensor over the same memory."""

    @staticmethod
    def forward(ctx, x, alias):
        return alias(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def alias(x: Tensor) -> Tensor:
    """Another tensor over the same memory, with the same version counter, behind the same gradient.

    It is no view of ``x``, and autograd may save it without holding the object ``x``.
    """
    return _Alias.apply(x, Tensor.detach)


def unversioned_alias(x: Tensor) -> Tensor:
    """As :func:`alias`, with a version counter of its own: its memory may be exchanged or written to."""
    return _Alias.apply(x, _data) if x.requires_grad else x.data


def alias_by(x: Tensor, make: Callable[[Any], Tensor]) -> Tensor:
    """As :func:`alias`, with the tensor that ``make`` makes of ``x``."""
    return _Alias.apply(x, make)


def _data(x: Tensor) -> Tensor:
    return x.data


@contextlib.contextmanager
def outside_of_transforms() -> Iterator[None]:
    """While this is entered, no transform of ``torch.func`` and no dispatch mode sees an operator.

    A tensor that a transform has wrapped must not become another one's memory: PyTorch crashes.
    """
    with temporarily_clear_interpreter_stack(), _disable_current_modes():
        yield


def awaits_sum(args: tuple) -> bool:
    """Whether an operand is a value of a chain, which a sum may extend."""
    return any([getattr(type(value), "waits_for_sums", False) for value in args])
