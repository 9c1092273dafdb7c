"""functional.conv_block with a batch norm against PyTorch: results, every gradient, running statistics."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CURVED,
    LAYOUTS,
    POOL_2X2,
    Block,
    PoolCase,
    assert_block,
    assert_close_as_torch,
    fused_plans,
    needs_extension,
    normal_tensors,
    plans,
    random_blocks,
    refusal,
    strided,
    torch_block,
)
from norms import assert_normed, decided, eager, ours, random_norm, run
from torch import nn

from cnnlstm_fast.functional import conv_block
from cnnlstm_fast.ops import conv_norm as op

floats = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
BLOCK = Block(3, 5, (9, 14), 18, (3, 3), padding=(1, 1), pool=POOL_2X2)
BLOCKS = {
    "2x2": BLOCK,
    "no pool": replace(BLOCK, pool=None),
    "overlapping": replace(BLOCK, pool=PoolCase((3, 3), (1, 2), (1, 0), (1, 1))),
    "bytes": replace(BLOCK, c_out=33, pool=PoolCase((4, 5), (2, 3), (2, 2), (1, 1))),
    "gaps": replace(BLOCK, pool=PoolCase((1, 1), (2, 3), (0, 0), (1, 1))),
    "many taps": Block(2, 24, (7, 9), 32, (3, 3), bias=False, pool=POOL_2X2),
    "groups": Block(2, 8, (7, 9), 32, (3, 3), groups=4, pool=POOL_2X2),
    "depthwise": Block(2, 17, (7, 9), 17, (3, 3), groups=17),
    "strided": Block(2, 3, (31, 22), 24, (5, 5), stride=(2, 2), bias=False),
    "signal": Block(3, 5, (31,), 16, (3,), (1,), (1,), (1,), pool=PoolCase((3,), (2,), (1,), (1,))),
}
norm_blocks = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
some_blocks = pytest.mark.parametrize(
    "block", [BLOCKS[k] for k in ("2x2", "no pool", "many taps")], ids=["2x2", "no pool", "many taps"]
)


# ------------------------------------------------------------- the sweep


@pytest.mark.instruction_sets
@norm_blocks
@plans
@floats
@modes
def test_error_is_as_pytorchs(block, plan, dtype, training):
    if (
        dtype is torch.bfloat16
    ):  # gradients of the float32 norm: over few channels their noise is a matter of luck
        block = replace(block, c_out=block.c_out + 64 * block.groups)
    tensors = normal_tensors(block, dtype)
    assert_normed(block, tensors, random_norm(block, training), plan=plan)


@random_blocks(24)
@fused_plans
@modes
@pytest.mark.parametrize("first", [False, True], ids=["all", "first layer"])
def test_random_blocks(block, plan, training, first):
    """With and without the gradient of the input, which decides where batch statistics come from."""
    if block.c_out < 4:  # the gradient of one channel is one sum, whose rounding error is a matter of luck
        block = replace(block, c_out=4 * block.c_out)
    tensors = normal_tensors(block, torch.float32)
    out = eager(replace(block, pool=None), **tensors | {"bias": None}, norm=nn.Identity()).shape
    if out[0] * out[2:].numel() < 8:
        return
    norm = random_norm(block, training, affine=random.random() < 0.8, eps=random.choice((1e-5, 1e-3, 0.1)))
    needs = ("weight", "bias") if first else ("x", "weight", "bias")
    assert_normed(block, tensors, norm, plan=plan, needs=needs)


@some_blocks
@plans
@modes
@pytest.mark.parametrize("activation", [None, "hardtanh", *CURVED])
def test_activations(block, plan, training, activation):
    block = replace(block, activation=activation)
    tensors = normal_tensors(block, torch.float32)
    for needs in (("x", "weight", "bias"), ("weight", "bias")):
        assert_normed(block, tensors, random_norm(block, training), plan=plan, needs=needs)


@some_blocks
@plans
@modes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(block, plan, training, layout):
    tensors = normal_tensors(block, torch.float32)
    assert_normed(block, tensors, random_norm(block, training), plan=plan, layout=layout)


@some_blocks
@plans
@modes
@pytest.mark.parametrize("first", [False, True], ids=["all", "first layer"])
def test_means_far_from_zero(block, plan, training, first):
    """An image of bytes: the mean of the map is far larger than its deviation."""
    tensors = normal_tensors(block, torch.float32)
    tensors["x"] = torch.randint(0, 256, tensors["x"].shape).float() + 100
    tensors["weight"] = tensors["weight"].abs()
    norm = random_norm(block, training)
    with torch.no_grad():
        z = torch_block(replace(block, activation=None, pool=None), **tensors)
        norm.running_mean.copy_(z.mean((0, 2, 3)))
        norm.running_var.copy_(z.var((0, 2, 3)))
    assert_normed(
        block, tensors, norm, plan=plan, needs=("weight", "bias") if first else ("x", "weight", "bias")
    )


OUTLIERS = {
    "first place": lambda x: x[0, :, 0, 0],
    "first place of one channel": lambda x: x[0, 0, 0, 0],
    "first place of every image": lambda x: x[:, :, 0, 0],
    "last place": lambda x: x[-1, :, -1, -1],
    "anywhere": lambda x: x[:, :, random.randrange(x.shape[2]), random.randrange(x.shape[3])][1],
}


@pytest.mark.instruction_sets
@pytest.mark.parametrize("pool", [None, POOL_2X2], ids=["no pool", "2x2"])
@plans
@pytest.mark.parametrize("where", OUTLIERS)
@pytest.mark.parametrize("first", [False, True], ids=["all", "first layer"])
def test_outliers(pool, plan, where, first):
    """One place far from the others spoils no statistic, wherever it lies."""
    # Behind a ReLU a channel may have but a few small values left, whose rounding is a matter of luck.
    block = Block(4, random.choice((3, 16)), (21, 18), 33, (3, 3), padding=(1, 1), pool=pool,
                  activation=None if pool is None else "relu")  # fmt: skip
    tensors = normal_tensors(block, torch.float32)
    tensors["x"] += random.choice((0.0, 30.0))
    OUTLIERS[where](tensors["x"]).add_(random.choice((-1e3, -1e2, 1e2, 1e3)))
    needs = ("weight", "bias") if first else ("x", "weight", "bias")
    # Results of a tile or a window share the rounding of its loudest place: a single channel may suffer.
    by_channel = plan in ("direct", "chunked") and pool is None
    assert_normed(block, tensors, random_norm(block, True), plan=plan, needs=needs, by_channel=by_channel)


@pytest.mark.parametrize("channels", [3, 16], ids=["few taps", "many taps"])
@plans
@pytest.mark.parametrize("ratio", [1e3, 1e4, 1e6], ids="{:g}".format)
@pytest.mark.parametrize("first", [False, True], ids=["all", "first layer"])
def test_means_of_many_deviations(channels, plan, ratio, first):
    block = Block(3, channels, (17, 14), 24, (3, 3))
    tensors = normal_tensors(block, torch.float32)
    tensors["x"] += ratio
    needs = ("weight", "bias") if first else ("x", "weight", "bias")
    # Of the gradients mostly rounding is left: what reaches the norm's parameters is what counts.
    assert_normed(block, tensors, random_norm(block, True), plan=plan, needs=needs)


@plans
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_what_is_not_finite_reaches_the_statistics_as_in_pytorch(plan, value, place):
    block = replace(BLOCK, kernel=(1, 1), padding=(0, 0))  # so that one value reaches one place
    if refusal(block, plan, torch.float32):
        return
    tensors = normal_tensors(block, torch.float32)
    tensors["x"][place, 0, place, place] = value
    norm = random_norm(block, True)
    found, expected = (
        run(lambda *a, fn=fn, k=k: fn(block, *a, **k), tensors, norm, None)
        for fn, k in ((ours, {"plan": plan}), (eager, {}))
    )
    for name in ("out", "norm.running_mean", "norm.running_var"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4, equal_nan=True)


@plans
@modes
@pytest.mark.parametrize("pool", [None, POOL_2X2], ids=["no pool", "pool"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_in_the_gradient_reaches_what_pytorchs_does(plan, training, pool, value):
    block = replace(BLOCK, pool=pool)
    tensors, norm, grad = (
        normal_tensors(block, torch.float32),
        random_norm(block, training),
        torch.randn(block.out_shape()),
    )
    grad.view(-1)[random.randrange(grad.numel())] = value
    found = run(lambda *a: ours(block, *a, plan=plan), tensors, norm, grad)
    expected = run(lambda *a: eager(block, *a), tensors, norm, grad)
    true = run(
        lambda *a: eager(block, *a),
        {k: t.double() for k, t in tensors.items()},
        copy.deepcopy(norm).double(),
        grad.double(),
    )
    for name in ("x", "weight", "bias", "norm.weight", "norm.bias"):
        assert_close_as_torch(found[name], expected[name], true[name], name)


@plans
@modes
@pytest.mark.parametrize("how", ["sliced", "channels_last", "expanded"])
def test_strided_input(plan, training, how):
    tensors = normal_tensors(BLOCK, torch.float32)
    tensors["x"] = strided(tensors["x"], how)
    assert_normed(BLOCK, tensors, random_norm(BLOCK, training), plan=plan)


@fused_plans
@pytest.mark.parametrize("pool", [None, POOL_2X2], ids=["no pool", "pool"])
@pytest.mark.parametrize("first", [False, True], ids=["all", "first layer"])
def test_more_images_than_a_chunk_holds(plan, pool, first):
    block = Block(5, 2, (125, 131), 24, (3, 3), padding=(1, 1), pool=pool)
    tensors = normal_tensors(block, torch.float32)
    needs = ("weight", "bias") if first else ("x", "weight", "bias")
    assert_normed(block, tensors, random_norm(block, True), plan=plan, needs=needs)


@pytest.mark.parametrize("plan", ["auto", "reference"])
@modes
def test_float64(plan, training):
    tensors = normal_tensors(BLOCK, torch.float64)
    assert_normed(BLOCK, tensors, random_norm(BLOCK, training).double(), plan=plan)


# ------------------------------------------------------------- what the norm remembers


@plans
@pytest.mark.parametrize("momentum", [0.1, 0.9, 1.0, 0.0, None], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_running_statistics(plan, momentum, trained):
    """Over several batches, and eval mode afterwards."""
    theirs = random_norm(BLOCK, True, momentum=momentum).requires_grad_(trained)
    mine, true = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    for _ in range(3):
        tensors = normal_tensors(BLOCK, torch.float32)
        given = [tensors[k].requires_grad_(trained and k != "x") for k in ("x", "weight", "bias")]
        ours(BLOCK, *given, mine, plan=plan)
        eager(BLOCK, *given, theirs)
        eager(BLOCK, *(t.double() for t in given), true)
    assert mine.num_batches_tracked == theirs.num_batches_tracked == 3
    for name in ("running_mean", "running_var"):
        assert_close_as_torch(getattr(mine, name), getattr(theirs, name), getattr(true, name), name)
    with torch.no_grad():
        found, expected = (
            fn(BLOCK, *given, m.eval()) for fn, m in ((lambda *a: ours(*a, plan=plan), mine), (eager, theirs))
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@plans
@modes
@pytest.mark.parametrize("first", [False, True], ids=["all", "first layer"])
def test_without_running_statistics(plan, training, first):
    """The batch's own in both modes; and a norm that has stopped keeping them but still has some."""
    needs = ("weight", "bias") if first else ("x", "weight", "bias")
    norm = random_norm(BLOCK, training, track_running_stats=False)
    assert norm.running_mean is None
    assert_normed(BLOCK, normal_tensors(BLOCK, torch.float32), norm, plan=plan, needs=needs)
    stopped = random_norm(BLOCK, training)
    stopped.track_running_stats = False
    assert_normed(BLOCK, normal_tensors(BLOCK, torch.float32), stopped, plan=plan, needs=needs)


