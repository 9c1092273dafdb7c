"""functional.conv_block against PyTorch: results and every gradient, over plans, dtypes and shapes."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ACTIVATIONS,
    FUSED,
    LAYOUTS,
    POOL_2X2,
    STRIDED,
    Block,
    PoolCase,
    assert_block,
    assert_close_as_torch,
    decided,
    evaluate,
    field_blocks,
    floats,
    fused_plans,
    in_layout,
    integer_tensors,
    needs_extension,
    normal_tensors,
    our_block,
    plans,
    random_block,
    random_blocks,
    refusal,
    run_python,
    strided,
    torch_block,
    torch_ways,
)

from cnnlstm_fast import reference
from cnnlstm_fast.functional import conv_block

SMALL = Block(3, 5, (9, 11), 19, (3, 3), padding=(1, 1), pool=POOL_2X2)


def some_block(rank: int, **fixed) -> Block:
    rng = random.Random(torch.initial_seed())
    while (block := random_block(rng, **fixed)).rank != rank:
        pass
    return block


def gradient_for(block: Block, tensors) -> torch.Tensor:
    """A random gradient, zero where rounding decides which element wins."""
    mask = decided(block, tensors)
    return (torch.randn(mask.shape) + 0.3).to(tensors["x"].dtype) * mask


# ---------------------------------------------------------------- the sweep


@pytest.mark.instruction_sets
@random_blocks(60)
@plans
@floats
def test_whole_numbers_are_exact(block, plan, dtype):
    """No order of adding rounds small whole numbers, so nothing but a mistake makes a difference."""
    tensors, grad = integer_tensors(block, dtype)
    assert_block(block, tensors, grad, plan=plan, exact=True)


@pytest.mark.instruction_sets
@random_blocks(30)
@plans
@floats
def test_error_is_as_pytorchs(block, plan, dtype):
    tensors = normal_tensors(block, dtype)
    assert_block(block, tensors, gradient_for(block, tensors), plan=plan)


@field_blocks
@plans
@floats
def test_blocks_of_the_field(block, plan, dtype):
    tensors = normal_tensors(block, dtype)
    assert_block(block, tensors, gradient_for(block, tensors), plan=plan)


@random_blocks(10)
@pytest.mark.parametrize("plan", ["auto", "reference"])
def test_float64(block, plan):
    tensors = normal_tensors(block, torch.float64)
    assert_block(block, tensors, gradient_for(block, tensors), plan=plan)


@random_blocks(4)
@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64], ids=["float16", "complex64"])
def test_other_dtypes_are_pytorchs(block, dtype):
    block = replace(block, activation=None, pool=None)
    tensors = normal_tensors(block, dtype)
    assert torch.equal(our_block(block, **tensors, plan="auto"), torch_block(block, **tensors))


# ---------------------------------------------------------------- activations


ACTIVE_BLOCKS = {
    "2x2": SMALL,
    "no pool": replace(SMALL, pool=None),
    "overlapping": replace(SMALL, pool=PoolCase((3, 3), (1, 2), (1, 0), (1, 1))),
    "bytes": replace(SMALL, c_out=33, pool=PoolCase((4, 5), (2, 3), (2, 2), (1, 1))),
    "groups": Block(2, 8, (7, 9), 32, (3, 3), groups=4, pool=POOL_2X2),
    "signal": Block(3, 5, (31,), 16, (3,), (1,), (1,), (1,), pool=PoolCase((3,), (2,), (1,), (1,))),
}
active_blocks = pytest.mark.parametrize("block", ACTIVE_BLOCKS.values(), ids=ACTIVE_BLOCKS)


@pytest.mark.instruction_sets
@active_blocks
@plans
@floats
@pytest.mark.parametrize("activation", list(ACTIVATIONS)[1:])
def test_activations(block, plan, dtype, activation):
    block = replace(block, activation=activation)
    tensors = normal_tensors(block, dtype)
    tensors["weight"] *= 2  # where curves bend
    assert_block(block, tensors, gradient_for(block, tensors), plan=plan)


@active_blocks
@plans
@floats
@pytest.mark.parametrize("activation", ["hardtanh", "relu6", "size"])
def test_activations_in_whole_numbers(block, plan, dtype, activation):
    """Full of ties, before the activation and after it."""
    block = replace(block, activation=activation)
    tensors, grad = integer_tensors(block, dtype)
    assert_block(block, tensors, grad, plan=plan, exact=True)


@pytest.mark.instruction_sets
@plans
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["size", "hardtanh"])
def test_activations_in_every_layout(plan, layout, activation):
    block = replace(SMALL, activation=activation)
    tensors, grad = integer_tensors(block, torch.float32)
    assert_block(block, tensors, grad, plan=plan, layout=layout, exact=True)


@plans
@pytest.mark.parametrize("activation", ["tanh", "leaky", "hardtanh", "silu"])
def test_an_activated_result_may_be_changed(plan, activation):
    """After a pool PyTorch lets the result be changed in place before backward."""
    block = replace(SMALL, activation=activation)
    tensors = normal_tensors(block, torch.float32)
    grad = gradient_for(block, tensors)
    results = []
    for fn in (lambda *a, **k: our_block(*a, **k, plan=plan), torch_block):
        leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
        out = fn(block, **leaves)
        out.mul_(2).add_(1)
        results.append(torch.autograd.grad(out, list(leaves.values()), grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- memory of the arguments


@plans
@pytest.mark.parametrize("how", STRIDED)
def test_strided_input(plan, how):
    tensors, grad = integer_tensors(SMALL, torch.float32)
    tensors["x"] = strided(tensors["x"], how)
    assert_block(SMALL, tensors, grad, plan=plan, exact=True)


@plans
@pytest.mark.parametrize("how", STRIDED)
def test_strided_parameters(plan, how):
    tensors, grad = integer_tensors(SMALL, torch.float32)
    tensors["weight"] = strided(tensors["weight"], how)
    two = torch.stack([tensors["bias"], torch.full_like(tensors["bias"], torch.nan)], 1)
    tensors["bias"] = two[:, 0] if how != "expanded" else tensors["bias"][:1].expand(SMALL.c_out)
    assert_block(SMALL, tensors, grad, plan=plan, exact=True)


@plans
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["sliced", "transposed", "expanded", "offset"])
def test_strided_gradient(plan, layout, how):
    tensors, grad = integer_tensors(SMALL, torch.float32)
    if how == "expanded":  # what .sum().backward() sends: stride 0 everywhere
        grad = torch.ones(()).expand(grad.shape)
        assert_block(
            SMALL, tensors, grad, plan=plan, layout=layout, exact=True,
            our_grad=lambda g: torch.ones(()).expand(g.shape),
        )  # fmt: skip
    else:
        assert_block(
            SMALL, tensors, grad, plan=plan, layout=layout, exact=True,
            our_grad=lambda g: strided(g, how),
        )  # fmt: skip


@plans
def test_overlapping_input(plan):
    """Frames that share memory, as a sliding window over a long image gives them."""
    long = torch.randint(-3, 4, (5, 40, 9)).float()  # (C, L, W)
    x = long.unfold(1, 12, 4).permute(1, 0, 3, 2)  # (8, C, 12, W)
    block = replace(SMALL, n=8, size=(12, 9))
    tensors, grad = integer_tensors(block, torch.float32)
    assert_block(block, tensors | {"x": x}, grad, plan=plan, exact=True)


@plans
def test_arguments_are_left_alone(plan):
    tensors = normal_tensors(SMALL, torch.float32)
    grad = gradient_for(SMALL, tensors)
    before = copy.deepcopy((tensors, grad))
    versions = [t._version for t in (*tensors.values(), grad)]
    evaluate(lambda **t: our_block(SMALL, **t, plan=plan), tensors, grad)
    assert versions == [t._version for t in (*tensors.values(), grad)]
    assert torch.equal(grad, before[1])
    assert all(torch.equal(t, before[0][k]) for k, t in tensors.items())


# ---------------------------------------------------------------- sizes


@plans
@floats
@pytest.mark.parametrize("layout", ["channels_first", "features", "locations_time_major", "columns"])
def test_empty_batch(plan, dtype, layout):
    block = replace(SMALL, n=0)
    tensors = normal_tensors(block, dtype)
    ours = assert_block(block, tensors, torch.zeros(block.out_shape(), dtype=dtype), plan=plan, layout=layout)
    assert not ours["weight"].any() and not ours["bias"].any()


@plans
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unbatched(plan, rank, layout):
    """An unbatched map gives what a batch of one gives, without the batch dimension."""
    block = some_block(rank, n=1, groups=1)
    tensors, grad = integer_tensors(block, torch.float32)
    whole = our_block(block, **tensors, plan=plan, layout=layout)
    batch_dim = 1 if layout.endswith("_time_major") else 0
    tensors["x"] = tensors["x"][0]
    one = our_block(block, **tensors, plan=plan, layout=layout)
    assert torch.equal(one, whole.squeeze(batch_dim))
    if layout == "channels_first":
        assert_block(block, tensors, grad[0], plan=plan, exact=True)


@plans
@floats
@pytest.mark.parametrize(
    "block",
    [
        Block(40, 1, (1, 1), 1, (1, 1)),
        Block(40, 1, (1, 1), 1, (3, 3), padding=(1, 1)),
        Block(7, 3, (1, 1), 17, (1, 1), pool=PoolCase((1, 1), (1, 1), (0, 0), (1, 1))),
        Block(7, 3, (1, 1), 17, (2, 2), padding=(1, 1), pool=POOL_2X2),
        Block(7, 2, (1, 33), 5, (1, 3), padding=(0, 1), pool=PoolCase((1, 2), (1, 2), (0, 0), (1, 1))),
        Block(7, 2, (33, 1), 5, (3, 1), padding=(1, 0), pool=PoolCase((2, 1), (2, 1), (0, 0), (1, 1))),
        Block(7, 2, (2, 2), 5, (2, 2), padding=(1, 1), pool=PoolCase((3, 3), (3, 3), (0, 0), (1, 1))),
        Block(5, 2, (3, 3), 5, (3, 3), padding=(5, 6)),  # padding wider than the kernel
        Block(5, 2, (4, 4), 5, (1, 1), stride=(5, 5)),  # stride larger than the input
        Block(3, 2, (6, 6), 33, (3, 3), padding=(1, 1), pool=PoolCase((6, 6), (6, 6), (0, 0), (1, 1))),
        Block(3, 2, (18, 18), 9, (3, 3), padding=(1, 1), pool=PoolCase((16, 15), (1, 1), (0, 0), (1, 1))),
        Block(3, 2, (18, 18), 9, (3, 3), padding=(1, 1), pool=PoolCase((2, 127), (1, 1), (0, 63), (1, 1))),
        Block(2, 2, (18, 18), 9, (3, 3), padding=(1, 1), pool=PoolCase((17, 17), (1, 1), (0, 0), (1, 1))),
        Block(2, 257, (3, 3), 3, (1, 1)),
        Block(2, 3, (3, 3), 257, (1, 1), pool=POOL_2X2),
        Block(300, 3, (5,), 20, (3,), (1,), (1,), (1,), pool=PoolCase((2,), (2,), (1,), (1,), True)),
    ],
    ids=lambda b: "x".join(map(str, (b.n, b.c, *b.size, b.c_out))),
)
def test_extreme_sizes(block, plan, dtype):
    tensors, grad = integer_tensors(block, dtype)
    assert_block(block, tensors, grad, plan=plan, exact=True)


@pytest.mark.instruction_sets
@plans
def test_taps_that_meet_nothing(plan):
    """Columns of the kernel that see only padding get a gradient of zero."""
    for block in (
        Block(1, 16, (2,), 32, (7,), (4,), (6,), (1,)),
        Block(3, 13, (5, 1), 17, (3, 5), stride=(3, 4), padding=(1, 2)),
        Block(2, 3, (1, 1), 5, (5, 5), padding=(2, 2)),
    ):
        tensors, grad = integer_tensors(block, torch.float32)
        assert_block(block, tensors, grad, plan=plan, exact=True)


@pytest.mark.instruction_sets
@plans
def test_pointwise_strided(plan):
    for c in (1, 14, 15, 33):
        block = Block(3, c, (16, 29), 30, (1, 1), stride=(2, 2), pool=POOL_2X2)
        tensors, grad = integer_tensors(block, torch.float32)
        assert_block(block, tensors, grad, plan=plan, exact=True)


@pytest.mark.instruction_sets
@plans
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_planes_into_planes(plan, activation):
    """Without gradients and without a pool: at the edges of vectors, tiles, groups of channels and items."""
    rng = random.Random(torch.initial_seed())
    for c_out in (1, 7, 64, 65, 130):
        n, c, size = (
            rng.choice((1, 2, 5)),
            rng.choice((1, 3, 17, 90)),
            rng.choice(((1, 1), (3, 5), (16,), (4, 12), (7, 7), (97,), (31, 33), (1, 700))),
        )
        ones = (1,) * len(size)
        block = Block(n, c, size, c_out, ones, ones, (0,) * len(size), ones, activation=activation)
        tensors, _ = integer_tensors(block, torch.float32)
        tensors["x"] = strided(
            tensors["x"], rng.choice(("offset", "sliced", "channels_last", "backwards_dims"))
        )
        assert_block(block, tensors, None, plan=plan, exact=activation in (None, "relu"))
        assert_block(block, normal_tensors(block, torch.float32), None, plan=plan)


@pytest.mark.instruction_sets
@plans
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_depthwise_planes(plan, activation):
    """The same of depthwise convolutions: strides, dilations, paddings wider than the image, more outputs."""
    rng = random.Random(torch.initial_seed())

    def pair(*values):
        return rng.choice(values), rng.choice(values)

    for size in ((1, 40), (7, 7), (13, 9), (30, 33), (4, 70), (40, 3), (35, 65)):
        channels, more = rng.choice(((2, 1), (3, 1), (16, 1), (4, 2), (5, 3)))
        kernel = rng.choice(((1, 1), (3, 3), (5, 5), (1, 7), (3, 1), (2, 4)))
        stride, padding = pair(1, 1, 2, 3), pair(2, 4)
        reaches = [extent + 2 * p > 2 * (k - 1) for extent, p, k in zip(size, padding, kernel, strict=True)]
        dilation = tuple(rng.choice((1, 1, 2)) if reached else 1 for reached in reaches)
        n = rng.choice((1, 2, 3))
        block = Block(
            n, channels, size, channels * more, kernel, stride, padding, dilation, groups=channels,
            activation=activation,
        )  # fmt: skip
        tensors, _ = integer_tensors(block, torch.float32)
        tensors["x"] = strided(tensors["x"], rng.choice(("offset", "channels_last", "backwards_dims")))
        assert_block(block, tensors, None, plan=plan, exact=activation in (None, "relu"))
        assert_block(block, normal_tensors(block, torch.float32), None, plan=plan)


@pytest.mark.instruction_sets
def test_a_large_plane_in_bands():
    """More than an item's scratch holds, and fewer planes than threads."""
    x, weight = torch.randn(1, 2, 300, 700), torch.randn(2, 1, 3, 5)
    options = {"padding": (1, 2), "groups": 2, "activation": None}
    got = conv_block(x, weight, **options, plan="direct")
    expected = reference.conv_block(x.double(), weight.double(), **options)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_stride_wider_than_the_image():
    """As many phases of columns would be as much memory."""
    x, weight = torch.randn(1, 2, 8, 8), torch.randn(2, 1, 3, 3)
    for stride in (2**27, (1, 2**30), (2**30, 1)):
        options = {"stride": stride, "groups": 2, "activation": None}
        got = conv_block(x, weight, **options, plan="direct")
        expected = F.conv2d(x.double(), weight.double(), stride=stride, groups=2)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.instruction_sets
