"""What the tests of blocks with a batch norm share: random norms, PyTorch's own way, and the comparison."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers import (
    Block,
    activate,
    after_conv,
    as_2d,
    assert_close_as_torch,
    clear_winners,
    in_layout,
    our_activation,
    refusal,
    strided,
    torch_block,
)
from torch import Tensor, nn

from cnnlstm_fast.functional import conv_block


def random_norm(block: Block, training: bool, **keywords) -> nn.Module:
    """A batch norm with weights of both signs, zeros among them, and statistics that are no one's own."""
    norm = (nn.BatchNorm2d if block.rank == 4 else nn.BatchNorm1d)(block.c_out, **keywords)
    with torch.no_grad():
        if norm.affine:
            norm.weight.normal_()
            norm.bias.normal_()
            norm.weight[torch.randint(block.c_out, ())] = 0
        if norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.3, 3)
    return norm.train(training)


def eager(block: Block, x, weight, bias, norm, layout="channels_first") -> Tensor:
    bare = replace(block, activation=None, pool=None)
    y = activate(block, norm(torch_block(bare, x, weight, bias)))
    pool = block.pool_module()
    return in_layout(y if pool is None else pool(y), layout)


def ours(block: Block, x, weight, bias, norm, *, plan: str, layout="channels_first") -> Tensor:
    return conv_block(
        x, weight, bias, stride=block.stride, padding=block.padding, dilation=block.dilation,
        groups=block.groups, norm=norm, activation=our_activation(block), pool=block.pool_module(),
        layout=layout, plan=plan,
    )  # fmt: skip


def run(fn, tensors: dict[str, Tensor], norm: nn.Module, grad: Tensor | None, needs=("x", "weight", "bias")):
    """Result, gradients of the tensors in ``needs`` and of the norm, and what the norm remembers."""
    leaves = {k: t.detach().requires_grad_(k in needs and grad is not None) for k, t in tensors.items()}
    norm = copy.deepcopy(norm)
    out = fn(leaves["x"], leaves["weight"], leaves.get("bias"), norm)
    found = {"out": out.detach()}
    wanted = {k: t for k, t in leaves.items() if t.requires_grad}
    wanted |= {f"norm.{k}": t for k, t in norm.named_parameters() if t.requires_grad and grad is not None}
    if wanted:
        grads = torch.autograd.grad(out, list(wanted.values()), grad)
        found |= dict(zip(wanted, grads, strict=True))
    return found | {f"norm.{k}": t.clone() for k, t in norm.named_buffers()}


def decided(block: Block, tensors: dict[str, Tensor], norm: nn.Module) -> Tensor:
    """Where rounding changes no winner and no slope, as helpers.decided for blocks without a norm."""
    signal, dtype = block.rank == 3, tensors["x"].dtype
    flat, tensors = as_2d(block, tensors)
    true = {k: t.double() for k, t in tensors.items()}
    bare = replace(flat, activation=None, pool=None)
    z = torch_block(bare, **true)
    size = torch_block(bare, **{k: t.abs() for k, t in true.items()})
    given = not (norm.training or norm.running_mean is None)
    mean, var = (
        (norm.running_mean.double(), norm.running_var.double())
        if given
        else (z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False))
    )
    weight = norm.weight if norm.affine else torch.ones(block.c_out)
    shift = norm.bias if norm.affine else torch.zeros(block.c_out)
    scale = (weight.double() / (var + norm.eps).sqrt()).detach()[:, None, None]
    shift = shift.double().detach()[:, None, None]
    u = (z - mean[:, None, None]) * scale + shift
    slack = (
        64 * torch.finfo(torch.float32).eps * (size + mean.abs()[:, None, None])
    ) * scale.abs() + 4 * torch.finfo(dtype).eps * (
        (z.abs() + mean.abs()[:, None, None]) * scale.abs() + u.abs() + shift.abs()
    )
    clear = clear_winners(flat, u, slack, 4 * torch.finfo(dtype).eps)
    return clear.squeeze(2) if signal else clear


def random_grad(block: Block, tensors: dict[str, Tensor], norm: nn.Module) -> Tensor:
    """A gradient of the block's result, zero where rounding decides what it reaches."""
    clear = decided(block, tensors, norm)
    return (torch.randn(clear.shape) + 0.3).to(tensors["x"].dtype) * clear