@plans
def test_no_gradient_in_training_mode(plan):
    """Under no_grad and inference_mode the norm still remembers."""
    tensors = normal_tensors(BLOCK, torch.float32)
    for mode in (torch.no_grad, torch.inference_mode):
        mine = random_norm(BLOCK, True)
        theirs = copy.deepcopy(mine)
        with mode():
            found, expected = (
                ours(BLOCK, **tensors, norm=mine, plan=plan),
                eager(BLOCK, **tensors, norm=theirs),
            )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", ["auto", "reference"])
def test_one_value_per_channel(plan):
    """Raises as PyTorch does, and the norm counts the batch as PyTorch's does."""
    norm = nn.BatchNorm2d(4)
    x, weight = torch.randn(1, 3, 3, 3), torch.randn(4, 3, 3, 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        conv_block(x, weight, norm=norm, plan=plan)
    conv_block(x, weight, norm=norm.eval(), plan=plan)


@plans
def test_a_channel_without_variance(plan):
    """The same value everywhere: the epsilon stands alone."""
    tensors = normal_tensors(BLOCK, torch.float32)
    tensors["weight"][3] = 0
    norm = random_norm(BLOCK, True)
    mine = run(lambda *a: ours(BLOCK, *a, plan=plan), tensors, norm, torch.ones(BLOCK.out_shape()))
    assert mine["out"].isfinite().all() and mine["weight"].isfinite().all()
    constant = F.relu(norm.bias[3]).expand(mine["out"][:, 3].shape)
    # The map is the convolution's bias everywhere; its mean may be an ulp or two off, over sqrt(eps).
    ulps = 4 * torch.finfo(torch.float32).eps * tensors["bias"][3].abs()
    off = float(ulps * norm.weight[3].detach().abs() / norm.eps**0.5)
    torch.testing.assert_close(mine["out"][:, 3], constant, rtol=1e-6, atol=off + 1e-7)


@plans
@modes
def test_a_nan_stays_in_its_channels(plan, training):
    tensors = normal_tensors(BLOCK, torch.float32)
    tensors["weight"][3, 0, 0, 0] = torch.nan
    mine = run(lambda *a: ours(BLOCK, *a, plan=plan), tensors, random_norm(BLOCK, training), None)
    assert mine["out"][:, 3].isnan().all() and mine["out"][:, [0, 1, 2, 4]].isfinite().all()


# ------------------------------------------------------------- which gradients


@plans
@modes
@pytest.mark.parametrize("needs", [(), ("x",), ("weight",), ("bias",), ("x", "weight")], ids="+".join)
@pytest.mark.parametrize("norm_trained", [False, True], ids=["norm frozen", "norm trained"])
def test_only_the_gradients_asked_for(plan, training, needs, norm_trained):
    if not needs and not norm_trained:
        return
    norm = random_norm(BLOCK, training).requires_grad_(norm_trained)
    found = assert_normed(BLOCK, normal_tensors(BLOCK, torch.float32), norm, plan=plan, needs=needs)
    assert {"norm.weight", "norm.bias"} & set(found) == (
        {"norm.weight", "norm.bias"} if norm_trained else set()
    )


@plans
@modes
def test_an_affine_norm_with_half_its_parameters(plan, training):
    for gone in ("weight", "bias"):
        norm = random_norm(BLOCK, training)
        setattr(norm, gone, None)
        tensors = normal_tensors(BLOCK, torch.float32)
        grad = torch.zeros(BLOCK.out_shape())
        found = run(lambda *a: ours(BLOCK, *a, plan=plan), tensors, norm, grad)
        expected = run(lambda *a: eager(BLOCK, *a), tensors, norm, grad)
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found["out"], expected["out"], rtol=1e-4, atol=1e-4)


