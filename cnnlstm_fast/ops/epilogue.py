"""What stands behind a convolution or a linear layer, as an op of its own: a short program in one pass.

``z`` is a map (N, C, ...) of up to 5 dimensions, contiguous or channels-last. The result lies as it does.

Schema terms:

- ``stages``: the program, in order. :data:`~cnnlstm_fast.spec.NORM_STAGE` is a batch norm over ``gamma``,
  ``beta``, and ``mean`` and ``var``; without these two, over the statistics of the batch.
  :data:`~cnnlstm_fast.spec.ADD_STAGE` adds the tensor ``added``, which lies in memory as ``z`` does. An
  activation is its number more than :data:`~cnnlstm_fast.spec.FIRST_ACTIVATION`.
- ``numbers``: two for each stage: what ``added`` is multiplied by, or the activation's numbers.
- ``keep``: also return what the backward reads: a bit for each element (whether the activation behind the
  sum has a slope of 1), which stands for the added tensor. Otherwise it is empty.
- ``stats``: mean, biased variance, scale and shift of every channel as float64 (4, C), as in
  :mod:`cnnlstm_fast.ops.conv_norm`; empty without a norm.

At most one norm and one sum, the norm first, and one activation behind the sum: :func:`why_not` says so in
words. The backward keeps ``z`` and the bits, and computes what lies between again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cnnlstm_fast.limits import kernel_limit
from cnnlstm_fast.ops.conv_block import Unchecked
from cnnlstm_fast.reference import epilogue_by_args
from cnnlstm_fast.spec import (
    ADD_STAGE,
    EPILOGUE_STEPS,
    FIRST_ACTIVATION,
    NORM_STAGE,
    TWO_SLOPES,
    bits_shape,
    epilogue_steps,
    keeps_bits,
)

_lib = torch.library.Library("cnnlstm_fast", "FRAGMENT")
_lib.define(
    "epilogue(Tensor z, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, Tensor? added, int[] stages, "
    "float[] numbers, float eps, bool keep) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "epilogue_backward(Tensor grad, Tensor? z, Tensor passed, Tensor stats, int[] stages, float[] numbers, "
    "float eps, bool given, bool need_z, bool need_added) -> (Tensor, Tensor, Tensor)"
)

forward_op = torch.ops.cnnlstm_fast.epilogue.default
backward_op = torch.ops.cnnlstm_fast.epilogue_backward.default


def why_not(stages: Sequence[int], keep: bool) -> str | None:
    """Why the kernels don't take a program, as a sentence; None if they do.

    Args:
        keep: a backward follows.
    """
    if stages.count(NORM_STAGE) > 1 or stages.count(ADD_STAGE) > 1:
        return "one pass takes one norm and one sum"
    if ADD_STAGE in stages:
        behind = stages[stages.index(ADD_STAGE) + 1 :]
        if NORM_STAGE in behind or len(behind) > 1:
            return "one activation may follow a sum"
        if keep and behind and behind[0] - FIRST_ACTIVATION not in TWO_SLOPES:
            return "in training an activation behind a sum must have two slopes, as ReLU has"
    if not 0 < epilogue_steps(stages) <= EPILOGUE_STEPS:
        return "the program is too long"
    return None


def lies_inside(z: Tensor) -> bool:
    """Whether a dense map's channels lie innermost, and it is not contiguous as well."""
    return not z.is_contiguous()


def is_dense(z: Tensor) -> bool:
    """Whether the op takes a map as it lies in memory: contiguous or channels-last."""
    if z.is_contiguous():
        return True
    if z.dim() == 4:
        n, c, h, w = z.shape
        return z.stride() == (c * h * w, 1, c * w, c)
    if z.dim() == 5:
        n, c, d, h, w = z.shape
        return z.stride() == (c * d * h * w, 1, c * h * w, c * w, c)
    return False


def as_map(t: Tensor, like: Tensor | None = None) -> Tensor:
    """The tensor with strides that the op takes, or with those of ``like``."""
    if like is None:
        return t if is_dense(t) else t.contiguous()
    if t.stride() == like.stride():
        return t
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    inside = lies_inside(like)
    t = t.contiguous(memory_format=formats[t.dim()] if inside else torch.contiguous_format)
    return t if t.stride() == like.stride() else torch.empty_like(like).copy_(t)


@torch.library.register_fake("cnnlstm_fast::epilogue", lib=_lib)
def _(z, gamma, beta, mean, var, added, stages, numbers, eps, keep):
    shape = [0]
    if keep and keeps_bits(stages):
        if z.device.type == "cpu":
            positions = z.numel() // max(1, z.shape[0] * z.shape[1])
            sizes = z.shape[0], z.shape[1], positions, lies_inside(z)
            shape = bits_shape(*sizes, kernel_limit("EPILOGUE_TILE"), kernel_limit("EPILOGUE_PLANE"))
        else:
            shape = [z.numel()]
    stats = [4, z.shape[1]] if NORM_STAGE in stages else [0]
    return (
        torch.empty_like(z), z.new_empty(shape, dtype=torch.uint8), z.new_empty(stats, dtype=torch.float64),
    )  # fmt: skip


