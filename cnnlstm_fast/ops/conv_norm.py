"""The block op with a batch norm: ``layout(pool(act(batch_norm(conv2d(x)))))``.

There are three ways:

- Given statistics (eval mode): the op ``fold_norm`` folds them into the convolution's weight and bias, and a
  block without a norm runs. Where the norm's weight needs a gradient, ``conv_norm_block`` runs instead,
  because the gradient through the fold is a difference of two large sums.
- Statistics of the batch from the convolution's map: ``conv_norm_block`` and its backward.
- Statistics of the batch from products of taps: mean and variance of a convolution's map are ``w m`` and
  ``w C w``, where ``m`` and ``C`` are mean and covariance of the patches under the kernel. With few taps this
  costs less than a pass over the map. Then they are folded, and a block without a norm runs.

``conv_norm_block`` keeps for its backward the codes and z at every argmax position; the backward computes the
map again. With ``keep_map`` it keeps the map too. Without a pool it keeps the map alone.

Schema terms are those of :mod:`cnnlstm_fast.ops.conv_block`; ``stats`` holds mean, biased variance, scale
and shift of every channel as float64 (4, C). A convolution's bias changes nothing under batch statistics
but the running mean, and ``stats`` has the mean without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnnlstm_fast.ops.conv_block import Unchecked, new_like_input, saved_and_unsaved
from cnnlstm_fast.ops.cuda import register_cuda
from cnnlstm_fast.reference import conv_block_by_args
from cnnlstm_fast.spec import codes_shape, map_size, pool_size, raw_shape

_lib = torch.library.Library("cnnlstm_fast", "FRAGMENT")
_lib.define(
    "fold_norm(Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, float eps) "
    "-> (Tensor, Tensor)"
)
_lib.define(
    "conv_norm_block(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? mean, "
    "Tensor? var, float eps, int[] conv, int activation, float[] act, int[] pool, int[] order, int plan, "
    "bool keep, bool keep_map) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "conv_norm_block_backward(Tensor grad, Tensor x, Tensor weight, Tensor stats, Tensor codes, Tensor kept, "
    "Tensor map, float eps, int[] conv, int activation, float[] act, int[] pool, int[] order, int plan, "
    "bool given, bool need_x, bool need_weight) -> (Tensor, Tensor, Tensor)"
)
_lib.define("patch_moments(Tensor x, Tensor weight, int[] conv) -> Tensor")

fold_op = torch.ops.cnnlstm_fast.fold_norm.default
forward_op = torch.ops.cnnlstm_fast.conv_norm_block.default
backward_op = torch.ops.cnnlstm_fast.conv_norm_block_backward.default
moments_op = torch.ops.cnnlstm_fast.patch_moments.default


@torch.library.register_fake("cnnlstm_fast::fold_norm", lib=_lib)
def _(weight, bias, gamma, beta, mean, var, eps):
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


@torch.library.register_fake("cnnlstm_fast::conv_norm_block", lib=_lib)
def _(x, weight, bias, gamma, beta, mean, var, eps, conv, activation, act, pool, order, plan, keep, keep_map):
    conv_hw = map_size(x.shape[2:], weight.shape[2:], conv)
    size = pool_size(conv_hw, pool)
    n, c = x.shape[0], weight.shape[0]
    out = x.new_empty(raw_shape(order, n, c, size))
    codes = codes_shape(pool[0] * pool[1], n, c, size) if keep and pool else [0]
    kept = out.shape if keep and pool else [0]
    kept_map = [n, *conv_hw, c] if keep and (not pool or (keep_map and mean is None)) else [0]
    stats = x.new_empty([4, c], dtype=torch.float64)
    return out, x.new_empty(codes, dtype=torch.uint8), x.new_empty(kept), x.new_empty(kept_map), stats


@torch.library.register_fake("cnnlstm_fast::conv_norm_block_backward", lib=_lib)
def _(
    grad, x, weight, stats, codes, kept, map, eps, conv, activation, act, pool, order, plan, given,
    need_x, need_weight,
):  # fmt: skip
    return (
        new_like_input(x) if need_x else x.new_empty(0),
        weight.new_empty(weight.shape if need_weight else [0]),
        stats.new_empty([2, weight.shape[0]]),
    )


@torch.library.register_fake("cnnlstm_fast::patch_moments", lib=_lib)
def _(x, weight, conv):
    taps = weight.shape[1] * weight.shape[2] * weight.shape[3]
    return x.new_empty([taps + 1, taps], dtype=torch.float64)


class FoldNorm(torch.autograd.Function):
    """Weight and bias of one convolution that equals a convolution and a batch norm.

    It gives no gradient of the norm's weight; :class:`ConvNormFunction` does.
    """

    @staticmethod
    def forward(ctx, weight, bias, gamma, beta, mean, var, eps):
        ctx.save_for_backward(weight, gamma, var)
        ctx.eps = eps
        # A tensor that no gradient reads is not saved, so the program may write to it.
        ctx.dtypes = [None if t is None else t.dtype for t in (bias, beta)]
        return fold_op(weight, bias, gamma, beta, mean, var, eps)

    @staticmethod
    def backward(ctx, grad_weight, grad_bias):
        weight, gamma, var = ctx.saved_tensors
        of_bias, of_beta = ctx.dtypes
        inverse = (var.double() + ctx.eps).rsqrt()
        scale = inverse if gamma is None else inverse * gamma
        db = grad_bias.double()
        dw = grad_weight * scale.to(weight.dtype).view(-1, 1, 1, 1) if ctx.needs_input_grad[0] else None
        dbias = (db * scale).to(of_bias) if ctx.needs_input_grad[1] else None
        dbeta = grad_bias.to(of_beta) if ctx.needs_input_grad[3] else None
        return dw, dbias, None, dbeta, None, None, None


def fold(
    weight: Tensor, bias: Tensor | None, norm: Sequence[Tensor | None], eps: float, trained: bool
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the eval mode of a norm folded in.

    ``norm`` is its weight, bias, running mean and variance; ``trained`` says whether any wants a gradient.
    """
    args = weight, bias, *norm, eps
    return FoldNorm.apply(*args) if trained else fold_op(*args)