@plans
@modes
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("first", [False, True], ids=["all", "first layer"])
def test_double_backward(plan, training, activation, first):
    block = replace(BLOCK, activation=activation)
    tensors = normal_tensors(block, torch.float32)
    norm = random_norm(block, training)
    grad = torch.randn(block.out_shape()) * decided(block, tensors, norm)

    def penalty(fn, dtype):
        module = copy.deepcopy(norm).to(dtype)
        leaves = {k: t.to(dtype).requires_grad_(k != "x" or not first) for k, t in tensors.items()}
        wanted = [t for t in (*leaves.values(), *module.parameters()) if t.requires_grad]
        first_grads = torch.autograd.grad(
            fn(block, **leaves, norm=module), wanted, grad.to(dtype), create_graph=True
        )
        total = sum((g * g).sum() for g in first_grads)
        return torch.autograd.grad(total, [leaves["weight"], module.weight])

    mine = penalty(lambda *a, **k: ours(*a, **k, plan=plan), torch.float32)
    theirs, true = penalty(eager, torch.float32), penalty(eager, torch.float64)
    for name, found, their, truth in zip(("weight", "norm.weight"), mine, theirs, true, strict=True):
        assert_close_as_torch(found, their, truth, name)


@plans
def test_the_result_may_be_changed(plan):
    """After the pool PyTorch lets the result be changed in place before backward."""
    tensors = normal_tensors(BLOCK, torch.float32)
    norm = random_norm(BLOCK, True)
    grad = torch.randn(BLOCK.out_shape()) * decided(BLOCK, tensors, norm)
    found = run(lambda *a: ours(BLOCK, *a, plan=plan).mul_(2).add_(1), tensors, norm, grad)
    expected = run(lambda *a: eager(BLOCK, *a).mul_(2).add_(1), tensors, norm, grad)
    for name in ("x", "weight", "norm.weight", "norm.bias"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------- what is kept, bits, machinery


def kept_bytes(fn) -> int:
    """Distinct memory that autograd keeps of one call."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fn()
    return sum(storages.values())


@fused_plans
@pytest.mark.parametrize("first", [False, True], ids=["inner", "first layer"])
def test_backward_keeps_a_quarter(plan, first):
    """Of what PyTorch keeps for conv, norm, ReLU and pool, arguments aside."""
    block = Block(4, 3 if first else 16, (64, 64), 64, (3, 3), padding=(1, 1), pool=POOL_2X2)
    tensors = normal_tensors(block, torch.float32)
    x = tensors["x"].requires_grad_(not first)
    weight, bias = tensors["weight"].requires_grad_(), tensors["bias"].requires_grad_()
    norm = random_norm(block, True)
    mine = kept_bytes(lambda: ours(block, x, weight, bias, norm, plan=plan))
    theirs = kept_bytes(lambda: eager(block, x, weight, bias, norm))
    assert mine - x.nbytes <= (theirs - x.nbytes) / 4
    assert mine <= theirs / 4 or not first


@pytest.mark.instruction_sets
@needs_extension
@some_blocks
@fused_plans
@modes
@pytest.mark.parametrize("first", [False, True], ids=["all", "first layer"])
def test_the_same_bits_twice_and_on_any_number_of_threads(block, plan, training, first):
    tensors, norm = normal_tensors(block, torch.float32), random_norm(block, training)
    grad = torch.randn(block.out_shape())
    needs = ("weight", "bias") if first else ("x", "weight", "bias")
    results = []
    for threads in (2, 2, 1, 3) if plan == "direct" else (2, 2):
        torch.set_num_threads(threads)
        results.append(run(lambda *a: ours(block, *a, plan=plan), tensors, norm, grad, needs))
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in other)


@pytest.mark.some(3)
@plans
@modes
@pytest.mark.parametrize("first", [False, True], ids=["all", "first layer"])
def test_no_graph_break(plan, training, first):
    """fullgraph, forward and backward, the norm's memory too."""
    tensors, norm = normal_tensors(BLOCK, torch.float32), random_norm(BLOCK, training)
    grad = torch.randn(BLOCK.out_shape()) * decided(BLOCK, tensors, norm)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w, b, m: ours(BLOCK, x, w, b, m, plan=plan), fullgraph=True, backend="aot_eager"
    )
    needs = ("weight", "bias") if first else ("x", "weight", "bias")
    found = run(compiled, tensors, norm, grad, needs)
    expected = run(lambda *a: eager(BLOCK, *a), tensors, norm, grad, needs)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)