@torch.library.register_fake("cnnlstm_fast::epilogue_backward", lib=_lib)
def _(grad, z, passed, stats, stages, numbers, eps, given, need_z, need_added):
    sums = [2, grad.shape[1]] if NORM_STAGE in stages and z is not None else [0]
    return (
        torch.empty_like(grad) if need_z else grad.new_empty(0),
        torch.empty_like(grad) if need_added else grad.new_empty(0),
        grad.new_empty(sums, dtype=torch.float64),
    )


class EpilogueFunction(torch.autograd.Function):
    """Autograd around the op; gives the result and the statistics."""

    @staticmethod
    def forward(ctx, z, gamma, beta, mean, var, added, stages, numbers, eps):
        needs = ctx.needs_input_grad
        out, passed, stats = forward_op(z, gamma, beta, mean, var, added, stages, numbers, eps, True)
        ctx.args = stages, numbers, eps
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.gamma, ctx.beta = Unchecked(gamma), Unchecked(beta)
        last = len(stages) - 2 if keeps_bits(stages) else len(stages)
        before = [stage for stage in stages[:last] if stage != ADD_STAGE]
        # Without a norm and a curve before the sum, gradients don't depend on z, and PyTorch keeps it neither.
        reads_z = any(needs[i] for i in (0, 1, 2)) and bool(before)
        ctx.like = z.stride()
        ctx.save_for_backward(z if reads_z else None, mean, var, passed, stats)
        return out, stats

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 9
        z, mean, var, passed, stats = ctx.saved_tensors
        stages, numbers, eps = ctx.args
        needs = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():  # create_graph=True: a backward that can be differentiated
            return *_differentiable(ctx, grad, z, mean, var, passed, needs), None, None, None
        grad = _as_strides(grad, ctx.like)
        dz, dadded, sums = backward_op(
            grad, z, passed, stats, stages, numbers, eps, mean is not None, needs[0], needs[5]
        )
        gamma, beta = ctx.gamma.held, ctx.beta.held
        return (
            dz if needs[0] else None,
            sums[0].to(gamma.dtype) if needs[1] else None,
            sums[1].to(beta.dtype) if needs[2] else None,
            None,
            None,
            dadded if needs[5] else None,
            None,
            None,
            None,
        )


def _as_strides(grad: Tensor, stride: tuple[int, ...]) -> Tensor:
    if grad.stride() == stride:
        return grad
    return torch.empty_strided(grad.shape, stride, dtype=grad.dtype, device=grad.device).copy_(grad)


def bits_as_mask(passed: Tensor, like: Tensor) -> Tensor:
    """The bits of a program's backward as a bool map, in the shape and the strides of ``like``."""
    n, c = like.shape[:2]
    positions = like.numel() // max(1, n * c)
    if like.device.type != "cpu":
        flat = passed.bool()
    else:
        bits = (passed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten(1)
        tile, plane = kernel_limit("EPILOGUE_TILE"), kernel_limit("EPILOGUE_PLANE")
        inside = lies_inside(like)
        if inside or positions == 1:
            counts = _counts(n * positions, max(1, tile // c), c)
        elif positions >= plane:
            counts = _counts(positions, -(-positions // -(-positions // tile)), 1) * (n * c)
        else:
            counts = _counts(c, min(max(tile // positions, 1), c), positions) * n
        flat = torch.cat([row[:count] for row, count in zip(bits, counts, strict=True)])
    mask = torch.empty_like(like, dtype=torch.bool)
    mask.as_strided((mask.numel(),), (1,)).copy_(flat)
    return mask


def _counts(total: int, per: int, times: int) -> list[int]:
    return [min(per, total - at) * times for at in range(0, total, per)]


def _differentiable(ctx, grad, z, mean, var, passed, needs) -> tuple[Any, ...]:
    """Gradients through plain PyTorch."""
    stages, numbers, eps = ctx.args
    found: list[Tensor | None] = [None] * 6
    before, of_numbers = list(stages), list(numbers)
    if keeps_bits(stages):
        like = torch.empty_strided(grad.shape, ctx.like, dtype=grad.dtype, device=grad.device)
        leaky = stages[-1] - FIRST_ACTIVATION not in (1, 2)
        grad = grad * torch.where(bits_as_mask(passed, like), 1.0, numbers[-2]).to(grad.dtype) if leaky else (
            grad.where(bits_as_mask(passed, like), 0)
        )
        before, of_numbers = before[:-1], of_numbers[:-2]
    if before and before[-1] == ADD_STAGE:
        if needs[5]:
            found[5] = grad * of_numbers[-2]
        before, of_numbers = before[:-1], of_numbers[:-2]
    if not any(needs[:3]):
        return tuple(found)
    if not before:
        found[0] = grad
        return tuple(found)
    inputs = [None if t is None else t.view_as(t) for t in (z, ctx.gamma.as_it_was(), ctx.beta.as_it_was())]
    wanted = [t for t, need in zip(inputs, needs[:3], strict=True) if need]
    again = epilogue_by_args(*inputs, mean, var, None, before, of_numbers, eps)  # type: ignore[arg-type]
    given = iter(torch.autograd.grad(again, wanted, grad, create_graph=True))
    for i in range(3):
        found[i] = next(given) if needs[i] else None
    return tuple(found)