def fold_batch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    conv,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fold the statistics of a convolution's map into the weights, without computing the map.

    Differentiable in all but ``x``.

    Returns:
        weight and bias, and the mean (without the bias) and biased variance in float64.
    """
    moments = moments_op(x.detach(), weight.detach(), conv)
    rows = weight.flatten(1).double()
    mean = rows @ moments[-1]
    var = ((rows @ moments[:-1]) * rows).sum(1).clamp_min(0)
    scale = (var + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale
    if beta is not None:
        shift = shift + beta
    if bias is not None:
        shift = shift + 0 * bias  # the norm removes the bias: its gradient is zero, not missing
    folded = (rows * scale[:, None]).to(weight.dtype).view(weight.shape)
    return folded, shift.to(weight.dtype), mean.detach(), var.detach()


class ConvNormFunction(torch.autograd.Function):
    """Autograd around ``conv_norm_block``; gives the raw result and the statistics."""

    @staticmethod
    def forward(
        ctx, x, weight, bias, gamma, beta, mean, var, eps, conv, activation, act, pool, order, plan, keep_map
    ):
        args = conv, activation, act, pool, order, plan
        need_x, need_weight = ctx.needs_input_grad[:2]
        keep_map |= not need_weight  # else the backward would read an input that PyTorch's does not save
        raw, codes, kept, kept_map, stats = forward_op(
            x, weight, bias, gamma, beta, mean, var, eps, *args, True, keep_map
        )
        ctx.args = eps, conv, activation, act, pool, order, plan
        ctx.mark_non_differentiable(stats)
        ctx.bias, ctx.beta = Unchecked(bias), Unchecked(beta)
        saved, ctx.unsaved = saved_and_unsaved(x, weight, (need_x, need_weight))
        recomputes = mean is None and kept_map.numel() == 0
        ctx.weight = Unchecked(weight if recomputes and not need_x else None).held
        ctx.save_for_backward(*saved, gamma, mean, var, codes, kept, kept_map, stats)
        return raw, stats

    @staticmethod
    def backward(ctx, grad, _):
        x, weight, gamma, mean, var, codes, kept, kept_map, stats = ctx.saved_tensors
        eps, *args, plan = ctx.args
        needs = ctx.needs_input_grad[:5]
        of_x, of_weight = ctx.unsaved
        if torch.is_grad_enabled():  # create_graph=True: a backward that can be differentiated
            x = of_x.value() if x is None else x
            weight = of_weight.value() if weight is None else weight
            inputs = [x, weight, ctx.bias.as_it_was(), gamma, ctx.beta.as_it_was()]
            inputs = [None if t is None else torch.ops.aten.alias.default(t) for t in inputs]
            wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
            x, weight, bias, *affine = inputs
            again = conv_block_by_args(x, weight, bias, *args, norm=(mean, var, *affine, eps))
            found = iter(torch.autograd.grad(again, wanted, grad, create_graph=True))
            return *(next(found) if need else None for need in needs), *(None,) * 10
        bias, beta = ctx.bias.held, ctx.beta.held
        given = mean is not None
        if x is None:  # no gradient reads it
            x = of_x.tensor
        if weight is None:
            weight = of_weight.tensor if ctx.weight is None else ctx.weight
        dx, dweight, sums = backward_op(
            grad, x, weight, stats, codes, kept, kept_map, eps, *args, plan, given, needs[0], needs[1]
        )
        dbias = None
        if needs[2]:  # zero under batch statistics, unless a sum is infinite or NaN
            dbias = (sums[1] * (stats[2] if given else 0)).to(bias.dtype)
        return (
            dx if needs[0] else None,
            dweight if needs[1] else None,
            dbias,
            sums[0].to(gamma.dtype) if needs[3] else None,
            sums[1].to(beta.dtype) if needs[4] else None,
            *(None,) * 10,
        )


def update_running(norm, bias: Tensor | None, mean: Tensor, var: Tensor, count: int) -> None:
    """Update the running statistics of a batch norm, as ``nn.BatchNorm2d`` does.

    Args:
        bias: of the convolution; it is not yet part of the mean.
        mean, var: of each channel, float64; the variance is biased.
        count: values per channel.
    """
    if not (norm.training and norm.track_running_stats):
        return
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    if norm.running_mean is None:
        return
    with torch.no_grad():
        mean = mean if bias is None else mean + bias
        # PyTorch's update does not count for a version either: a graph may have saved the tensors.
        running = [norm.running_mean.data, norm.running_var.data]
        found = [t.to(norm.running_mean.dtype) for t in (mean, var * (count / (count - 1)))]
        torch._foreach_lerp_(running, found, momentum)


# Statistics from products of taps are the CPU's alone.
register_cuda("fold_norm", "conv_norm", "fold", x_at=0)
register_cuda("conv_norm_block", "conv_norm", "forward", x_at=0)
register_cuda("conv_norm_block_backward", "conv_norm", "backward", x_at=1)