@pytest.mark.some(2)
@needs_extension
@fused_plans
@pytest.mark.parametrize("pool", [[], [2, 2, 2, 2, 0, 0, 1, 1, 0]], ids=["no pool", "pool"])
def test_opcheck(plan, pool):
    x, weight = torch.randn(2, 3, 8, 9), torch.randn(18, 3, 3, 3)
    gamma, beta, var = torch.randn(18), torch.randn(18), torch.rand(18) + 0.1
    rest = ([1, 1, 1, 1, 1, 1, 1], 1, [], pool, [0, 2, 3, 1], {"direct": 1, "chunked": 2}[plan])
    torch.library.opcheck(op.forward_op, (x, weight, beta, gamma, beta, None, None, 1e-5, *rest, True, False))
    torch.library.opcheck(op.forward_op, (x, weight, beta, gamma, None, beta, var, 1e-5, *rest, True, False))
    torch.library.opcheck(op.forward_op, (x, weight, None, None, None, None, None, 1e-5, *rest, False, False))
    out, codes, kept, kept_map, stats = op.forward_op(
        x, weight, None, gamma, beta, None, None, 1e-5, *rest, True, False
    )
    for needs in ((False, True, True), (True, False, True)):
        args = (torch.randn_like(out), x, weight, stats, codes, kept, kept_map, 1e-5, *rest, *needs)
        torch.library.opcheck(op.backward_op, args)
    torch.library.opcheck(op.fold_op, (weight, None, gamma, beta, beta, var, 1e-5))
    torch.library.opcheck(op.fold_op, (weight, beta, None, None, beta, var, 1e-5))
    torch.library.opcheck(op.moments_op, (x, weight, rest[0]))


