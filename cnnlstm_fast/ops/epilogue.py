"""What stands behind a convolution or a linear layer, as an op of its own: a short program in one pass.

``z`` is a map (N, C, ...) of up to 5 dimensions, contiguous or channels-last. The result lies as it does.

Schema terms:

- ``stages``: the program, in order. :data:`~cnnlstm_fast.spec.NORM_STAGE` is a batch norm over ``gamma``,
  ``beta``, and ``mean`` and ``var``; without these two, over the statistics of the batch, which ``moments``
  (:data:`moments_op`) may have found before.
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

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cnnlstm_fast.ops.conv_block import Unchecked, WithZeros
from cnnlstm_fast.ops.cuda import register_cuda
from cnnlstm_fast.reference import epilogue_by_args
from cnnlstm_fast.spec import (
    ACTIVATIONS,
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
    "epilogue(Tensor z, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, Tensor? moments, "
    "Tensor? added, int[] stages, float[] numbers, float eps, bool keep) -> (Tensor, Tensor, Tensor)"
)
_lib.define("epilogue_moments(Tensor z, int[] stages, float[] numbers) -> Tensor")
_lib.define(
    "epilogue_backward(Tensor grad, Tensor? z, Tensor passed, Tensor stats, int[] stages, float[] numbers, "
    "float eps, bool given, bool need_z, bool need_added) -> (Tensor, Tensor, Tensor)"
)

forward_op = torch.ops.cnnlstm_fast.epilogue.default
#: Mean and biased variance of the norm's argument over the batch, float64 (2, C).
moments_op = torch.ops.cnnlstm_fast.epilogue_moments.default
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
        _, c, h, w = z.shape
        return z.stride() == (c * h * w, 1, c * w, c)
    if z.dim() == 5:
        _, c, d, h, w = z.shape
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
def _(z, gamma, beta, mean, var, moments, added, stages, numbers, eps, keep):
    shape = [0]
    if keep and keeps_bits(stages):
        if z.device.type == "cpu":
            shape = bits_shape(z.shape[0], z.shape[1], math.prod(z.shape[2:]), lies_inside(z))
        else:
            shape = [z.numel()]
    stats = [4, z.shape[1]] if NORM_STAGE in stages else [0]
    return (
        torch.empty_like(z), z.new_empty(shape, dtype=torch.uint8), z.new_empty(stats, dtype=torch.float64),
    )  # fmt: skip


@torch.library.register_fake("cnnlstm_fast::epilogue_moments", lib=_lib)
def _(z, stages, numbers):
    return z.new_empty([2, z.shape[1]], dtype=torch.float64)


@torch.library.register_fake("cnnlstm_fast::epilogue_backward", lib=_lib)
def _(grad, z, passed, stats, stages, numbers, eps, given, need_z, need_added):
    sums = [2, grad.shape[1]] if NORM_STAGE in stages and z is not None else [0]
    return (
        torch.empty_like(grad) if need_z else grad.new_empty(0),
        torch.empty_like(grad) if need_added else grad.new_empty(0),
        grad.new_empty(sums, dtype=torch.float64),
    )


register_cuda("epilogue", "epilogue", "forward", x_at=0)
register_cuda("epilogue_moments", "epilogue", "moments", x_at=0)
register_cuda("epilogue_backward", "epilogue", "backward", x_at=0)


class EpilogueFunction(torch.autograd.Function):
    """Autograd around the op; gives the result and the statistics.

    These are the result's place in the graph, too: PyTorch's gradients of an activation depend on its
    argument, with second derivatives of zero where it has two slopes.
    """

    @staticmethod
    def forward(ctx, z, gamma, beta, mean, var, moments, added, stages, numbers, eps):
        needs = ctx.needs_input_grad
        out, passed, stats = forward_op(z, gamma, beta, mean, var, moments, added, stages, numbers, eps, True)
        ctx.args = stages, numbers, eps
        ctx.set_materialize_grads(False)
        ctx.beta = Unchecked(beta)
        last = len(stages) - 2 if keeps_bits(stages) else len(stages)
        before = [stage for stage in stages[:last] if stage != ADD_STAGE]
        # Without a norm and a curve before the sum no gradient depends on z, and PyTorch keeps none either.
        reads_z = any(needs[i] for i in (0, 1, 2)) and bool(before)
        ctx.shape, ctx.like, ctx.dtype = z.shape, z.stride(), z.dtype
        ctx.save_for_backward(z if reads_z else None, gamma, mean, var, passed, stats)
        return out, stats

    @staticmethod
    def backward(ctx, grad, zeros):
        if grad is None and zeros is None:
            return (None,) * 10
        z, gamma, mean, var, passed, stats = ctx.saved_tensors
        stages, numbers, eps = ctx.args
        needs = ctx.needs_input_grad[:7]
        if grad is None:
            grad = zeros.new_zeros(ctx.shape, dtype=ctx.dtype)
        if torch.is_grad_enabled():  # create_graph=True: a backward that can be differentiated
            return *_differentiable(ctx, grad, z, gamma, mean, var, passed, stats, needs), None, None, None
        if not any(needs[:3]):  # only the added tensor does: no gradient flows past the sum
            at = stages.index(ADD_STAGE)
            stages, numbers, stats = stages[at:], numbers[2 * at :], stats.new_empty(0)
        grad = _as_strides(grad, ctx.like)
        dz, dadded, sums = backward_op(
            grad, z, passed, stats, stages, numbers, eps, mean is not None, needs[0], needs[6]
        )
        beta = ctx.beta.held
        return (
            dz if needs[0] else None,
            sums[0].to(gamma.dtype) if needs[1] else None,
            sums[1].to(beta.dtype) if needs[2] else None,
            None,
            None,
            None,
            dadded if needs[6] else None,
            None,
            None,
            None,
        )


def _as_strides(grad: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A gradient with these strides; of a tensor of zeros without memory an op would get one number."""
    if grad.stride() == stride and not grad._is_zerotensor():
        return grad
    return torch.empty_strided(grad.shape, stride, dtype=grad.dtype, device=grad.device).copy_(grad)


