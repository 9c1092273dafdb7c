"""The plan ``winograd``: 3x3 taps by minimal filtering, held to the rules of the other plans."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace

import pytest
import torch
from forked import run_forked
from helpers import (
    CURVED,
    LAYOUTS,
    POOL_2X2,
    STRIDED,
    WINOGRAD,
    Block,
    PoolCase,
    assert_block,
    assert_close_as_torch,
    decided,
    evaluate,
    field_blocks,
    integer_tensors,
    needs_extension,
    normal_tensors,
    our_block,
    random_blocks,
    strided,
    torch_block,
)
from norms import assert_normed, random_norm
from test_numbers import SPECIAL_BLOCKS, assert_same_with_specials, with_specials
from torch import nn

import cnnlstm_fast as cf
from cnnlstm_fast.functional import conv_block
from cnnlstm_fast.functional.arguments import make_spec
from cnnlstm_fast.planning.choose import choose

pytestmark = needs_extension

PLAN = "winograd"
BLOCK = Block(3, 21, (9, 14), 70, (3, 3), padding=(1, 1), pool=POOL_2X2)
special_blocks = pytest.mark.parametrize(
    "block",
    [replace(b, c_out=40) for b in SPECIAL_BLOCKS.values() if b.kernel == (3, 3)],
    ids=[name for name, b in SPECIAL_BLOCKS.items() if b.kernel == (3, 3)],
)


def a_gradient(block: Block, tensors) -> torch.Tensor:
    clear = decided(block, tensors)
    return (torch.randn(clear.shape) + 0.3) * clear


@pytest.mark.instruction_sets
@random_blocks(40, **WINOGRAD)
def test_whole_numbers_are_exact(block):
    """Halves and quarters of small whole numbers are exact too."""
    tensors, grad = integer_tensors(block, torch.float32)
    assert_block(block, tensors, grad, plan=PLAN, exact=True)


@pytest.mark.instruction_sets
@random_blocks(30, **WINOGRAD)
@pytest.mark.parametrize("threads", [1, 2])
def test_error_is_as_pytorchs(block, threads):
    torch.set_num_threads(threads)
    tensors = normal_tensors(block, torch.float32)
    needs = random.choice([("x", "weight", "bias"), ("weight", "bias"), ("x",), ("weight",), ("bias",)])
    needs = tuple(n for n in needs if n in tensors) or ("x",)
    assert_block(block, tensors, a_gradient(block, tensors), plan=PLAN, needs=needs)


@field_blocks
def test_other_kernels_are_refused(block):
    """Or run, where they fit."""
    tensors = normal_tensors(block, torch.float32)
    assert_block(block, tensors, a_gradient(block, tensors), plan=PLAN)


@pytest.mark.parametrize(
    "block",
    [
        Block(2, 512, (4, 13), 256, (3, 3), padding=(1, 1)),
        Block(5, 130, (8, 25), 192, (3, 3), padding=(1, 1), pool=PoolCase((2, 2), (2, 1), (0, 1), (1, 1))),
        Block(7, 64, (31, 33), 66, (3, 3), padding=(1, 1), pool=POOL_2X2),
    ],
    ids=["512", "several items", "several chunks"],
)
def test_blocks_of_real_size(block):
    tensors = normal_tensors(block, torch.float32)
    assert_block(block, tensors, a_gradient(block, tensors), plan=PLAN)


def _masked(weight: torch.Tensor, how: str, quiet: float) -> torch.Tensor:
    """The weight with some taps ``quiet`` times as loud."""
    if how == "causal":
        weight[:, :, 1, 2:].mul_(quiet)
        weight[:, :, 2].mul_(quiet)
    elif how == "a corner":
        weight[:, :, 2, 2].mul_(quiet)
    elif how == "an input's":
        weight[:, 5, 0].mul_(quiet)
    else:
        assert how == "an output's"
        weight[7, :, :, 2].mul_(quiet)
    return weight


@pytest.mark.instruction_sets
@pytest.mark.parametrize("how", ["causal", "a corner", "an input's", "an output's"])
@pytest.mark.parametrize("quiet", [0.0, 1e-4])
@pytest.mark.parametrize("plan", ["auto", PLAN])
def test_what_no_tap_sees_is_not_heard(how, quiet, plan):
    """Spikes where taps are zero, or nearly, and a ReLU over what the others make of them."""
    block = Block(2, 32, (20, 23), 48, (3, 3), padding=(1, 1), bias=False)
    tensors = normal_tensors(block, torch.float32)
    tensors["weight"] = _masked(tensors["weight"].abs(), how, quiet)
    tensors["x"] = tensors["x"].abs()
    tensors["x"][:, 5 if how == "an input's" else slice(None), ::7, ::5] = -1e4
    grad = a_gradient(block, tensors)
    ours = assert_block(block, tensors, grad, plan=plan)
    true = evaluate(
        lambda **t: torch_block(block, **t), {k: t.double() for k, t in tensors.items()}, grad.double()
    )
    theirs = evaluate(lambda **t: torch_block(block, **t), tensors, grad)
    seen = tensors["weight"].abs().amax((0, 1)) > 1e-2 * tensors["weight"].abs().max()
    for name, part in (("weight", lambda t: t[:, :, seen]), ("out", lambda t: t[:, 7])):
        assert_close_as_torch(part(ours[name]), part(theirs[name]), part(true[name]), name)


@pytest.mark.parametrize("training", [False, True], ids=["given", "batch"])
def test_what_no_tap_sees_is_not_heard_behind_a_norm(training):
    block = Block(2, 32, (20, 23), 48, (3, 3), padding=(1, 1), bias=False)
    tensors = normal_tensors(block, torch.float32)
    tensors["weight"] = _masked(tensors["weight"].abs(), "causal", 0.0)
    tensors["x"] = tensors["x"].abs()
    tensors["x"][:, :, ::7, ::5] = -1e4
    assert_normed(block, tensors, random_norm(block, training), plan=PLAN)


def test_a_mask_that_comes_later():
    """Weights may change without a trace; every call looks at them, and `explain` says what it saw."""
    conv = nn.Conv2d(64, 64, 3, padding=1)
    model, x = cf.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2)), torch.randn(2, 64, 28, 28)
    assert cf.explain(model, x).stages[1].plan == PLAN
    conv.weight.data[:, :, 2] = 0
    stage = cf.explain(model, x).stages[1]
    assert stage.plan == "chunked" and "nearly zero" in stage.reason
    conv.weight.data[:, :, 2] = 1e-2
    assert cf.explain(model, x).stages[1].plan == PLAN


@pytest.mark.parametrize("shape", [(8, 8), (16, 24), (65, 130), (512, 257)])
def test_random_weights_have_all_taps(shape):
    for weight in (torch.randn(*shape, 3, 3), nn.Conv2d(*shape[::-1], 3).weight.detach()):
        assert torch.ops.cnnlstm_fast.suits_winograd(weight)
        assert torch.ops.cnnlstm_fast.suits_winograd(strided(weight, "channels_last"))
        sparse = weight * (torch.rand(weight.shape) < 0.1)
        if min(shape) > 100:
            assert torch.ops.cnnlstm_fast.suits_winograd(sparse)
        o, i, tap = random.randrange(shape[0]), random.randrange(shape[1]), random.randrange(9)
        for at in ((slice(None), i), (o, slice(None)), (slice(None), slice(None))):
            masked = weight.clone()
            masked.flatten(2)[(*at, tap)] *= 1e-3
            assert not torch.ops.cnnlstm_fast.suits_winograd(masked)


@pytest.mark.parametrize("mean", [30.0, 1e3])
@pytest.mark.parametrize("padding", [0, 1])
def test_gradients_of_a_weight_over_a_far_mean(mean, padding):
    """Under a norm the gradients of a channel sum up to zero, so that the mean counts no longer."""
    block = Block(8, 32, (15, 14), 48, (3, 3), padding=(padding, padding))
    tensors = normal_tensors(block, torch.float32)
    tensors["x"] += mean
    for plan in (PLAN, "direct", "chunked"):
        assert_normed(block, tensors, random_norm(block, True), plan=plan, by_channel=True)


#: Pools whose windows end where tiles do, cross them, share rows of them, and leave rows out.
POOLS = {
    "none": None,
    "2x2": POOL_2X2,
    "2x1": PoolCase((2, 1), (2, 1), (0, 0), (1, 1)),
    "2x2 by 1": PoolCase((2, 2), (2, 1), (0, 1), (1, 1)),
    "3x3 by 2": PoolCase((3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3 by 1": PoolCase((3, 3), (1, 1), (1, 1), (1, 1)),
    "4x5": PoolCase((4, 5), (4, 5), (0, 0), (1, 1)),
    "gaps": PoolCase((1, 1), (3, 2), (0, 0), (1, 1)),
    "dilated": PoolCase((2, 2), (1, 2), (0, 1), (3, 2)),
}


@pytest.mark.instruction_sets
@pytest.mark.parametrize("activation", ["relu", None, "size", "silu"])
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_maps_in_bands(pool, activation):
    """An image of many more tiles than are computed at a time."""
    size = (random.randint(30, 45), random.randint(19, 30))
    block = Block(2, 18, size, 70, (3, 3), padding=(1, 1), pool=pool, activation=activation)
    tensors = normal_tensors(block, torch.float32)
    assert_block(block, tensors, a_gradient(block, tensors), plan=PLAN, layout=random.choice(LAYOUTS))
    if activation != "silu":
        tensors, grad = integer_tensors(block, torch.float32)
        assert_block(block, tensors, grad, plan=PLAN, exact=True, layout=random.choice(LAYOUTS))


def test_means_far_from_zero():
    """A constant offset is the worst that the transforms meet."""
    tensors = normal_tensors(BLOCK, torch.float32)
    tensors["x"] = tensors["x"] * 0.1 + 100
    assert_block(BLOCK, tensors, a_gradient(BLOCK, tensors), plan=PLAN)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    tensors = normal_tensors(BLOCK, torch.float32)
    assert_block(BLOCK, tensors, a_gradient(BLOCK, tensors), plan=PLAN, layout=layout)


@pytest.mark.parametrize(
    ("name", "how"),
    [  # random values of a gradient cannot lie expanded
        (name, how)
        for name in ("x", "weight", "grad")
        for how in STRIDED
        if (name, how) != ("grad", "expanded")
    ],
)
def test_strided(name, how):
    tensors = normal_tensors(BLOCK, torch.float32)
    if name != "grad":
        tensors[name] = strided(tensors[name], how)
    assert_block(
        BLOCK, tensors, a_gradient(BLOCK, tensors), plan=PLAN,
        our_grad=lambda g: strided(g, how) if name == "grad" else g,
    )  # fmt: skip


@pytest.mark.parametrize("padding", ["same", (2, 0), (0, 2), (3, 4)], ids=str)
def test_padding(padding):
    x, weight = torch.randn(2, 18, 7, 10), torch.randn(33, 18, 3, 3) / 12
    theirs = torch.nn.functional.conv2d(x, weight, padding=padding).relu()
    torch.testing.assert_close(conv_block(x, weight, padding=padding, plan=PLAN), theirs)


@pytest.mark.parametrize("activation", [None, "hardtanh", *CURVED])
def test_activations(activation):
    block = replace(BLOCK, activation=activation)
    tensors = normal_tensors(block, torch.float32)
    assert_block(block, tensors, a_gradient(block, tensors), plan=PLAN)


# ------------------------------------------------------------- NaN and infinities


@pytest.mark.instruction_sets
@special_blocks
@pytest.mark.parametrize(
    "specials", [[math.nan], [math.inf], [-math.inf], [math.nan, math.inf, -math.inf]], ids=str
)
def test_specials_in_the_input(block, specials):
    """They do not spread over the tiles they pass through."""
    tensors, grad = with_specials(block, torch.float32, specials)
    assert_same_with_specials(block, tensors, grad, PLAN, ("out", "x", "bias"))


@special_blocks
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf], ids=str)
def test_specials_in_the_weight(block, special):
    block = replace(block, padding=(0, 0))  # 0 * inf in the padding differs between PyTorch's own ways
    tensors, grad = integer_tensors(block, torch.float32)
    tensors["x"] = tensors["x"].abs() + 1
    tensors["weight"][2].view(-1)[0] = special
    assert_same_with_specials(block, tensors, grad.clamp(-1, 1), PLAN, ("out", "weight", "bias"))


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf], ids=str)
def test_specials_in_the_gradient(special):
    block = SPECIAL_BLOCKS["no pool"]
    tensors, grad = integer_tensors(block, torch.float32)
    tensors["x"] = torch.where(tensors["x"] == 0, 1, tensors["x"])
    tensors["weight"] = torch.where(tensors["weight"] == 0, 1, tensors["weight"])
    grad = grad.clamp(-1, 1)
    grad[1, 3].view(-1)[5] = special
    assert_same_with_specials(block, tensors, grad, PLAN)


def test_sums_that_overflow_on_their_way():
    """Where a tile's differences leave the range of floats and the result does not."""
    x = torch.zeros(1, 16, 6, 6)
    x[:, :, 1::2] = 3e38
    x[:, :, ::2] = -3e38
    weight = torch.zeros(16, 16, 3, 3)
    weight[:, 0, 1, 1] = 0.5
    out = conv_block(x, weight, padding=1, activation=None, plan=PLAN)
    assert torch.equal(out, conv_block(x, weight, padding=1, activation=None, plan="reference"))