@needs_extension
def test_wrong_calls_of_the_ops():
    """Each wrong size is an error, not memory read beyond its end."""
    x, weight = torch.randn(2, 3, 8, 9), torch.randn(18, 3, 3, 3)
    rest = ([1, 1, 1, 1, 1, 1, 1], 1, [], [2, 2, 2, 2, 0, 0, 1, 1, 0], [0, 2, 3, 1], 2)
    good = torch.ones(18)
    for gamma, beta in (
        (torch.ones(17), good),
        (good, torch.ones(19)),
        (good.double(), good),
        (good[None], good),
    ):
        with pytest.raises(RuntimeError):
            op.forward_op(x, weight, None, gamma, beta, None, None, 1e-5, *rest, True, False)
        with pytest.raises(RuntimeError):
            op.fold_op(weight, None, gamma, beta, good, good, 1e-5)
    out, codes, kept, kept_map, stats = op.forward_op(
        x, weight, None, good, good, None, None, 1e-5, *rest, True, False
    )
    right = dict(grad=out, x=x, weight=weight, stats=stats, codes=codes, kept=kept, kept_map=kept_map)
    wrong = dict(
        grad=out[:1], x=x[:1], weight=weight[:, :2], stats=stats[:2], codes=codes[:, :1], kept=kept[..., :1]
    )
    for name, value in wrong.items():
        with pytest.raises(RuntimeError):
            op.backward_op(*(right | {name: value}).values(), 1e-5, *rest, False, True, True)
    without_pool = (*rest[:3], [], *rest[4:])
    with pytest.raises(RuntimeError):
        op.forward_op(
            x[:1, :, :1, :1], weight, None, good, good, None, None, 1e-5, *without_pool, True, False
        )


