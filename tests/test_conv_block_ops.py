"""The two ops behind functional.conv_block, and PyTorch's machinery around them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from forked import run_forked
from helpers import (
    CURVED,
    FUSED,
    POOL_2X2,
    Block,
    PoolCase,
    after_conv,
    as_2d,
    assert_close_as_torch,
    decided,
    evaluate,
    floats,
    fused_plans,
    in_layout,
    integer_tensors,
    needs_extension,
    normal_tensors,
    our_block,
    plans,
    random_blocks,
    refusal,
    torch_block,
    torch_ways,
    winners,
)
from torch import nn

import cnnlstm_fast as cf
from cnnlstm_fast.functional import conv_block
from cnnlstm_fast.ops import conv_block as op
from cnnlstm_fast.spec import conv_size, pool_size

BLOCK = Block(3, 5, (9, 14), 18, (3, 3), padding=(1, 1), pool=POOL_2X2)

BLOCKS = {
    "conv relu pool": BLOCK,
    "conv relu": Block(2, 3, (7, 8), 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "conv pool": Block(
        2, 3, (7, 8), 5, (3, 3), activation=None, pool=PoolCase((3, 5), (2, 1), (1, 2), (1, 1))
    ),
    "conv": Block(2, 3, (7, 8), 5, (3, 3), activation=None, bias=False),
    "conv hardtanh pool": replace(BLOCK, activation="hardtanh"),
    "groups": Block(2, 4, (7, 8), 32, (3, 3), groups=2, pool=PoolCase((2, 2), (2, 1), (0, 1), (1, 1), True)),
    "signal": Block(3, 4, (17,), 20, (3,), (1,), (1,), (1,), pool=PoolCase((2,), (2,), (0,), (1,))),
}
blocks = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)

small_blocks = pytest.mark.parametrize("block", [BLOCKS[k] for k in ("conv relu pool", "conv", "signal")],
                                       ids=["conv relu pool", "conv", "signal"])  # fmt: skip
ORDERS = ((0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 1, 2))


def op_args(block: Block, order=(0, 1, 2, 3)):
    """conv, activation, act, pool, order as the op takes them, from the schema's own words."""
    block, _ = as_2d(block, {})
    p = block.pool
    pool = [] if p is None else [*p.kernel, *p.stride, *p.padding, *p.dilation, int(p.ceil_mode)]
    conv = [*block.stride, *block.padding, *block.dilation, block.groups]
    numbers = {None: (0, []), "relu": (1, []), "hardtanh": (2, [-2.0, 3.0]), "tanh": (5, [])}
    return conv, *numbers[block.activation], pool, list(order)


def plain_case(block: Block, dtype=torch.float32):
    """Block and whole-number tensors in 2-d form, and the convolution's map in float64."""
    tensors, grad = integer_tensors(block, dtype)
    block, tensors = as_2d(block, tensors)
    true = {k: t.double() for k, t in tensors.items()}
    y = F.conv2d(
        true["x"], true["weight"], true.get("bias"), block.stride, block.padding, block.dilation, block.groups
    )
    return block, tensors, grad if grad.dim() == 4 else grad.unsqueeze(2), y


# ---------------------------------------------------------------- the raw contract


@pytest.mark.instruction_sets
@fused_plans
@random_blocks(24)
@floats
def test_codes_name_the_winners(block, plan, dtype):
    """Half a byte for windows of up to 14 elements, else a byte; all ones where nothing passes."""
    assert_codes_name_the_winners(block, plan, dtype)


@fused_plans
@blocks
def test_codes_of_typical_blocks(block, plan):
    assert_codes_name_the_winners(block, plan, torch.float32)


