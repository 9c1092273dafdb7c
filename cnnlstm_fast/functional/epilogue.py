"""What follows a convolution, as one call of the op ``epilogue``: checks, and the running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cnnlstm_fast.functional.arguments import fused_activation
from cnnlstm_fast.ops import conv_norm
from cnnlstm_fast.ops import epilogue as op
from cnnlstm_fast.planning import costs
from cnnlstm_fast.planning.support import (
    needs_gradient,
    norm_tensors,
    of_batch,
    records_gradients,
    unhooked,
    why_not_fused,
    why_not_norm_tensors,
)
from cnnlstm_fast.spec import ACTIVATIONS, ADD_STAGE, FIRST_ACTIVATION, NORM_STAGE

_KINDS = {
    NORM_STAGE: "norm", ADD_STAGE: "sum",
    **{FIRST_ACTIVATION + number: costs.activation_kind(name) for name, number in ACTIVATIONS.items()},
}  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Sum(NamedTuple):
    """A stage that adds another tensor, multiplied by ``alpha``."""

    alpha: float = 1.0


class Program(NamedTuple):
    """Stages as the op takes them.

    Attributes:
        stages, numbers: see :mod:`cnnlstm_fast.ops.epilogue`.
        norm: the module of the norm, or None.
    """

    stages: list[int]
    numbers: list[float]
    norm: nn.Module | None

    @property
    def kinds(self) -> list[str]:
        """The stages' kinds, by which :func:`cnnlstm_fast.planning.costs.epilogue_saves` counts them."""
        return [_KINDS[stage] for stage in self.stages]


def program_of(stages: Sequence[nn.Module | Sum]) -> Program | str:
    """Stages (batch norms, activations, sums) as a program, or why the kernels don't take one of them."""
    numbers: list[float] = []
    found: list[int] = []
    norm = None
    for stage in stages:
        if isinstance(stage, Sum):
            found.append(ADD_STAGE)
            numbers += [float(stage.alpha), 0.0]
        elif type(stage) in NORMS:
            if not unhooked(stage):
                return "the norm has hooks or a forward of its own"
            norm = stage
            found.append(NORM_STAGE)
            numbers += [0.0, 0.0]
        else:
            activation = fused_activation(stage)
            if isinstance(activation, str):
                return activation
            name, values = activation
            found.append(FIRST_ACTIVATION + ACTIVATIONS[name])
            numbers += [*map(float, values), 0.0, 0.0][:2]
    return Program(found, numbers, norm)


def why_not_epilogue(z: Tensor, program: Program | str, trained: bool) -> str | None:
    """Why the kernels don't run a program behind ``z``, as a sentence; None if they do."""
    if isinstance(program, str):
        return program
    why = op.why_not(program.stages, trained)
    if why is None and not 2 <= z.dim() <= 5:
        why = "an epilogue takes a batch"
    if why is None and z.shape[1] == 0:
        why = "there are no channels"
    if why is None and z.device.type != "cpu":
        why = "the epilogue runs on the CPU"
    why = why or why_not_fused(z, z, None)
    if why is None and program.norm is not None:
        why = why_not_norm_tensors(z.device, z.dtype, program.norm, z.numel() // max(1, z.shape[1]))
    return why


def moments_of(z: Tensor, program: Program) -> Tensor:
    """Mean and biased variance over the batch of what the program's norm reads, float64 (2, C)."""
    with torch.no_grad():
        return op.moments_op(op.as_map(z.detach()), program.stages, program.numbers)


class _AsMap(torch.autograd.Function):
    """A tensor with the strides of another one; its gradient has its own strides, as PyTorch's sum gives it.

    PyTorch's gradient of ``instance_norm`` is wrong where it gets a channels-last one.
    """

    @staticmethod
    def forward(ctx, t, like):
        ctx.strides = t.stride()
        return op.as_map(t, like=like)

    @staticmethod
    def backward(ctx, grad):
        own = grad.new_empty_strided(grad.shape, ctx.strides)
        return own.copy_(grad) if op.is_dense(own) else grad, None


def run_program(
    z: Tensor, program: Program, added: Tensor | None = None, moments: Tensor | None = None
) -> Tensor:
    """The program behind ``z``; a norm in training mode updates its running statistics.

    Args:
        z: of any strides; the result is contiguous, or channels-last where ``z`` is.
        added: of the shape and dtype of ``z``.
        moments: the statistics of the batch, where :func:`moments_of` has found them. The caller has updated
            the running statistics then.
    """
    norm = program.norm
    z = op.as_map(z)
    if added is not None and added.stride() != z.stride():
        added = _AsMap.apply(added, z)
    gamma = beta = mean = var = None
    eps, by_batch = 0.0, False
    if norm is not None:
        gamma, beta, mean, var = norm_tensors(norm)
        eps, by_batch = norm.eps, of_batch(norm)  # type: ignore[assignment]
        if by_batch:
            mean = var = None
    args = z, gamma, beta, mean, var, moments, added, program.stages, program.numbers, eps
    if records_gradients() and needs_gradient(z, gamma, beta, added):
        out, stats = op.EpilogueFunction.apply(*args)
    else:
        out, _, stats = op.forward_op(*args, False)
    if by_batch and moments is None:
        mean, var = stats.detach()[:2]
        conv_norm.update_running(norm, None, mean, var, z.numel() // z.shape[1])
    return out