def test_planes_beside_what_is_not_finite():
    """A NaN stays in its place, an infinity too, and what lies beyond an image is never read."""
    x = torch.randn(3, 20, 9, 9)
    x[1, 4, 2, 3], x[2, 0, 8, 8] = math.nan, math.inf
    whole = torch.full((5, 20, 9, 9), math.nan)
    whole[1:4] = x
    for weight, groups in ((torch.randn(12, 20, 1, 1), 1), (torch.randn(20, 1, 3, 3), 20)):
        expected = F.conv2d(x.double(), weight.double(), groups=groups)
        for given in (x, whole[1:4]):
            got = conv_block(given, weight, activation=None, groups=groups, plan="direct")
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.instruction_sets
@plans
def test_odd_channels_dilated_in_bfloat16(plan):
    """Where PyTorch's contiguous weight gradient is right and its channels-last one is not."""
    for block in (
        Block(1, 65, (14, 28), 15, (1, 3), padding=(0, 3), dilation=(1, 2), groups=5, bias=False),
        Block(2, 26, (14, 28), 6, (3, 3), padding=(2, 3), dilation=(2, 2)),
    ):
        tensors, grad = integer_tensors(block, torch.bfloat16)
        assert_block(block, tensors, grad, plan=plan, exact=True)


@needs_extension
def test_pointwise_strided_in_bfloat16():
    """Where PyTorch's own channels-last weight gradient breaks the heap, in a process of its own."""
    code = f"""
import torch
from cnnlstm_fast.functional import conv_block
for plan in {FUSED}:
    for c in (14, 15):
        for i in range(100):
            x, w = torch.randn(3, c, 16, 28).bfloat16(), torch.randn(30, c, 1, 1).bfloat16().requires_grad_()
            out = conv_block(x, w, stride=2, pool=torch.nn.MaxPool2d(2), plan=plan)
            out.sum().backward()
print("alive")
"""
    ran = run_python(code, MALLOC_CHECK_="3")
    assert ran.returncode == 0 and "alive" in ran.stdout, f"exit status {ran.returncode}: {ran.stderr[:200]}"