def assert_codes_name_the_winners(block, plan, dtype):
    block, tensors, _, y = plain_case(block, dtype)
    conv, activation, act, pool, order = op_args(block, (0, 2, 3, 1))
    out, codes, slopes = op.forward_op(
        tensors["x"],
        tensors["weight"],
        tensors.get("bias"),
        conv,
        activation,
        act,
        pool,
        order,
        op.PLANS[plan],
        True,
    )
    assert slopes.numel() == 0
    if not (activation or pool):
        assert codes.numel() == 0
        return
    place = winners(block, y)
    n, c, height, width = place.shape
    assert tuple(out.shape) == (n, height, width, c)
    bytes_ = 8 if (not pool or pool[0] * pool[1] <= 14) else 16
    assert codes.dtype == torch.uint8 and tuple(codes.shape) == (n, height, width, -(-c // 16), bytes_)
    if bytes_ == 8:
        codes = torch.cat([codes & 15, codes >> 4], -1)  # channels 0..7 low, 8..15 high
    found = codes.flatten(3)[..., :c].permute(0, 3, 1, 2).long()
    found[found == (15 if bytes_ == 8 else 255)] = -1
    wrong = found != place
    assert not wrong.any(), f"{block}: {wrong.sum()} codes, first at {wrong.nonzero()[0].tolist()}"


@needs_extension
@blocks
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_without_keep_there_are_no_codes(block, order):
    block, tensors, _, _ = plain_case(block)
    for plan in plans_of(block):
        args = (tensors["x"], tensors["weight"], tensors.get("bias"), *op_args(block, order), plan)
        without, none, nor_slopes = op.forward_op(*args, False)
        kept, _, _ = op.forward_op(*args, True)
        assert nor_slopes.numel() == 0
        assert none.numel() == 0 and none.dtype == torch.uint8
        assert torch.equal(without, kept) and without.is_contiguous()
        assert torch.equal(without.double(), torch_block(block, **_doubles(tensors)).permute(order))


def plans_of(block) -> list[int]:
    """Those that take the block and are exact where sums are: all but ``fft``."""
    exact = {plan: number for plan, number in op.PLANS.items() if plan != "fft"}
    return [number for plan, number in exact.items() if refusal(block, plan) is None]


def _doubles(tensors):
    return {k: t.double() for k, t in tensors.items()}


@fused_plans
@blocks
@pytest.mark.parametrize("needs", ["xwb", "x", "w", "b", "wb", ""])
def test_backward_gives_what_was_asked(plan, block, needs):
    needs = tuple(name in needs for name in "xwb")
    block, tensors, grad, _ = plain_case(block)
    order = (3, 0, 2, 1)
    args = op_args(block, order)
    bias = tensors.get("bias")
    _, codes, _ = op.forward_op(tensors["x"], tensors["weight"], bias, *args, op.PLANS[plan], True)
    grads = op.backward_op(
        grad.permute(order), tensors["x"], tensors["weight"], codes, *args, op.PLANS[plan], *needs
    )
    true = evaluate(lambda **t: torch_block(block, **t), _doubles(tensors), grad.double())
    bias_grad = true.get("bias")
    if bias_grad is None:  # the op knows no bias in backward; the sum is what it would get
        zero = torch.zeros(block.c_out, dtype=torch.float64)
        with_bias = _doubles(tensors) | {"bias": zero}
        bias_grad = evaluate(lambda **t: torch_block(block, **t), with_bias, grad.double())["bias"]
    for found, expected, need in zip(grads, (true["x"], true["weight"], bias_grad), needs, strict=True):
        assert found.dtype == torch.float32
        if need:
            assert torch.equal(found.double(), expected)
        else:
            assert found.numel() == 0


@needs_extension
@blocks
def test_each_plans_backward_reads_the_others_codes(block):
    """One meaning of the codes: forward and backward may take different plans."""
    block, tensors, grad, _ = plain_case(block)
    args = op_args(block)
    true = evaluate(lambda **t: torch_block(block, **t), _doubles(tensors), grad.double())
    for forward in plans_of(block):
        _, codes, _ = op.forward_op(
            tensors["x"], tensors["weight"], tensors.get("bias"), *args, forward, True
        )
        for backward in plans_of(block):
            grads = op.backward_op(
                grad, tensors["x"], tensors["weight"], codes, *args, backward, True, True, "bias" in tensors
            )
            for found, name in zip(grads, ("x", "weight", "bias"), strict=True):
                if name in tensors:
                    assert torch.equal(found.double(), true[name]), (forward, backward, name)


@random_blocks(20)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_max_unpool_sends_gradients_to_the_argmax_positions(block, order):
    """What double backward is made of, without the compiled kernels; codes are encoded here."""
    block, _, grad, y = plain_case(block)
    _, activation, _, pool, _ = op_args(block, order)
    y.requires_grad_()
    rest = Block(0, 0, tuple(y.shape[2:]), 0, (1, 1), activation=block.activation, pool=block.pool)
    (expected,) = torch.autograd.grad(after_conv(rest, y), y, grad.double())
    codes = torch.empty(0, dtype=torch.uint8)
    if activation or pool:
        codes = encode(winners(block, y.detach()), pool[0] * pool[1] if pool else 1)
    found = op.max_unpool(grad.double().permute(order), codes, y.shape[2:], y.shape[1], pool, list(order))
    assert torch.equal(found, expected)


def encode(place: torch.Tensor, window: int) -> torch.Tensor:
    """Winners' places (N, C, H, W), -1 where nothing passes, as the op's codes; the filling is random."""
    n, c, height, width = place.shape
    nibbles = window <= 14
    padded = torch.randint(0, 15 if nibbles else 255, (n, height, width, -(-c // 16) * 16))
    padded[..., :c] = place.where(place >= 0, torch.tensor(15 if nibbles else 255)).permute(0, 2, 3, 1)
    groups = padded.unflatten(3, (-1, 16)).to(torch.uint8)
    return groups[..., :8] | groups[..., 8:] << 4 if nibbles else groups


@fused_plans
@random_blocks(12)
def test_backward_reads_codes_from_elsewhere(block, plan):
    """Codes encoded here: what stands beyond the last channel is nobody's business."""
    block, tensors, grad, y = plain_case(block)
    args = op_args(block)
    codes = torch.empty(0, dtype=torch.uint8)
    if args[1] or args[3]:
        codes = encode(winners(block, y), math.prod(block.pool.kernel) if block.pool else 1)
    grads = op.backward_op(
        grad, tensors["x"], tensors["weight"], codes, *args, op.PLANS[plan], True, True, "bias" in tensors
    )
    true = evaluate(lambda **t: torch_block(block, **t), _doubles(tensors), grad.double())
    for found, name in zip(grads, ("x", "weight", "bias"), strict=True):
        if name in tensors:
            assert torch.equal(found.double(), true[name]), f"{name} of {block}"


# ---------------------------------------------------------------- registration


OPCHECKED = [(plan, name, torch.float32) for plan in FUSED for name in BLOCKS]
OPCHECKED += [(plan, "conv relu pool", torch.bfloat16) for plan in FUSED]


@pytest.mark.some(6)
@needs_extension
@pytest.mark.parametrize(("plan", "name", "dtype"), OPCHECKED)
def test_opcheck_forward(plan, name, dtype):
    block, tensors = as_2d(BLOCKS[name], normal_tensors(BLOCKS[name], dtype))
    for order, keep in ((ORDERS[0], True), (ORDERS[2], False)):
        args = (tensors["x"], tensors["weight"], tensors.get("bias"), *op_args(block, order))
        torch.library.opcheck(op.forward_op, (*args, op.PLANS[plan], keep))


@pytest.mark.some(6)
@needs_extension
@pytest.mark.parametrize(("plan", "name", "dtype"), OPCHECKED)
def test_opcheck_backward(plan, name, dtype):
    block, tensors = as_2d(BLOCKS[name], normal_tensors(BLOCKS[name], dtype))
    args = op_args(block, ORDERS[1])
    out, codes, _ = op.forward_op(
        tensors["x"], tensors["weight"], tensors.get("bias"), *args, op.PLANS[plan], True
    )
    expanded = torch.ones((), dtype=dtype).expand(out.shape)
    for grad, needs in ((torch.randn_like(out), (True, True, True)), (expanded, (False, True, False))):
        rest = (tensors["x"], tensors["weight"], codes, *args, op.PLANS[plan], *needs)
        torch.library.opcheck(op.backward_op, (grad, *rest))


def test_sizes_are_pytorchs():
    """Every small convolution and pool against PyTorch on the meta device; below 1 where it refuses."""

    def torch_size(fn, *args):
        try:
            return fn(*args).shape[-1]
        except RuntimeError:
            return 0

    for size, kernel, stride, dilation in itertools.product(
        range(1, 10), range(1, 5), range(1, 4), (1, 2, 3)
    ):
        x, weight = torch.empty(1, 1, size, device="meta"), torch.empty(1, 1, kernel, device="meta")
        for padding in range(4):
            _, found = conv_size((1, size), (1, kernel), (1, stride), (0, padding), (1, dilation))
            assert max(found, 0) == torch_size(F.conv1d, x, weight, None, stride, padding, dilation)
        for padding, ceil in itertools.product(range(kernel // 2 + 1), (False, True)):
            pool = (1, kernel, 1, stride, 0, padding, 1, dilation, ceil)
            _, found = pool_size((1, size), pool)
            assert max(found, 0) == torch_size(F.max_pool1d, x, kernel, stride, padding, dilation, ceil), pool


@random_blocks(12)
@pytest.mark.parametrize("keep", [False, True])
def test_fake_kernels_know_the_shapes(block, keep):
    """Without the compiled kernels too: shapes come from PyTorch run on the meta device."""
    from torch._subclasses import FakeTensorMode

    expected = block.out_shape()
    block, tensors = as_2d(block, normal_tensors(block, torch.float32))
    n, c, *size = (expected[0], expected[1], 1, expected[2]) if len(expected) == 3 else expected
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(t) for k, t in tensors.items()}
        for order in ORDERS:
            out, codes, _ = op.forward_op(
                fake["x"], fake["weight"], fake.get("bias"), *op_args(block, order), 1, keep
            )
            assert tuple(out.shape) == tuple((n, c, *size)[axis] for axis in order) and out.is_contiguous()
            assert codes.dtype == torch.uint8 and (codes.numel() > 0) == (
                keep and bool(block.activation or block.pool)
            )
            grads = op.backward_op(
                out, fake["x"], fake["weight"], codes, *op_args(block, order), 1, True, False, True
            )
            assert [tuple(g.shape) for g in grads] == [tuple(fake["x"].shape), (0,), (c,)]


@pytest.mark.some(1)
@plans
def test_no_graph_break(plan, layout="columns_time_major"):
    """fullgraph, forward and backward, and again at another batch size."""

    def fn(x, weight, bias):
        return conv_block(x, weight, bias, padding=1, pool=nn.MaxPool2d(2), layout=layout, plan=plan).relu()

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 5):
        block = Block(n, 5, (9, 14), 18, (3, 3), padding=(1, 1), pool=POOL_2X2)
        tensors, grad = integer_tensors(block, torch.float32)
        ours = evaluate(compiled, tensors, in_layout(grad, layout))
        true = evaluate(lambda **t: torch_block(block, **t), _doubles(tensors), grad.double())  # noqa: B023
        assert torch.equal(ours["out"].double(), in_layout(true["out"], layout))
        assert all(torch.equal(ours[k].double(), true[k]) for k in tensors)


@needs_extension
@pytest.mark.parametrize("plan", FUSED)
@pytest.mark.parametrize("pool", [None, POOL_2X2], ids=["no pool", "pool"])
def test_opcheck_of_a_curved_activation(plan, pool):
    block = replace(BLOCK, activation="tanh", pool=pool)
    tensors = normal_tensors(block, torch.float32)
    for order, keep in ((ORDERS[0], True), (ORDERS[2], False)):
        args = (*tensors.values(), *op_args(block, order), op.PLANS[plan], keep)
        torch.library.opcheck(op.forward_op, args)


# ---------------------------------------------------------------- autograd and torch.func


@small_blocks
def test_gradcheck(block):
    """In float64, on data whose winners no small step changes."""
    tensors, _ = integer_tensors(block, torch.float64)
    tensors = {k: t + 0.3 * torch.rand_like(t) for k, t in tensors.items()}
    leaves = [t.requires_grad_() for t in tensors.values()]

    def fn(*leaves):
        return our_block(block, **dict(zip(tensors, leaves, strict=True)), plan="auto")

    assert torch.autograd.gradcheck(fn, leaves, eps=1e-7, atol=1e-4, fast_mode=True)
    assert torch.autograd.gradgradcheck(fn, leaves, eps=1e-7, atol=1e-4, fast_mode=True)


@plans
@blocks
def test_double_backward(plan, block):
    """A gradient penalty: second derivatives are PyTorch's."""
    tensors, grad = integer_tensors(block, torch.float32)
    assert_double_backward(plan, block, {k: t.sign() for k, t in tensors.items()}, grad.sign())


@plans
@pytest.mark.parametrize("pool", [None, POOL_2X2], ids=["no pool", "pool"])
@pytest.mark.parametrize("activation", [name for name in CURVED if name != "hardsigmoid"])
def test_double_backward_of_curved_activations(plan, activation, pool):
    """Hardsigmoid has none in PyTorch."""
    block = replace(BLOCK, activation=activation, pool=pool)
    tensors = normal_tensors(block, torch.float32)
    assert_double_backward(plan, block, tensors, torch.randn(block.out_shape()) * decided(block, tensors))


def assert_double_backward(plan, block, tensors, grad):
    def penalty(fn, dtype):
        leaves = {k: t.to(dtype).requires_grad_() for k, t in tensors.items()}
        g = grad.to(dtype).requires_grad_()
        first = torch.autograd.grad(fn(block, **leaves), list(leaves.values()), g, create_graph=True)
        total = sum((f * f).sum() for f in first)
        return torch.autograd.grad(total, [leaves["x"], leaves["weight"], g])

    ours = penalty(lambda *a, **k: our_block(*a, **k, plan=plan), torch.float32)
    theirs, true = penalty(torch_block, torch.float32), penalty(torch_block, torch.float64)
    for name, mine, their, truth in zip(("x", "weight", "grad"), ours, theirs, true, strict=True):
        assert_close_as_torch(mine, their, truth, name)


@plans
@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.Hardtanh(-0.5, 0.5)], ids=str)
@pytest.mark.parametrize("pool", [None, nn.MaxPool2d(2)], ids=str)
def test_second_derivatives_of_zero_are_there_where_pytorchs_are(plan, activation, pool):
    """Hooks are called with them, and optimizers take a gradient of zero otherwise than none."""
    conv = nn.Conv2d(3, 5, 3)
    x, found = torch.randn(2, 3, 8, 9), []
    for fused in (False, True):
        leaf = x.clone().requires_grad_()
        if fused:
            out = cf.functional.conv_block(
                leaf, conv.weight, conv.bias, activation=activation, pool=pool, plan=plan
            )
        else:
            out = nn.Sequential(conv, *(m for m in (activation, pool) if m is not None))(leaf)
        (first,) = torch.autograd.grad((out * 2).sum(), leaf, create_graph=True)
        operands = (leaf, conv.weight, conv.bias)
        found.append(torch.autograd.grad(first.sum(), operands, allow_unused=True))
    for own, ours in zip(*found, strict=True):
        assert (own is None) == (ours is None)
        if own is not None:
            torch.testing.assert_close(ours, own)


@plans
@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_double_backward_with_a_frozen_argument(plan, frozen):
    tensors, grad = integer_tensors(BLOCK, torch.float32)
    results = []
    for fn in (lambda *a, **k: our_block(*a, **k, plan=plan), torch_block):
        leaves = {k: t.clone().requires_grad_(k != frozen) for k, t in tensors.items()}
        wanted = [t for t in leaves.values() if t.requires_grad]
        g = grad.clone().requires_grad_()
        first = torch.autograd.grad(fn(BLOCK, **leaves), wanted, g, create_graph=True)
        results.append((*first, *torch.autograd.grad(sum(f.sum() for f in first), g)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@plans
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients(plan):
    """Many gradients through one graph, as a vectorized Jacobian sends them."""
    tensors, grad = integer_tensors(BLOCK, torch.float32)
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    batch = torch.stack([grad, -grad, grad.flip(0)])
    results = [
        torch.autograd.grad(fn(BLOCK, **leaves), list(leaves.values()), batch, is_grads_batched=True)
        for fn in (lambda *a, **k: our_block(*a, **k, plan=plan), torch_block)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@plans
def test_saved_tensor_hooks_and_checkpoint(plan):
    from torch.utils.checkpoint import checkpoint

    tensors, grad = integer_tensors(BLOCK, torch.float32)
    plain = evaluate(lambda **t: our_block(BLOCK, **t, plan=plan), tensors, grad)
    with torch.autograd.graph.save_on_cpu():
        saved = evaluate(lambda **t: our_block(BLOCK, **t, plan=plan), tensors, grad)
    again = evaluate(
        lambda **t: checkpoint(lambda *a: our_block(BLOCK, *a, plan=plan), *t.values(), use_reentrant=False),
        tensors, grad,
    )  # fmt: skip
    for k in plain:
        assert torch.equal(plain[k], saved[k]) and torch.equal(plain[k], again[k])


@pytest.mark.parametrize("plan", ["auto", "reference"])
def test_torch_func(plan):
    """grad, vmap over samples and over an ensemble of parameters, jvp, per-sample gradients.

    The block is one that the direct plan takes where no transform is active.
    """
    from torch import func

    tensors, grad = integer_tensors(BLOCK, torch.float32)
    x, weight, bias = tensors.values()

    def ours(x, weight, bias):
        return our_block(BLOCK, x, weight, bias, plan=plan)

    def theirs(x, weight, bias):
        return torch_block(BLOCK, x, weight, bias)

    def transforms(fn):
        def loss(weight, sample):
            return (fn(sample[None], weight, bias) * grad[:1]).sum()

        yield "grad", func.grad(lambda w: (fn(x, w, bias) * grad).sum())(weight)
        yield "vmap", func.vmap(lambda s: fn(s[None], weight, bias)[0])(x)
        ensemble = torch.stack([weight, -weight])
        yield "ensemble", func.vmap(fn, (None, 0, None))(x, ensemble, bias)
        yield "per sample", func.vmap(func.grad(loss), (None, 0))(weight, x)
        yield "jvp", func.jvp(lambda s: fn(s, weight, bias), (x,), (x.flip(0),))[1]
        yield "hessian-vector", func.grad(lambda w: func.grad(loss)(w, x[0]).pow(2).sum())(weight)

    for (name, mine), (_, expected) in zip(transforms(ours), transforms(theirs), strict=True):
        assert torch.equal(mine, expected), name


@pytest.mark.parametrize("plan", ["auto", "reference"])
def test_forward_mode(plan):
    """Dual numbers carry their tangents through, with and without parameters that need gradients."""
    import torch.autograd.forward_ad as fwAD

    tensors, _ = integer_tensors(BLOCK, torch.float32)
    tangents = {k: t.flip(0) for k, t in tensors.items()}
    for needs_grad in (False, True):
        for dual in ("x", "weight", "bias"):
            found = []
            for fn in (lambda *a, **k: our_block(*a, **k, plan=plan), torch_block):
                with fwAD.dual_level():
                    arguments = {k: t.clone().requires_grad_(needs_grad) for k, t in tensors.items()}
                    arguments[dual] = fwAD.make_dual(arguments[dual], tangents[dual])
                    found.append(fwAD.unpack_dual(fn(BLOCK, **arguments)).tangent)
            assert found[0] is not None, f"the tangent of {dual} got lost (parameters trained: {needs_grad})"
            assert torch.equal(*found)


def test_functional_call():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(5, 18, 3, padding=1)

        def forward(self, x):
            return conv_block(x, self.conv.weight, self.conv.bias, padding=1, pool=nn.MaxPool2d(2))

    tensors, _ = integer_tensors(BLOCK, torch.float32)
    net = Net()
    parameters = {"conv.weight": tensors["weight"], "conv.bias": tensors["bias"]}
    out = torch.func.functional_call(net, parameters, (tensors["x"],))
    assert torch.equal(out, torch_block(BLOCK, **tensors))


# ---------------------------------------------------------------- modes and devices


@plans
@blocks
def test_autocast(plan, block):
    """bfloat16 where autocast gives eager bfloat16, by the rule; gradients in the parameters' dtype."""
    tensors = normal_tensors(block, torch.float32)
    grad = torch.randn(block.out_shape()).bfloat16()
    rounded = {k: t.bfloat16() for k, t in tensors.items()}

    def under_autocast(fn):
        def run(**t):
            with torch.autocast("cpu", torch.bfloat16):
                return fn(block, **t)

        return evaluate(run, tensors, grad)

    ours = under_autocast(lambda *a, **k: our_block(*a, **k, plan=plan))
    theirs = under_autocast(torch_block)
    ways, true = torch_ways(block, rounded, grad)
    for name, mine in ours.items():
        assert mine.dtype == theirs[name].dtype == (torch.bfloat16 if name == "out" else torch.float32)
    assert_close_as_torch(
        ours["out"], [theirs["out"], *(way["out"] for way in ways)], true["out"], f"{block}, {plan}"
    )


@plans
def test_autocast_takes_mixed_dtypes(plan):
    """Parameters in float32, input in bfloat16 from the layer before; float64 is left alone."""
    tensors = normal_tensors(BLOCK, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = our_block(BLOCK, **tensors | {"x": tensors["x"].bfloat16()}, plan=plan)
        expected = torch_block(BLOCK, **tensors | {"x": tensors["x"].bfloat16()})
        assert mixed.dtype == expected.dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert our_block(BLOCK, **tensors, plan=plan).dtype == torch.float32
    torch.testing.assert_close(mixed, expected)


def test_autocast_leaves_float64_alone():
    tensors = normal_tensors(BLOCK, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = our_block(BLOCK, **tensors, plan="auto"), torch_block(BLOCK, **tensors)
    assert ours.dtype == theirs.dtype == torch.float64 and torch.equal(ours, theirs)


@blocks
def test_meta_device(block):
    """Devices without kernels run the reference."""
    tensors = {k: t.to("meta") for k, t in normal_tensors(block, torch.float32).items()}
    out = our_block(block, **tensors, plan="auto")
    assert out.is_meta and tuple(out.shape) == block.out_shape()


@plans
def test_a_default_device_changes_nothing(plan):
    """`with torch.device(...)` is a mode, not a Tensor subclass."""
    tensors, _ = integer_tensors(BLOCK, torch.float32)
    with torch.device("cpu"):
        out = our_block(BLOCK, **tensors, plan=plan)
    assert torch.equal(out, torch_block(BLOCK, **tensors))


def test_tensor_subclasses_keep_their_class():
    class Named(torch.Tensor):
        pass

    tensors, _ = integer_tensors(BLOCK, torch.float32)
    for which in tensors:
        wrapped = tensors | {which: tensors[which].as_subclass(Named)}
        out, expected = our_block(BLOCK, **wrapped, plan="auto"), torch_block(BLOCK, **wrapped)
        assert type(out) is type(expected) is Named, which
        assert torch.equal(out.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


@plans
@pytest.mark.parametrize("which", ["x", "weight", "bias"])
def test_lazily_negated_arguments(plan, which):
    """The imaginary part of a conjugate is a view that says "minus"."""
    tensors, _ = integer_tensors(BLOCK, torch.float32)
    pair = torch.complex(torch.zeros_like(tensors[which]), -tensors[which]).conj()
    lazy = pair.imag
    assert lazy.is_neg() and torch.equal(lazy, tensors[which])
    if which == "x" and plan in op.PLANS:
        with pytest.raises(ValueError, match="strided"):
            our_block(BLOCK, **tensors | {which: lazy}, plan=plan)
    else:
        assert torch.equal(
            our_block(BLOCK, **tensors | {which: lazy}, plan=plan), torch_block(BLOCK, **tensors)
        )


@plans
def test_lazily_negated_gradient(plan):
    tensors, grad = integer_tensors(BLOCK, torch.float32)
    lazy = torch.complex(torch.zeros_like(grad), -grad).conj().imag
    ours = evaluate(lambda **t: our_block(BLOCK, **t, plan=plan), tensors, lazy)
    true = evaluate(lambda **t: torch_block(BLOCK, **t), _doubles(tensors), grad.double())
    assert all(torch.equal(ours[k].double(), true[k]) for k in ours)


@plans
def test_threads_of_python(plan):
    """Calls from several threads at once do not meet in any scratch memory."""
    from concurrent.futures import ThreadPoolExecutor

    cases = [integer_tensors(BLOCK, torch.float32) for _ in range(8)]

    def run(case):
        return evaluate(lambda **t: our_block(BLOCK, **t, plan=plan), *case)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, cases * 4))
    for (tensors, grad), ours in zip(cases * 4, results, strict=True):
        true = evaluate(lambda **t: torch_block(BLOCK, **t), _doubles(tensors), grad.double())
        assert all(torch.equal(ours[k].double(), true[k]) for k in ours)


def test_without_the_compiled_kernels():
    """The package imports, runs and says what is missing."""
    code = """
import torch, cnnlstm_fast as cf
x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
assert torch.equal(cf.functional.conv_block(x, w), torch.relu(torch.nn.functional.conv2d(x, w)))
try:
    cf.functional.conv_block(x, w, plan="direct")
except ValueError as e:
    print(e)
"""
    ran = run_forked(code, CNNLSTM_FAST_NO_EXTENSION="1")
    assert ran.returncode == 0, ran.stderr
    assert "compiled kernels are missing" in ran.stdout and "CNNLSTM_FAST_NO_EXTENSION" in ran.stdout


# ---------------------------------------------------------------- calls that no plan would make


@needs_extension
@pytest.mark.parametrize("plan", (1, 2))
def test_a_curved_activation_without_a_pool_has_no_codes(plan):
    """The backward op then takes a gradient that has met the slopes, whatever activation it is told."""
    x, weight = torch.randn(5, 32, 17, 40), torch.randn(96, 1, 2, 21)
    conv, grad = [5, 3, 0, 1, 3, 1, 32], torch.randn(3, 5, 96, 8)
    codes, order, needs = torch.empty(0, dtype=torch.uint8), [2, 0, 1, 3], (True, True, False)
    plain = op.backward_op(grad, x, weight, codes, conv, 0, [], [], order, plan, *needs)
    for activation, numbers in [(3, [0.1]), (4, [0.7]), *((a, []) for a in range(5, 10))]:
        found = op.backward_op(grad, x, weight, codes, conv, activation, numbers, [], order, plan, *needs)
        assert all(map(torch.equal, found, plain))
        alone = op.backward_op(
            grad, x, weight, codes, conv, activation, numbers, [], order, plan, True, False, False
        )
        assert torch.equal(alone[0], plain[0])
