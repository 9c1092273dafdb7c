"""Trying calls: what a model gives for copies of its arguments, and whether a program gives the same.

A caller's own arguments are never tried on, since a model may write to them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

#: Errors of a result that are rounding, relative to its largest value: in float32 or float64, and else as a
#: multiple of the dtype's precision.
_ROUNDING, _ROUNDING_EPS = 1e-3, 8


class Trial:
    """A call of a model on copies of its arguments.

    Attributes:
        args, kwargs: the copies. tensors: those among them.
        results: what the model gave.
        wrote: whether it changed its arguments.

    Raises:
        Exception: whatever the model raises.
    """

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict):
        self.args, self.kwargs = copied(args, kwargs)
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        before = [t._version for t in self.tensors]
        self.results = model(*self.args, **self.kwargs)
        after, spec_after = pytree.tree_flatten((self.args, self.kwargs))
        same = spec_after == spec and all(a is b for a, b in zip(after, leaves, strict=True))
        self.wrote = not same or [t._version for t in self.tensors] != before

    def gave(self, results: Any) -> bool:
        """Whether the model did nothing but give such results, which a program gave for ``tensors``."""
        return (
            not self.wrote
            and same_results(results, self.results)
            and _memory(self.tensors, results) == _memory(self.tensors, self.results)
        )

    def did_as(self, other: Trial) -> bool:
        """Whether two models gave the same, and left the same in their arguments."""
        return same_results(
            (self.args, self.kwargs, self.results), (other.args, other.kwargs, other.results)
        ) and _memory(self.tensors, self.results) == _memory(other.tensors, other.results)


def _memory(arguments: list[Tensor], results: Any) -> list[tuple[int, int]]:
    """For each tensor of the results the first argument or result that it is, and whose memory it is."""
    tensors = [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]
    objects = [id(t) for t in [*arguments, *tensors]]
    memory = [t.untyped_storage()._cdata for t in [*arguments, *tensors]]
    return [(objects.index(objects[i]), memory.index(memory[i])) for i in range(len(arguments), len(memory))]


def copied(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Copies of a call's arguments, of the same strides."""
    return pytree.tree_map(lambda v: _copy(v) if isinstance(v, Tensor) else v, (args, kwargs))


def _copy(t: Tensor) -> Tensor:
    """A copy of the same strides, those that let elements lie upon each other too."""
    t = t.detach()
    if t.layout is not torch.strided or t.device.type == "meta" or t.numel() == 0:
        return t.clone()
    if t.is_contiguous() or type(t) is not Tensor or t.is_neg() or t.is_conj():
        return t.clone()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((extent,), (1,)).clone().as_strided(t.shape, t.stride(), 0)


def same_results(found: Any, expected: Any) -> bool:
    """Whether two results agree but for rounding: structure, shapes, dtypes, strides, and values."""
    a, of_a = pytree.tree_flatten(found)
    b, of_b = pytree.tree_flatten(expected)
    return of_a == of_b and all(map(_same, a, b))


def _same(a: Any, b: Any) -> bool:
    if not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype or not _same_order(a, b):
        return False
    if not b.is_floating_point():
        return torch.equal(a, b)
    eps = torch.finfo(b.dtype).eps
    a, b = a.detach().double(), b.detach().double()
    finite = b.isfinite()
    if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a[b.isinf()], b[b.isinf()]):
        return False
    scale = b[finite].abs().max().item() if finite.any() else 0.0
    return bool(((a - b)[finite].abs() <= max(_ROUNDING, _ROUNDING_EPS * eps) * scale).all())


def _same_order(a: Tensor, b: Tensor) -> bool:
    """Whether strides are the same where a size of 1 does not make them free."""
    return (
        all(s == t or n == 1 for s, t, n in zip(a.stride(), b.stride(), a.shape, strict=True))
        or a.numel() == 0
    )