@pytest.mark.parametrize("plan", ["auto", "reference"])
def test_zero_channels(plan):
    """Whatever PyTorch makes of an input without channels."""
    block = Block(2, 0, (6, 6), 4, (3, 3))
    tensors = normal_tensors(block, torch.float32)
    ours, theirs = our_block(block, **tensors, plan=plan), torch_block(block, **tensors)
    assert ours.shape == theirs.shape and torch.equal(ours, theirs)


@plans
def test_a_window_with_nothing_in_it(plan):
    """Dilation carries this pool's only window past the map, where PyTorch gives -inf."""
    block = Block(3, 2, (1, 2), 5, (1, 1), pool=PoolCase((1, 2), (1, 2), (0, 1), (1, 3)))
    tensors, _ = integer_tensors(block, torch.float32)
    assert_block(block, tensors, None, plan=plan, exact=True)


@plans
def test_large_output(plan):
    """Over 32 MiB, where outputs come from memory of their own, and not a multiple of any page."""
    block = Block(37, 2, (63, 67), 61, (1, 1))
    tensors, _ = integer_tensors(block, torch.float32)
    expected = torch_block(block, **tensors)
    assert expected.nbytes > 32 * 2**20
    for layout in ("channels_first", "channels_last"):
        first = our_block(block, **tensors, plan=plan, layout=layout)
        second = our_block(block, **{k: -t for k, t in tensors.items()}, plan=plan, layout=layout)
        assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
        assert torch.equal(first, expected)
        del first, second