def bits_as_mask(passed: Tensor, like: Tensor) -> Tensor:
    """The bits of a program's backward as a bool map, in the shape and the strides of ``like``."""
    flat = passed
    if like.device.type == "cpu":
        inside, positions = lies_inside(like), math.prod(like.shape[2:])
        width = like.shape[1] if inside or positions == 1 else positions
        bits = passed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
        flat = bits.flatten(1)[:, :width].flatten()
    mask = torch.empty_like(like, dtype=torch.bool)
    mask.as_strided((mask.numel(),), (1,)).copy_(flat)
    return mask


def _differentiable(ctx, grad, z, gamma, mean, var, passed, stats, needs) -> tuple[Any, ...]:
    """Gradients through plain PyTorch."""
    stages, numbers, eps = ctx.args
    found: list[Tensor | None] = [None] * 7
    before, of_numbers = list(stages), list(numbers)
    if keeps_bits(stages):
        like = torch.empty_strided(grad.shape, ctx.like, dtype=grad.dtype, device=grad.device)
        mask, leaky = bits_as_mask(passed, like), stages[-1] - FIRST_ACTIVATION == ACTIVATIONS["leaky_relu"]
        grad = WithZeros.apply(grad.where(mask, grad * numbers[-2] if leaky else 0), stats)
        before, of_numbers = before[:-1], of_numbers[:-2]
    if before and before[-1] == ADD_STAGE:
        if needs[6]:
            found[6] = grad * of_numbers[-2]
        before, of_numbers = before[:-1], of_numbers[:-2]
    if not any(needs[:3]):
        return tuple(found)
    if not before:
        found[0] = grad
        return tuple(found)
    inputs: list[Any] = [
        None if t is None else torch.ops.aten.alias.default(t) for t in (z, gamma, ctx.beta.as_it_was())
    ]
    wanted = [t for t, need in zip(inputs, needs[:3], strict=True) if need]
    z, gamma, beta = inputs
    again = epilogue_by_args(z, gamma, beta, mean, var, None, before, of_numbers, eps)
    given = iter(torch.autograd.grad(again, wanted, grad, create_graph=True))
    for i in range(3):
        found[i] = next(given) if needs[i] else None
    return tuple(found)