@modes
def test_a_changed_norm_is_not_fused(training):
    """Hooks, subclasses and forwards of their own run; an unbatched map is PyTorch's to refuse."""
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    called = []
    hooked = nn.BatchNorm2d(4).train(training)
    hooked.register_forward_hook(lambda *_: called.append(1) and None)
    conv_block(x, weight, norm=hooked)
    assert called

    class Doubling(nn.BatchNorm2d):
        def forward(self, y):
            return 2 * super().forward(y)

    doubling = Doubling(4).train(training)
    expected = F.relu(copy.deepcopy(doubling)(F.conv2d(x, weight)))
    assert torch.equal(conv_block(x, weight, norm=doubling), expected)
    with pytest.raises(ValueError, match="expected 4D"):
        conv_block(x[0], weight, norm=nn.BatchNorm2d(4).train(training))


@pytest.mark.parametrize("training", [False, True])
def test_an_unbatched_signal_is_pytorchs(training):
    """BatchNorm1d takes (C, L) for a batch of C samples of L channels."""
    x, weight = torch.randn(3, 11), torch.randn(9, 3, 3)
    norm = nn.BatchNorm1d(9).train(training)
    expected = F.relu(copy.deepcopy(norm)(F.conv1d(x, weight)))
    assert torch.equal(conv_block(x, weight, norm=norm), expected)