# ---------------------------------------------------------------- which gradients


@plans
@floats
@pytest.mark.parametrize(
    "needs",
    [("x",), ("weight",), ("bias",), ("x", "weight"), ("x", "bias"), ("weight", "bias")],
    ids="+".join,
)
def test_only_the_gradients_asked_for(plan, dtype, needs):
    tensors, grad = integer_tensors(SMALL, dtype)
    ours = assert_block(SMALL, tensors, grad, plan=plan, needs=needs, exact=True)
    assert set(ours) == {"out", *needs}


@plans
def test_no_gradient(plan):
    tensors = normal_tensors(SMALL, torch.float32)
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    with torch.no_grad():
        assert not our_block(SMALL, **leaves, plan=plan).requires_grad
    with torch.inference_mode():
        assert our_block(SMALL, **leaves, plan=plan).is_inference()
    frozen = {k: t.detach() for k, t in tensors.items()}
    assert not our_block(SMALL, **frozen, plan=plan).requires_grad
    assert our_block(SMALL, **frozen | {"bias": tensors["bias"]}, plan=plan).requires_grad


@plans
def test_inference_mode_gives_the_same_numbers(plan):
    tensors, _ = integer_tensors(SMALL, torch.float32)
    with torch.inference_mode():
        out = our_block(SMALL, **{k: t.clone() for k, t in tensors.items()}, plan=plan)
    assert torch.equal(out, torch_block(SMALL, **tensors))


