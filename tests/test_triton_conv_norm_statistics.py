"""Statistics of a batch by the Triton kernels of the block op with a batch norm."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import Block, normal_tensors, torch_block
from interpreted import interpreter_and_cuda
from norms import random_norm, run
from test_conv_norm import OUTLIERS
from triton_blocks import PLANS, _op_args, plans
from triton_norms import SMALL, _forward, modes, norm_kernels

# In the interpreter a case takes a tenth of a second or more.
pytestmark = [pytest.mark.usefixtures("float32_means_float32"), pytest.mark.some(10), pytest.mark.share(3)]


@interpreter_and_cuda
def kernels(request):
    yield from norm_kernels(request.param)


@pytest.mark.some(6)
@plans
@pytest.mark.parametrize("programs", [1, 18, 512])
@pytest.mark.parametrize("keep_map", [False, True], ids=["no map", "map kept"])
def test_means_far_from_zero(kernels, constants_of_the_kernels, keep_map, programs, plan):
    """An image of bytes, its sums in few or many parts: the map's mean is far larger than its deviation."""
    constants_of_the_kernels("REDUCTION_PROGRAMS", programs)
    block = replace(SMALL, n=5, size=(13, 9))
    tensors = normal_tensors(block, torch.float32)
    tensors["x"] = torch.randint(0, 256, tensors["x"].shape).float() + 1000
    tensors["weight"] = tensors["weight"].abs()
    norm = random_norm(block, True)
    kernels.assert_normed(block, tensors, norm, plan=plan, keep_map=keep_map)


@pytest.mark.some(10)
@plans
@pytest.mark.parametrize("programs", [1, 18, 512])
@pytest.mark.parametrize("where", OUTLIERS)
def test_outliers(kernels, constants_of_the_kernels, where, programs, plan):
    """One position far from the others spoils no statistic, wherever it lies."""
    constants_of_the_kernels("REDUCTION_PROGRAMS", programs)
    block = replace(SMALL, n=5, size=(13, 9))
    tensors = normal_tensors(block, torch.float32)
    OUTLIERS[where](tensors["x"]).add_(random.choice((-1e4, 1e2, 1e3)))
    kernels.assert_normed(block, tensors, random_norm(block, True), plan=plan)


@plans
@pytest.mark.parametrize("programs", [1, 9, 512])
def test_statistics_are_exact_where_the_map_is(kernels, constants_of_the_kernels, programs, plan):
    """Small whole numbers far from zero: mean and variance to float32's last bits of the deviation."""
    constants_of_the_kernels("REDUCTION_PROGRAMS", programs)
    block = Block(4, 1, (12, 10), 17, (1, 1), bias=False, activation=None)
    x = torch.randint(-8, 9, (4, 1, 12, 10)).float() + 2**16
    weight = torch.ones(17, 1, 1, 1)
    weight[3], weight[5] = -2, 0
    args = (*_op_args(block), [0, 1, 2, 3], PLANS[plan])
    there = [t.to(kernels.device) for t in (x, weight)]
    out, *kept, stats = kernels.module.forward(*there, None, None, None, None, None, 1e-5, *args, True, False)
    z = F.conv2d(x.double(), weight.double())
    var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
    found = stats.cpu()
    assert ((found[0] - mean).abs() <= 1e-6).all()
    assert ((found[1] - var).abs() <= 1e-5 * var).all()
    scale = (var + 1e-5).rsqrt()
    torch.testing.assert_close(found[2:], torch.stack([scale, -mean * scale]), rtol=1e-5, atol=1e-7)
    *_, sums = kernels.module.backward(
        torch.ones_like(out), *there, stats, *kept, 1e-5, *args, False, False, False
    )
    # what deviates from the mean cancels, though the mean is no float32
    assert (sums[0].abs() <= 1e-3).all() and (sums[1] == 480).all()


@plans
def test_an_infinite_place_makes_the_mean_infinite(kernels, plan):
    """As the sum of a map is, whatever it is summed about."""
    block = Block(3, 1, (12, 10), 17, (1, 1), bias=False, activation=None)
    args = (*_op_args(block), [0, 1, 2, 3], PLANS[plan])
    for at in (0, 359):
        x = torch.randn(3, 1, 12, 10)
        x.view(-1)[at] = math.inf
        there = [t.to(kernels.device) for t in (x, torch.ones(17, 1, 1, 1))]
        *_, stats = kernels.module.forward(*there, None, None, None, None, None, 1e-5, *args, False, False)
        assert (stats[0] == math.inf).all() and stats[1].isnan().all()


@plans
@pytest.mark.parametrize("keep_map", [False, True], ids=["no map", "map kept"])
def test_everything_speaks_of_the_map_as_it_is_stored(kernels, keep_map, plan):
    """In bfloat16: statistics, argmax and results are those of the rounded z, whether it is kept or not."""
    tensors = normal_tensors(SMALL, torch.bfloat16)
    _, _, _, (out, _, kept, _, stats) = _forward(kernels, SMALL, tensors, plan=plan, keep_map=keep_map)
    z = torch_block(
        replace(SMALL, activation=None, pool=None), tensors["x"].float(), tensors["weight"].float()
    )
    z = z.bfloat16().double()
    var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
    torch.testing.assert_close(stats[:2].cpu(), torch.stack([mean, var]), rtol=1e-5, atol=1e-5)
    normed = F.relu(kept.float() * stats[2].float() + stats[3].float()).bfloat16()
    torch.testing.assert_close(out, normed, rtol=2**-8, atol=0)
    assert (out != normed).float().mean() < 0.02


@plans
def test_a_channel_without_variance(kernels, plan):
    tensors = normal_tensors(SMALL, torch.float32)
    tensors["weight"][3] = 0
    norm, ours = random_norm(SMALL, True), kernels.block()
    found = run(lambda *a: ours(SMALL, *a, plan=plan), tensors, norm, torch.ones(SMALL.out_shape()))
    assert all(t.isfinite().all() for t in found.values())
    constant = F.relu(norm.bias[3]).expand(found["out"][:, 3].shape)
    torch.testing.assert_close(found["out"][:, 3], constant, rtol=1e-6, atol=1e-7)


@plans
@modes
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_specials_stay_in_their_channels(kernels, value, plan, training):
    tensors = normal_tensors(SMALL, torch.float32)
    tensors["weight"][3, 0, 0, 0] = value
    norm = random_norm(SMALL, training)  # the input's gradient gathers from all channels
    found = kernels.assert_normed(SMALL, tensors, norm, plan=plan, needs=("weight",))
    others = [c for c in range(SMALL.c_out) if c != 3]
    assert found["out"][:, others].isfinite().all() and found["norm.weight"][others].isfinite().all()