def steady(block: Block, tensors: dict[str, Tensor], norm: nn.Module, grad: Tensor) -> bool:
    """Whether results and gradients are as large as their terms make likely.

    Through the batch's statistics a channel's gradient loses its mean and its part along the map, which may
    be nearly all of it. Then only noise is left, and the rule, which measures by the true norm, says nothing.
    """
    norm = copy.deepcopy(norm).double()
    bare = replace(block, activation=None, pool=None)
    true = {k: t.double().requires_grad_() for k, t in tensors.items()}
    squares = {k: t.detach().square().requires_grad_() for k, t in true.items()}
    z, terms = torch_block(bare, **true), torch_block(bare, **squares)
    over = [0, *range(2, z.dim())]
    of_batch = norm.training or norm.running_mean is None
    mean, var = z.mean(over), z.var(over, unbiased=False)
    if not of_batch:
        mean, var = norm.running_mean.clone(), norm.running_var.clone()

    def along(t):
        return t.detach().view(1, -1, *[1] * (z.dim() - 2))

    u = norm(z)
    out = after_conv(block, u)
    unit = (z.detach() - along(mean)) / along(var + norm.eps).sqrt()
    scale = along(norm.weight if norm.affine else torch.ones_like(var)) / along(var + norm.eps).sqrt()
    (g,) = torch.autograd.grad(out, u, grad.double(), retain_graph=True)
    (dz,) = torch.autograd.grad(u, z, g, retain_graph=True)
    sizes = g.square()
    if of_batch:
        sizes = sizes + along(g.mean(over)).square() + (unit * along((g * unit).mean(over))).square()
    named = {k: t for k, t in true.items() if k != "bias" or not of_batch}  # else zero, as a sum of dz
    found = torch.autograd.grad(z, list(named.values()), dz)
    of_terms = torch.autograd.grad(
        terms, [squares[k] for k in named], scale.square() * sizes, retain_graph=True
    )
    pairs = [
        (out, scale.square() * (terms + along(mean).square())),
        ((g * unit).sum(over), (g * unit).square().sum(over)),
        (g.sum(over), g.square().sum(over)),
        *zip(found, of_terms, strict=True),
    ]
    return all(t.square().mean() >= 0.01 * size.mean() for t, size in pairs)


def assert_normed(
    block: Block,
    tensors,
    norm,
    *,
    plan: str,
    layout="channels_first",
    needs=("x", "weight", "bias"),
    grad: Tensor | None = None,
    our_grad=lambda g: g,
    our=ours,
    by_channel: bool = False,
) -> dict[str, Tensor]:
    """Our block, by a function like :func:`ours`, against PyTorch's by the numbers rule; returns ours.

    ``grad`` is in channels-first shape; ``our_grad`` may give ours other strides. ``by_channel`` holds every
    output channel of the result and of the weight's gradient to the rule as well. A plan asked for what it
    does not take must say so, and returns nothing.
    """
    if reason := refusal(block, plan, tensors["x"].dtype):
        with pytest.raises(ValueError, match=f"cannot run here.*{reason}"):
            ours(block, tensors["x"], tensors["weight"], tensors.get("bias"), norm, plan=plan, layout=layout)
        return {}
    if grad is None:
        grad = random_grad(block, tensors, norm)

    def way(convert, module):
        given = {k: convert(t) for k, t in tensors.items()}
        return run(lambda *a: eager(block, *a), given, module, convert(grad), needs)

    def last(t):
        return strided(t, "channels_last") if t.dim() == block.rank else t.contiguous()

    ways = [way(Tensor.contiguous, norm), way(last, norm)]
    true = way(Tensor.double, copy.deepcopy(norm).double())
    given = tensors, norm, our_grad(in_layout(grad, layout)), needs
    mine = run(lambda *a: our(block, *a, plan=plan, layout=layout), *given)
    same = None
    if plan in ("reference", "auto") and grad.dtype == torch.bfloat16:
        # PyTorch's own sums of a bfloat16 gradient are poor where it lies with gaps, as a layout leaves it.
        same = run(lambda *a: ours(block, *a, plan="reference", layout=layout), *given)
    assert mine.keys() == true.keys()
    for name, found in mine.items():
        theirs, truth = [w[name] for w in ways], true[name]
        if name == "out":
            theirs, truth = [in_layout(t, layout) for t in theirs], in_layout(truth, layout)
        if same is not None:
            theirs.append(same[name])
        what = f"{name} of {block} with {norm}, plan {plan}, {layout}"
        if not found.is_floating_point():
            assert torch.equal(found, theirs[0]), what
        else:
            assert_close_as_torch(found, theirs, truth, what)
        if by_channel and name in ("out", "weight"):
            assert layout == "channels_first"
            axis = 1 if name == "out" else 0
            parts = [t.unbind(axis) for t in (found, truth, *theirs)]
            # PyTorch's error of one channel is a matter of luck: what any of them has is allowed for each.
            own = max(
                ((way - true_part).norm() / true_part.norm()).nan_to_num(0, 0, 0)
                for _, true_part, *their_parts in zip(*parts, strict=True) for way in their_parts
            )  # fmt: skip
            for c, (part, true_part, *their_parts) in enumerate(zip(*parts, strict=True)):
                if true_part.count_nonzero() < 0.1 * true_part.numel():  # what a ReLU passed is noise
                    continue
                ways_of_channel = [*their_parts, (true_part * (1 + own)).to(part.dtype)]
                assert_close_as_torch(part, ways_of_channel, true_part, f"channel {c} of {what}")
    return mine