@plans
def test_autocast(plan):
    """The convolution in bfloat16, the norm's parameters in float32, as PyTorch has it."""
    tensors, norm = normal_tensors(BLOCK, torch.float32), random_norm(BLOCK, True)
    for training in (True, False):
        norm.train(training)
        with torch.autocast("cpu", torch.bfloat16):
            found = run(
                lambda *a: ours(BLOCK, *a, plan=plan), tensors, norm, torch.ones(BLOCK.out_shape()).bfloat16()
            )
            expected = run(
                lambda *a: eager(BLOCK, *a), tensors, norm, torch.ones(BLOCK.out_shape()).bfloat16()
            )
        assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in expected.items()}
        double = {k: t.double() for k, t in tensors.items()}
        true = eager(BLOCK, *double.values(), copy.deepcopy(norm).double()).detach()
        assert_close_as_torch(found["out"], expected["out"], true)


@needs_extension
def test_a_norm_that_was_used_plain_before_can_be_counted():
    """PyTorch saves running statistics for a norm's backward, and its own counting moves no version."""
    norm, conv = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3)
    twin = copy.deepcopy(norm)
    x = torch.randn(2, 6, 9, 8)

    def both(norm, block):
        y = x.clone().requires_grad_()
        (norm(y).sum() + block(y).square().sum()).backward()
        return y.grad, norm.weight.grad, norm.running_mean, norm.running_var

    def fused(y):
        return conv_block(y, conv.weight, conv.bias, norm=norm, activation="relu", plan="direct")

    got = both(norm, fused)
    expected = both(twin, lambda y: torch.relu(twin(conv(y))))
    for mine, true in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-4)
    assert norm.running_mean._version == twin.running_mean._version


@needs_extension
def test_a_bias_may_change_before_the_backward_of_a_folded_norm():
    norm, conv = nn.BatchNorm2d(6).eval().requires_grad_(False), nn.Conv2d(3, 6, 3)
    x = torch.randn(2, 3, 9, 8, requires_grad=True)
    y = conv_block(x, conv.weight, conv.bias, norm=norm, activation="relu", plan="direct")
    wanted = [x, *conv.parameters()]
    expected = torch.autograd.grad(torch.relu(norm(conv(x))).sum(), wanted)
    with torch.no_grad():
        conv.bias.add_(1.0)
    for got, true in zip(torch.autograd.grad(y.sum(), wanted), expected, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("plan", ["direct", "chunked", "winograd"])
@needs_extension
def test_a_pool_of_one_element(plan, training, activation):
    """Host and kernels say alike whether there is a pool."""
    block = Block(3, 5, (9, 8), 20, (3, 3), padding=(1, 1), activation=activation)
    block = replace(block, pool=PoolCase((1, 1), (1, 1), (0, 0), (1, 1)))
    tensors = normal_tensors(block, torch.float32)
    norm = random_norm(block, training)
    assert_normed(block, tensors, norm, plan=plan)
    grad = torch.randn(block.out_shape()) * helpers.decided(block, tensors)
    assert_block(block, tensors, grad, plan=plan)


@plans
def test_a_constant_gradient_leaves_nothing(plan):
    """What a norm cancels leaves no more than a rounding, as PyTorch's does."""
    block = replace(BLOCK, pool=None, activation=None)
    if refusal(block, plan, torch.float32):
        return
    tensors, norm = normal_tensors(block, torch.float32), random_norm(block, True)
    grad = torch.randn(block.out_shape()[:2])[:1, :, None, None].expand(block.out_shape())
    found = run(lambda *a: ours(block, *a, plan=plan), tensors, norm, grad)
    expected = run(lambda *a: eager(block, *a), tensors, norm, grad)
    for name in ("x", "weight"):
        scale = tensors["weight"].norm() if name == "x" else tensors["x"].norm()
        assert found[name].norm() <= 2 * expected[name].norm() + 1e-9 * grad.norm() * scale, name
