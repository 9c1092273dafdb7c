"""Activations by every value of theirs: each alone through a 1x1 convolution, slopes by the way."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import ACTIVATIONS, assert_close_as_torch, evaluate, floats, fused_plans, plans
from torch import nn

from cnnlstm_fast.functional import conv_block


@plans
@pytest.mark.parametrize(
    "name",
    [
        "leaky_relu", "elu", "hardtanh", "relu6", "gelu", "softplus", "mish", "hardswish", "hardsigmoid",
        "softsign",
    ],
)  # fmt: skip
def test_activations_by_name_have_the_functions_defaults(plan, name):
    x, w = torch.randn(2, 3, 6, 6), 3 * torch.randn(4, 3, 3, 3)
    if name == "softsign":
        plan = "auto"
    torch.testing.assert_close(conv_block(x, w, activation=name, plan=plan), getattr(F, name)(F.conv2d(x, w)))


@plans
@pytest.mark.parametrize("activation", list(ACTIVATIONS)[2:])
def test_activations_over_their_whole_range(plan, activation):
    """Each value alone through a 1x1 convolution, slopes by the way; specials where PyTorch has them."""
    module = ACTIVATIONS[activation].module
    x = torch.cat([torch.linspace(-120, 120, 4001), torch.linspace(-3, 3, 4001), torch.logspace(-40, 38, 400),
                   torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf])])  # fmt: skip
    x = torch.cat([x, -x]).view(1, 1, 1, -1)
    tensors, grad = {"x": x, "weight": torch.ones(1, 1, 1, 1)}, torch.ones(x.shape)
    ours = evaluate(lambda x, weight: conv_block(x, weight, activation=module, plan=plan), tensors, grad)
    theirs = evaluate(lambda x, weight: module(F.conv2d(x, weight)), tensors, grad)
    doubles = {k: t.double() for k, t in tensors.items()}
    exact = evaluate(lambda x, weight: module(F.conv2d(x, weight)), doubles, grad.double())
    for name in ("out", "x"):
        mine, their = ours[name].flatten(), theirs[name].flatten()
        size = torch.maximum(their.abs(), torch.tensor(1e-3)).nan_to_num(1, 1, 1) if name == "out" else 1.0
        if activation.startswith("gelu"):  # its tail is x times the difference of nearly equal numbers
            size = torch.maximum(x.flatten().abs(), torch.tensor(1.0)).nan_to_num(1, 1, 1)
        same = (mine == their) | (mine.isnan() & their.isnan()) | ((mine - their).abs() < 1e-6 * size)
        true = exact[name].flatten()  # PyTorch's own GELU of infinity may be NaN
        same |= ~their.isfinite() & ((mine == true) | (mine.isnan() & true.isnan()))
        if name == "x":  # what is flushed to zero has zero's slope
            subnormal = (x != 0) & (x.abs() < torch.finfo(x.dtype).smallest_normal)
            at_zero = mine[(x == 0).flatten()][:1]
            same |= subnormal.flatten() & (mine == at_zero)
        if name == "x" and activation in ("hardtanh", "relu6", "elu", "hardswish"):
            same |= x.flatten().isnan()  # PyTorch's vectors and its scalars differ
        assert same.all(), (name, x.flatten()[~same][:5], mine[~same][:5], their[~same][:5])


@pytest.mark.instruction_sets
@fused_plans
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_every_value_of_gelu_alone_obeys_the_rule(plan, approximate):
    """Within 16 roundings, since PyTorch may be exact by chance: an absolute error is too much in tails."""
    x = torch.linspace(-8, 8, 100_003).view(1, 1, 1, -1)
    ours = conv_block(x, torch.ones(1, 1, 1, 1), activation=nn.GELU(approximate), plan=plan)
    z = x.double()
    tail = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    true = z * torch.sigmoid(2 * tail) if approximate == "tanh" else z * torch.erfc(-math.sqrt(0.5) * z) / 2
    error = ((ours - true) / true).abs() / torch.finfo(torch.float32).eps
    # What e^x is taken of is rounded too.
    allowed = 16 + (2 * tail.abs() if approximate == "tanh" else z**2 / 2)
    worst = (error / allowed).argmax()
    assert (error <= allowed).all(), (x.flatten()[worst].item(), error.flatten()[worst].item())


@plans
@floats
@pytest.mark.parametrize(
    ("beta", "threshold"),
    [(1, 20), (2.0, 1.0), (0.3, 2.5), (-0.5, 3.0), (3.0, -2.0), (1.0, 100.0), (2.0, math.inf), (0.0, 1.0)],
)
def test_softplus_of_any_numbers(plan, dtype, beta, threshold):
    """Each value alone: beside the threshold, where the result may jump, far from it, and specials.

    A high threshold shows where e^(beta z) is infinite: there PyTorch's slope is NaN.
    """
    module, by = nn.Softplus(beta, threshold), beta or 1
    eps = torch.finfo(dtype).eps
    turn = threshold / by if math.isfinite(threshold) else 0.0
    ranges = {
        "beside the threshold": turn * (1 + eps * torch.arange(-9, 10)),
        "small": torch.linspace(-3, 3, 2001),
        "low": torch.linspace(-80, -4, 501) / by,
        "high": torch.linspace(4, 120, 501) / by,
        "special": torch.tensor([0.0, -0.0, 1e38, -1e38, math.nan, math.inf, -math.inf]),
    }
    for where, values in ranges.items():
        tensors = {"x": values.to(dtype).view(1, 1, 1, -1), "weight": torch.ones(1, 1, 1, 1, dtype=dtype)}
        grad = torch.ones_like(tensors["x"])
        ours = evaluate(lambda x, weight: conv_block(x, weight, activation=module, plan=plan), tensors, grad)
        theirs = evaluate(lambda x, weight: module(F.conv2d(x, weight)), tensors, grad)
        doubles = {k: t.double() for k, t in tensors.items()}
        true = evaluate(lambda x, weight: module(F.conv2d(x, weight)), doubles, grad.double())
        for name in ("out", "x"):
            mine, their = ours[name], theirs[name]
            assert_close_as_torch(mine, their, true[name], f"{name} {where}")
            # That is a rule of norms; sides of the threshold and tiny values need every element's own.
            torch.testing.assert_close(mine, their, rtol=8 * eps, atol=1e-37, equal_nan=True)


@plans
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("activation", [nn.Hardswish(), nn.Hardsigmoid()], ids=str)
def test_where_the_slope_is_zero_no_gradient_passes(plan, activation, normed):
    """Infinite ones and NaN neither; beside the kinks and at them."""
    at = [-math.inf, -4.0, -3.0, 3.0, 4.0, math.inf, *(3 + torch.arange(-4, 5) * 2**-22).tolist(), -1.0, 2.0]
    x = torch.tensor([at, [-value for value in at]]).flatten().view(1, 1, 1, -1)
    norm = nn.BatchNorm2d(1, eps=0).eval() if normed else None
    for grad in (math.inf, -math.inf, math.nan, 2.0):
        found = []
        for fused in (True, False):
            leaf, weight = x.clone().requires_grad_(), torch.ones(1, 1, 1, 1)
            if fused:
                out = conv_block(leaf, weight, norm=norm, activation=activation, plan=plan)
            else:
                out = activation(F.conv2d(leaf, weight))
            out.backward(torch.full_like(x, grad))
            found.append(leaf.grad)
        torch.testing.assert_close(*found, rtol=1e-6, atol=0, equal_nan=True)