# ------------------------------------------------------------- batch norm


@pytest.mark.instruction_sets
@random_blocks(24, **WINOGRAD)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_normed_blocks(block, training):
    block = replace(block, c_out=max(block.c_out, 4), n=block.n + 8)
    needs = random.choice([("x", "weight", "bias"), ("weight", "bias"), ("x",)])
    tensors = normal_tensors(block, torch.float32)
    assert_normed(block, tensors, random_norm(block, training), plan=PLAN, needs=needs)


def test_specials_under_a_norm_reach_everything():
    norm = nn.BatchNorm2d(BLOCK.c_out)
    tensors = normal_tensors(BLOCK, torch.float32)
    tensors["x"][0, 0, 0, 0] = math.nan
    found = []
    for plan in (PLAN, "reference"):
        leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
        module = copy.deepcopy(norm)
        out = conv_block(**leaves, padding=1, norm=module, pool=BLOCK.pool_module(), plan=plan)
        out.sum().backward()
        found.append([out, module.running_mean, leaves["x"].grad, leaves["weight"].grad])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())


# ------------------------------------------------------------- manners


def test_second_derivatives():
    tensors = {k: t.double() for k, t in normal_tensors(BLOCK, torch.float32).items()}

    def penalty(plan, **t):
        t = {k: v.clone().requires_grad_() for k, v in t.items()}
        out = conv_block(**t, padding=1, activation="relu", plan=plan)
        grads = torch.autograd.grad(out.square().sum(), list(t.values()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), list(t.values()))

    true = penalty("reference", **tensors)
    singles = {k: t.float() for k, t in tensors.items()}
    for mine, theirs, truth in zip(
        penalty(PLAN, **singles), penalty("reference", **singles), true, strict=True
    ):
        assert_close_as_torch(mine, [theirs], truth, "second derivatives")