@plans
def test_gradients_accumulate_over_two_backwards(plan):
    tensors, grad = integer_tensors(SMALL, torch.float32)
    leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
    out = our_block(SMALL, **leaves, plan=plan)
    out.backward(grad, retain_graph=True)
    first = {k: t.grad.clone() for k, t in leaves.items()}
    out.backward(grad)
    assert all(torch.equal(t.grad, 2 * first[k]) for k, t in leaves.items())
    with pytest.raises(RuntimeError, match="second time"):
        out.backward(grad)


@plans
def test_two_blocks_in_a_row(plan):
    """The gradient of the first passes through the second's; the same input feeds both."""
    first = Block(2, 4, (10, 12), 4, (3, 3), padding=(1, 1), pool=POOL_2X2)
    second = replace(first, size=(5, 6))
    a, _ = integer_tensors(first, torch.float32)
    b, grad = integer_tensors(second, torch.float32)

    def chain(block_fn):
        def fn(x, w1, b1, w2, b2):
            return block_fn(second, block_fn(first, x, w1, b1), w2, b2)

        return fn

    tensors = {"x": a["x"], "w1": a["weight"], "b1": a["bias"], "w2": b["weight"], "b2": b["bias"]}
    grad = grad.sign()
    ours = evaluate(chain(lambda *t: our_block(*t, plan=plan)), tensors, grad, tuple(tensors))
    doubles = {k: t.double() for k, t in tensors.items()}
    true = evaluate(chain(torch_block), doubles, grad.double(), tuple(tensors))
    for name, t in ours.items():
        assert torch.equal(t.double(), true[name]), name


@plans
def test_a_changed_input_is_noticed(plan):
    """Backward after an in-place change of what it reads raises, as in PyTorch."""
    tensors = normal_tensors(SMALL, torch.float32)
    for name in ("x", "weight"):
        leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
        moved = {k: t * 1 for k, t in leaves.items()}
        out = our_block(SMALL, **moved, plan=plan)
        moved[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@fused_plans
@floats
@pytest.mark.parametrize("pool", [None, POOL_2X2], ids=["no pool", "2x2"])
@pytest.mark.parametrize("channels", [3, 16, 33])
def test_a_bias_has_the_sum_of_all_gradients(plan, dtype, pool, channels):
    """Rounded once, however many places there are, over the images of several chunks."""
    block = Block(9, 4, (101, 67), channels, (3, 3), padding=(1, 1), activation=None, pool=pool)
    if refusal(block, plan, dtype):
        return
    tensors = normal_tensors(block, dtype)
    grad = (torch.randn(block.out_shape()) + 1).to(dtype)
    found = evaluate(lambda **t: our_block(block, **t, plan=plan), tensors, grad, ("bias",))["bias"]
    true = grad.double().sum((0, 2, 3))
    off = (found.double() - true).abs()
    assert (off <= 0.6 * torch.finfo(dtype).eps * true.abs()).all(), off / true.abs()


@plans
def test_a_changed_bias_is_nobodys_business(plan):
    """No gradient reads the bias, and PyTorch lets it change between forward and backward."""
    tensors, grad = integer_tensors(SMALL, torch.float32)
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    out = our_block(SMALL, **leaves, plan=plan)
    with torch.no_grad():
        leaves["bias"].add_(1)
    out.backward(grad)
    expected = grad * (out > 0)
    assert torch.equal(leaves["bias"].grad, expected.sum((0, 2, 3)))


@plans
@pytest.mark.parametrize("trained", ["x", "weight"])
def test_what_no_gradient_reads_may_change(plan, trained):
    """PyTorch's convolution keeps the weight for the input's gradient and the input for the weight's."""
    tensors, grad = integer_tensors(SMALL, torch.float32)
    read = {"x": "weight", "weight": "x"}[trained]

    def after_changes(fn):
        moved = {k: t.clone().requires_grad_(k == trained) for k, t in tensors.items()}
        out = fn(SMALL, **moved)
        with torch.no_grad():
            for name in moved.keys() - {read, trained}:
                moved[name].zero_()
        return torch.autograd.grad(out, moved[trained], grad)[0]

    expected = after_changes(torch_block)
    assert torch.equal(after_changes(lambda *a, **k: our_block(*a, **k, plan=plan)), expected)


@plans
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_result_may_be_changed(plan, layout):
    """PyTorch lets a pooled result be changed in place before backward."""
    tensors, grad = integer_tensors(SMALL, torch.float32)
    grad = in_layout(grad, layout)
    results = []
    for fn in (
        lambda *a, **k: our_block(*a, **k, plan=plan, layout=layout),
        lambda *a, **k: in_layout(torch_block(*a, **k), layout),
    ):
        leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
        out = fn(SMALL, **leaves)
        out.mul_(2).add_(1)
        results.append(torch.autograd.grad(out, list(leaves.values()), grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---------------------------------------------------------------- arguments as PyTorch takes them


@plans
def test_rank_3_is_rank_4_of_height_1(plan):
    signal = some_block(3)
    tensors = normal_tensors(signal, torch.float32)
    ways, true = torch_ways(signal, tensors, None)
    assert_close_as_torch(
        our_block(signal, **tensors, plan=plan), [w["out"] for w in ways], true["out"], str(signal)
    )