def test_forward_bits_depend_on_neither_threads_nor_neighbours():
    block = replace(BLOCK, n=9)
    tensors = normal_tensors(block, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(our_block(block, **tensors, plan=PLAN))
    alone = torch.cat([our_block(block, **tensors | {"x": x[None]}, plan=PLAN) for x in tensors["x"]])
    assert all(torch.equal(results[0], other) for other in (*results[1:], alone))


def test_gradient_bits_depend_on_no_thread():
    tensors = normal_tensors(BLOCK, torch.float32)
    grad = a_gradient(BLOCK, tensors)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(evaluate(lambda **t: our_block(BLOCK, **t, plan=PLAN), tensors, grad))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.usefixtures("known_rates")
def test_it_is_chosen_and_explained():
    model = cf.Sequential(nn.Conv2d(64, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU())
    x = torch.randn(2, 64, 20, 24)
    for mode in (model.train(), model.eval()):
        report = cf.explain(mode, x)
        assert PLAN in [stage.plan for stage in report.stages], str(report)


@pytest.mark.parametrize("change", [dict(stride=2), dict(dilation=2), dict(groups=2)], ids=str)
def test_what_it_does_not_take(change):
    x, weight = torch.randn(2, 4, 9, 9), torch.randn(6, 4 // change.get("groups", 1), 3, 3)
    with pytest.raises(ValueError, match=r'3x3 kernels with stride 1.*plan="auto"'):
        conv_block(x, weight, **change, plan=PLAN)
    half = [t.bfloat16() for t in (x, torch.randn(6, 4, 3, 3))]
    with pytest.raises(ValueError, match="takes float32 on the CPU"):
        conv_block(*half, plan=PLAN)


@pytest.mark.usefixtures("known_rates")
@pytest.mark.parametrize(("channels", "size", "chosen"), [(64, 32, True), (4, 32, False)])
def test_it_is_chosen_where_it_pays(channels, size, chosen):
    weight = torch.randn(64, channels, 3, 3)
    spec, _ = make_spec(weight.shape, False, 1, 1, 1, 1, None, "relu", None, "channels_first")
    plan, *_ = choose("auto", spec, torch.randn(1, channels, size, size), weight, None)
    assert (plan == PLAN) == chosen


def test_the_op_refuses_other_convolutions():
    """In a process of its own, so that a crash is seen."""
    ran = run_forked("""
import torch, cnnlstm_fast
op = torch.ops.cnnlstm_fast.conv_block.default
x = torch.randn(2, 4, 9, 9)
for weight, conv, dtype in (
    (torch.randn(6, 4, 3, 3), [2, 1, 0, 0, 1, 1, 1], torch.float32),
    (torch.randn(6, 4, 3, 3), [1, 1, 0, 0, 1, 2, 1], torch.float32),
    (torch.randn(6, 2, 3, 3), [1, 1, 0, 0, 1, 1, 2], torch.float32),
    (torch.randn(6, 4, 2, 3), [1, 1, 0, 0, 1, 1, 1], torch.float32),
    (torch.randn(6, 4, 3, 3), [1, 1, 0, 0, 1, 1, 1], torch.bfloat16),
):
    try:
        op(x.to(dtype), weight.to(dtype), None, conv, 0, [], [], [0, 1, 2, 3], 3, False)
    except RuntimeError as error:
        assert "winograd" in str(error), error
    else:
        raise AssertionError(conv)
print("the end")
""")
    assert ran.stdout.strip() == "the end", ran.stderr[-2000:]


def test_torch_and_ours_agree_on_shapes():
    """An image smaller than a tile, and one with nothing in the batch."""
    for shape in ((2, 5, 1, 1), (2, 5, 2, 1), (0, 5, 6, 6)):
        block = Block(shape[0], 5, shape[2:], 19, (3, 3), padding=(1, 1))
        tensors = normal_tensors(block, torch.float32)
        ours = our_block(block, **tensors, plan=PLAN)
        torch.testing.assert_close(ours, torch_block(block, **tensors))
