"""The Triton kernels of the block op with a batch norm: in the interpreter, and compiled on a CUDA device."""

from __future__ import annotations

import copy
import itertools
import math
import random
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ACTIVATIONS,
    STRIDED,
    Block,
    activate,
    as_2d,
    assert_close_as_torch,
    evaluate,
    integer_tensors,
    normal_tensors,
    strided,
    torch_block,
    winners,
)
from interpreted import interpreter_and_cuda, no_launch
from norms import assert_normed, ours, random_norm, run
from test_conv_norm import BLOCKS
from torch import Tensor
from triton_blocks import (
    ORDERS,
    PLANS,
    SPECIAL_BLOCKS,
    TUTORIAL,
    _decode,
    _on,
    _op_args,
    _small_blocks,
    _window,
    _without_cudnn,
    compiled,
    plans,
)
from triton_norms import BACKWARD_OP, FORWARD_OP, SMALL, _forward, _map_size, modes, norm_kernels

from cnnlstm_fast.ops import conv_norm as op

# In the interpreter a case takes a tenth of a second or more.
pytestmark = [pytest.mark.usefixtures("float32_means_float32"), pytest.mark.some(10), pytest.mark.share(3)]


@interpreter_and_cuda
def kernels(request):
    yield from norm_kernels(request.param)


# ---------------------------------------------------------------- wrong calls


def _arguments(device: str, way: str) -> dict:
    """What a host function takes for a block of 20 channels under statistics of its batch, by name."""
    block = Block(2, 3, (5, 6), 20, (3, 3), padding=(1, 1), pool=BLOCKS["2x2"].pool)
    tensors = {name: torch.zeros(shape) for name, shape in block.shapes().items()}
    of_norm = dict.fromkeys(("gamma", "beta", "mean", "var"), torch.zeros(20)) | {"eps": 1e-5}
    conv = dict(zip(("conv", "activation", "act", "pool"), _op_args(block), strict=True))
    conv |= {"order": [0, 1, 2, 3], "plan": 1}
    if way == "fold":
        args = {"weight": tensors["weight"], "bias": tensors["bias"], **of_norm}
    elif way == "forward":
        args = {**tensors, **of_norm, "mean": None, "var": None, **conv, "keep": True, "keep_map": False}
    else:
        del tensors["bias"]
        kept = torch.zeros(2, 20, 2, 3)
        codes = torch.zeros(2, 2, 3, 2, 8, dtype=torch.uint8)
        stats = torch.zeros(4, 20, dtype=torch.float64)
        args = {"grad": kept, **tensors, "stats": stats, "codes": codes, "kept": kept, "map": torch.zeros(0)}
        args |= {"eps": 1e-5, **conv, "given": False, "need_x": True, "need_weight": True}
    return {name: _there(value, device) for name, value in args.items()}


def _there(value, device: str):
    return value.to(device) if isinstance(value, Tensor) and not value.is_meta else value


WRONG_CALLS = {
    "fold": {
        "a 3-d weight": (dict(weight=torch.zeros(20, 3, 3)), "expected a 4-d weight"),
        "no channels": (dict(weight=torch.zeros(0, 3, 3, 3)), "expected a 4-d weight of some channels"),
        "float64": (dict(weight=torch.zeros(20, 3, 3, 3).double()), "got torch.float64, .*float16 only"),
        "a short mean": (dict(mean=torch.zeros(19)), r"mean does not fit .*expected \(20,\)"),
        "a variance of float64": (dict(var=torch.zeros(20).double()), "var must be .*got torch.float64"),
        "a bias elsewhere": (dict(bias=torch.zeros(20, device="meta")), "bias must be .* on meta"),
    },
    "forward": {
        "a 3-d input": (dict(x=torch.zeros(3, 5, 6)), "expected a 4-d input and weight, got 3-d"),
        "a plan of the CPU": (dict(plan=3), "unknown plan 3"),
        "a mean alone": (dict(mean=torch.zeros(20)), "a mean and a variance, or neither"),
        "one value": (
            dict(x=torch.zeros(1, 3, 1, 1), pool=[]),
            "more than 1 value per channel, got 1",
        ),
        "an empty batch": (dict(x=torch.zeros(0, 3, 5, 6)), "more than 1 value per channel, got 0"),
        "a flat gamma": (dict(gamma=torch.zeros(20, 1)), r"gamma does not fit .*got shape \(20, 1\)"),
        "a beta of whole numbers": (dict(beta=torch.zeros(20).long()), "beta must be .*got torch.int64"),
        "a long bias": (dict(bias=torch.zeros(21)), r"bias does not fit .*expected \(20,\)"),
    },
    "backward": {
        "an order with an axis twice": (dict(order=[0, 1, 1, 3]), "order must be a permutation"),
        "a gradient of another size": (dict(grad=torch.zeros(2, 20, 3, 3)), "the gradient does not fit"),
        "a gradient of another dtype": (dict(grad=torch.zeros(2, 20, 2, 3).half()), "differ in dtype"),
        "nothing kept": (dict(kept=torch.zeros(0)), "kept does not fit"),
        "kept with gaps": (dict(kept=torch.zeros(2, 20, 2, 6)[..., ::2]), "kept must be contiguous"),
        "no codes": (dict(codes=torch.zeros(0, dtype=torch.uint8)), "codes does not fit"),
        "codes of floats": (dict(codes=torch.zeros(2, 2, 3, 2, 8)), "codes must be contiguous torch.uint8"),
        "a map of another size": (dict(map=torch.zeros(2, 5, 5, 20)), "the map does not fit"),
        "no pool and no map": (dict(pool=[], grad=torch.zeros(2, 20, 5, 6)), "the map does not fit"),
        "statistics of float32": (dict(stats=torch.zeros(4, 20)), "stats must be contiguous torch.float64"),
        "two statistics": (dict(stats=torch.zeros(2, 20).double()), "stats does not fit"),
    },
}


@pytest.mark.parametrize(
    ("way", "wrong"),
    [
        pytest.param(way, wrong, id=f"{way}: {name}")
        for way, calls in WRONG_CALLS.items()
        for name, wrong in calls.items()
    ],
)
def test_wrong_calls_start_no_kernel(kernels, way, wrong):
    changes, message = wrong
    changes = {name: _there(value, kernels.device) for name, value in changes.items()}
    with pytest.raises(RuntimeError, match=message):
        getattr(kernels.module, way)(**_arguments(kernels.device, way) | changes, run=no_launch)


# ---------------------------------------------------------------- numbers


@plans
@modes
@_small_blocks(10)
def test_random_blocks(kernels, block, plan, training):
    if block.c_out < 4 * block.groups:  # the gradient of one channel is one sum, whose error is luck
        block = replace(block, c_out=4 * block.c_out)
    block = replace(block, n=max(block.n, -(-8 // math.prod(_map_size(block)))))
    norm = random_norm(block, training, affine=random.random() < 0.8, eps=random.choice((1e-5, 1e-3, 0.1)))
    kernels.assert_normed(block, normal_tensors(block, torch.float32), norm, plan=plan)


@pytest.mark.some(20)
@plans
@modes
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_the_field(kernels, name, plan, training):
    block = BLOCKS[name]
    if kernels.device == "cpu":
        block = replace(block, n=2, size=tuple([(s + 1) // 2 for s in block.size]))
    tensors = normal_tensors(block, torch.float32)
    kernels.assert_normed(block, tensors, random_norm(block, training), plan=plan)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@plans
@modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", [None, SMALL.pool], ids=["no pool", "pool"])
def test_every_dtype(kernels, pool, dtype, plan, training):
    # gradients of the float32 norm over few channels are a matter of luck
    block = replace(SMALL, pool=pool, c_out=82)
    kernels.assert_normed(block, normal_tensors(block, dtype), random_norm(block, training), plan=plan)


@plans
@modes
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "relu"], ids=str)
def test_activations(kernels, activation, plan, training):
    block = replace(SMALL, activation=activation, pool=random.choice([SMALL.pool, None]))
    kernels.assert_normed(
        block, normal_tensors(block, torch.float32), random_norm(block, training), plan=plan
    )


@plans
@modes
@pytest.mark.parametrize("how", STRIDED)
def test_strided_inputs(kernels, how, plan, training):
    tensors = normal_tensors(SMALL, torch.float32)
    tensors["x"] = strided(tensors["x"], how)
    tensors["weight"] = strided(tensors["weight"], random.choice(["transposed", "channels_last"]))
    kernels.assert_normed(SMALL, tensors, random_norm(SMALL, training), plan=plan)


@plans
@modes
@pytest.mark.parametrize("order", ORDERS[1::3], ids=lambda order: "".join("NCHW"[axis] for axis in order))
def test_memory_orders(kernels, order, plan, training):
    block = replace(SMALL, pool=random.choice([SMALL.pool, None]))
    tensors = normal_tensors(block, torch.float32)
    kernels.assert_normed(block, tensors, random_norm(block, training), plan=plan, order=order)


@plans
@modes
@pytest.mark.parametrize("needs", [(), ("x",), ("weight",), ("bias",), ("x", "weight")], ids="+".join)
def test_only_the_gradients_asked_for(kernels, needs, plan, training):
    norm = random_norm(SMALL, training).requires_grad_(not needs or random.random() < 0.5)
    tensors = normal_tensors(SMALL, torch.float32)
    found = kernels.assert_normed(SMALL, tensors, norm, plan=plan, needs=needs)
    trained = {"norm.weight", "norm.bias"} if norm.weight.requires_grad else set()
    assert {name for name in found if name in (*needs, "norm.weight", "norm.bias")} == {*needs, *trained}


@plans
@modes
@pytest.mark.parametrize("gone", ["weight", "bias"])
def test_an_affine_norm_with_half_its_parameters(kernels, gone, plan, training):
    norm = random_norm(SMALL, training)
    setattr(norm, gone, None)
    tensors = normal_tensors(SMALL, torch.float32)
    ours = kernels.block()
    found = run(lambda *a: ours(SMALL, *a, plan=plan), tensors, norm, torch.ones(SMALL.out_shape()))
    bare = replace(SMALL, activation=None, pool=None)
    expected = run(
        lambda *a: SMALL.pool_module()(F.relu(a[3](torch_block(bare, *a[:3])))),
        tensors, norm, torch.ones(SMALL.out_shape()),
    )  # fmt: skip
    assert found.keys() == expected.keys()
    for name, mine in found.items():
        torch.testing.assert_close(mine, expected[name], rtol=1e-4, atol=2e-4)


@plans
def test_zeros_after_the_last_row_and_column(kernels, plan):
    """As padding="same" wants for an even kernel, against a whole input that holds these zeros."""
    block = replace(SMALL, kernel=(2, 4), padding=(0, 1))
    x, weight, bias = normal_tensors(block, torch.float32).values()
    whole = F.pad(x, (0, 1, 0, 1))
    conv, *rest = _op_args(block)
    eps, rest = 1e-5, (*rest, [0, 1, 2, 3], PLANS[plan])
    results = []
    for given, at in ((x, [*conv, 1, 1]), (whole, conv)):
        given, w, b = (t.to(kernels.device) for t in (given, weight, bias))
        out, *kept, stats = kernels.module.forward(
            given, w, b, b, None, None, None, eps, at, *rest, True, False
        )
        grads = kernels.module.backward(
            torch.ones_like(out), given, w, stats, *kept, eps, at, *rest, False, True, True
        )
        results.append([out, stats, *kept, grads[0][:, :, :6, :7], *grads[1:]])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


@plans
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None], ids=str)
def test_running_statistics(kernels, momentum, plan):
    theirs = random_norm(SMALL, True, momentum=momentum)
    mine, true = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    bare = replace(SMALL, activation=None, pool=None)
    for _ in range(2):
        tensors = normal_tensors(SMALL, torch.float32)
        kernels.block()(SMALL, *tensors.values(), mine, plan=plan)
        theirs(torch_block(bare, **tensors))
        true(torch_block(bare, **{name: t.double() for name, t in tensors.items()}))
    assert mine.num_batches_tracked == 2
    for name in ("running_mean", "running_var"):
        assert_close_as_torch(getattr(mine, name), getattr(theirs, name), getattr(true, name), name)


# ---------------------------------------------------------------- whole numbers


@_without_cudnn()
def _assert_exact(kernels, block, tensors, grad, *, plan, order=(0, 1, 2, 3)):
    """Under given statistics whose scale is 1 or -1: everything equal to float64's, the argmax too."""
    block, tensors = as_2d(block, tensors)
    grad = grad if grad.dim() == 4 else grad.unsqueeze(2)
    tensors.pop("bias", None)
    mean = torch.randint(-3, 4, (block.c_out,)).float()
    gamma = torch.randint(0, 2, (block.c_out,)).float() * 2 - 1
    bare = replace(block, activation=None, pool=None)

    def normed(x, weight):
        z = torch_block(bare, x, weight)
        return z, F.batch_norm(
            z, mean.to(z.dtype), torch.ones_like(mean).to(z.dtype), gamma.to(z.dtype), eps=0
        )

    x, weight = (tensors[name].double().requires_grad_() for name in ("x", "weight"))
    z, u = normed(x, weight)
    out = activate(block, u)
    out = block.pool_module()(out) if block.pool else out
    dx, dweight, dz = torch.autograd.grad(out, [x, weight, z], grad.double())
    there = _on(kernels.device, tensors | {"grad": grad})
    args = (*_op_args(block), list(order), PLANS[plan])
    parameters = [t.to(kernels.device) for t in (gamma, mean)]
    found, codes, kept, kept_map, stats = kernels.module.forward(
        there["x"], there["weight"], None, parameters[0], None, parameters[1],
        torch.ones_like(parameters[1]), 0.0, *args, True, False,
    )  # fmt: skip
    grads = kernels.module.backward(
        there["grad"].permute(order), there["x"], there["weight"], stats, codes, kept, kept_map, 0.0, *args,
        True, True, True,
    )  # fmt: skip

    def same(mine, true, what):
        assert torch.equal(mine.cpu().double(), true), f"{what} of {block}, {order}"

    back = [order.index(axis) for axis in range(4)]
    same(found.permute(back), out.detach(), "out")
    if block.pool:
        argmax = winners(block, u.detach())
        assert torch.equal(_decode(codes, _window(block), block.c_out), argmax.int())
    else:
        same(kept_map.permute(0, 3, 1, 2), z.detach(), "the map")
    same(grads[0], dx, "x")
    same(grads[1], dweight, "weight")
    same(grads[2][1], (dz * gamma.double()[:, None, None]).sum((0, 2, 3)), "the norm's bias")
    with_z = (dz * gamma.double()[:, None, None] * (z.detach() - mean.double()[:, None, None])).sum((0, 2, 3))
    same(grads[2][0], with_z, "the norm's weight")


@pytest.mark.some(13)
@plans
@pytest.mark.parametrize("name", SPECIAL_BLOCKS)
def test_special_blocks_are_exact(kernels, name, plan):
    block = SPECIAL_BLOCKS[name]
    tensors, grad = integer_tensors(block, torch.float32)
    _assert_exact(kernels, block, tensors, grad, plan=plan, order=random.choice(ORDERS))


@plans
@pytest.mark.parametrize("how", STRIDED)
def test_strides_are_exact(kernels, how, plan):
    tensors, grad = integer_tensors(TUTORIAL, torch.float32)
    tensors["x"], grad = strided(tensors["x"], how), strided(grad, how)
    _assert_exact(kernels, TUTORIAL, tensors, grad, plan=plan, order=random.choice(ORDERS))


@plans
@modes
@pytest.mark.parametrize("pool", [None, SMALL.pool], ids=["no pool", "pool"])
def test_nan_and_infinities_in_the_gradient(kernels, pool, plan, training):
    """They pass where the activation does, and reach what PyTorch's reach."""
    block = replace(SMALL, pool=pool)
    tensors, norm = normal_tensors(block, torch.float32), random_norm(block, training)
    ours, bare = kernels.block(), replace(block, activation=None, pool=None)
    grad = torch.randn(block.out_shape())
    for value in (math.nan, math.inf):
        grad.view(-1)[random.randrange(grad.numel())] = value

    def theirs(x, weight, bias, norm):
        y = F.relu(norm(torch_block(bare, x, weight, bias)))
        return y if pool is None else block.pool_module()(y)

    found = run(lambda *a: ours(block, *a, plan=plan), tensors, norm, grad)
    expected = run(theirs, tensors, norm, grad)
    true = run(
        theirs, {k: t.double() for k, t in tensors.items()}, copy.deepcopy(norm).double(), grad.double()
    )
    for name in ("x", "weight", "norm.weight", "norm.bias"):
        assert_close_as_torch(found[name], expected[name], true[name], name)


# ---------------------------------------------------------------- what is asked for, bits


@plans
@modes
@pytest.mark.parametrize("pool", [None, SMALL.pool], ids=["no pool", "pool"])
def test_what_is_kept_changes_nothing(kernels, pool, plan, training):
    block = replace(SMALL, pool=pool)
    tensors = normal_tensors(block, torch.float32)
    found = [
        _forward(kernels, block, tensors, plan=plan, given=not training, keep=keep, keep_map=keep_map)
        for keep, keep_map in ((False, False), (True, False), (True, True))
    ]
    (*_, nothing), (_, _, _, kept), (x, weight, args, with_map) = found
    for mine in (kept, with_map):
        torch.testing.assert_close(mine[0], nothing[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine[4], nothing[4], rtol=1e-6, atol=1e-6)
    assert all(t.numel() == 0 for t in nothing[1:4])
    z = torch_block(replace(block, activation=None, pool=None), tensors["x"], tensors["weight"])
    assert (with_map[3].numel() > 0) == (pool is None or training)
    if with_map[3].numel():
        torch.testing.assert_close(with_map[3].cpu().permute(0, 3, 1, 2), z, rtol=1e-5, atol=1e-5)
    grad = torch.randn(with_map[0].shape).to(kernels.device)
    grads = [
        kernels.module.backward(grad, x, weight, r[4], *r[1:4], *args, not training, True, True)
        for r in (kept, with_map)
    ]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@plans
@modes
@pytest.mark.parametrize("pool", [None, SMALL.pool], ids=["no pool", "pool"])
@pytest.mark.parametrize("keep", [False, True], ids=["inference", "keep"])
@pytest.mark.parametrize("n", [0, 3])
def test_results_are_as_the_fake_kernels_say(kernels, n, keep, pool, plan, training):
    """Shapes, dtypes and memory order, an empty batch's too."""
    if n == 0 and training:
        return
    from torch._subclasses import FakeTensorMode

    block = replace(SMALL, n=n, pool=pool)
    tensors = normal_tensors(block, torch.bfloat16)
    tensors["x"] = strided(tensors["x"], "channels_last")
    keep_map = random.random() < 0.5
    x, weight, args, found = _forward(
        kernels, block, tensors, plan=plan, given=not training, keep=keep, keep_map=keep_map
    )

    def form(t):
        return t.shape, t.dtype, t.stride() if t.numel() else None

    gpu_args = (1e-5, *args[1:])
    with FakeTensorMode():
        fake_x, fake_weight = (
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in (x, weight)
        )
        channel = torch.empty(block.c_out, dtype=x.dtype, device="cuda")
        statistics = (None, None) if training else (channel, channel)
        fakes = torch.ops.cnnlstm_fast.conv_norm_block.default(
            fake_x, fake_weight, channel, channel, channel, *statistics, *gpu_args, keep, keep_map
        )
        assert [form(t) for t in found] == [form(t) for t in fakes]
        if not keep:
            return
        needs = random.choice([(True, True), (True, False), (False, True), (False, False)])
        fake_grads = torch.ops.cnnlstm_fast.conv_norm_block_backward.default(
            fakes[0], fake_x, fake_weight, fakes[4], *fakes[1:4], *gpu_args, not training, *needs
        )
    grads = kernels.module.backward(found[0], x, weight, found[4], *found[1:4], *args, not training, *needs)
    assert [form(t) for t in grads] == [form(t) for t in fake_grads]
    assert n or all(not t.any() for t in grads)


@plans
def test_one_value_per_channel(kernels, plan):
    block = Block(1, 2, (1, 1), 4, (1, 1))
    with pytest.raises(RuntimeError, match="more than 1 value per channel"):
        _forward(kernels, block, normal_tensors(block, torch.float32), plan=plan)


@plans
@modes
def test_64_bit_offsets_change_nothing(kernels, constants_of_the_kernels, plan, training):
    block = replace(SMALL, activation=random.choice(["relu", "silu"]))
    tensors = normal_tensors(block, torch.float32)
    grad = torch.randn(3, 3, 3, 18).to(kernels.device)
    results = []
    for reach in (2**31 - 2**20, 0):
        constants_of_the_kernels("NARROW_REACH", reach)
        x, weight, args, found = _forward(kernels, block, tensors, plan=plan, given=not training)
        grads = kernels.module.backward(
            grad, x, weight, found[4], *found[1:4], *args, not training, True, True
        )
        results.append([*found, *grads])
    assert all(map(torch.equal, *results))


@plans
@modes
@pytest.mark.parametrize("keep_map", [False, True], ids=["no map", "map kept"])
def test_runs_twice_to_the_same_bits(kernels, keep_map, plan, training):
    tensors = normal_tensors(SMALL, torch.float32)
    grad = torch.randn(3, 3, 3, 18).to(kernels.device)
    results = []
    for _ in range(2):
        x, weight, args, found = _forward(
            kernels, SMALL, tensors, plan=plan, given=not training, keep_map=keep_map
        )
        grads = kernels.module.backward(
            grad, x, weight, found[4], *found[1:4], *args, not training, True, True
        )
        results.append([*found, *grads])
    assert all(map(torch.equal, *results))


# ---------------------------------------------------------------- the fold


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "has", [*list(itertools.product([False, True], repeat=3))[::2], (True,) * 3], ids=str
)
def test_folding(kernels, has, dtype):
    """Weight and bias to one rounding of float64's."""
    weight = strided(torch.randn(33, 5, 3, 7), random.choice(["transposed", "channels_last", "offset"])).to(
        dtype
    )
    bias, gamma, beta = (torch.randn(33).to(dtype) if h else None for h in has)
    mean, var = torch.randn(33), torch.rand(33) + 0.2
    given = [None if t is None else t.to(kernels.device) for t in (weight, bias, gamma, beta, mean, var)]
    found = [t.cpu() for t in kernels.module.fold(*given, 1e-3)]
    zero, one = torch.zeros(33), torch.ones(33)
    b, g, s = (
        (other if t is None else t).double() for t, other in ((bias, zero), (gamma, one), (beta, zero))
    )
    scale = g / (var.double() + 1e-3).sqrt()
    expected = weight.double() * scale[:, None, None, None], s + (b - mean.double()) * scale
    for mine, true in zip(found, expected, strict=True):
        assert mine.dtype == dtype and mine.is_contiguous()
        assert ((mine.double() - true).abs() <= 0.51 * torch.finfo(dtype).eps * true.abs() + 1e-7).all()


# ---------------------------------------------------------------- tracing


def _args_of_tracing(given: bool, plan: str):
    args = (1e-5, *_op_args(SMALL), [0, 2, 3, 1], PLANS[plan])

    def step(x, weight, bias, gamma, beta, mean, var, grad):
        statistics = (mean, var) if given else (None, None)
        out, *kept, stats = torch.ops.cnnlstm_fast.conv_norm_block.default(
            x, weight, bias, gamma, beta, *statistics, *args, True, False
        )
        grads = torch.ops.cnnlstm_fast.conv_norm_block_backward.default(
            grad, x, weight, stats, *kept, *args, given, True, True
        )
        folded = torch.ops.cnnlstm_fast.fold_norm.default(weight, bias, gamma, beta, mean, var, 1e-5)
        return out, stats, *grads, *folded

    return step


@plans
@modes
def test_tracing_shows_the_kernels(plan, training):
    """Under AOTAutograd the ops on CUDA tensors become their kernels, so that inductor can see them."""
    from functorch.compile import aot_function
    from torch._subclasses import FakeTensorMode

    class Captured(Exception):
        pass

    def capture(graph, inputs):
        raise Captured([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])

    with FakeTensorMode(), pytest.raises(Captured) as captured:
        channel = torch.empty(18, device="cuda")
        inputs = [torch.empty(shape, device="cuda") for shape in SMALL.shapes().values()]
        inputs += [channel, channel, channel, channel, torch.empty(3, 3, 3, 18, device="cuda")]
        aot_function(_args_of_tracing(not training, plan), fw_compiler=capture)(*inputs)
    targets = captured.value.args[0]
    assert not [target for target in targets if "cnnlstm_fast" in target]
    # statistics, forward and its sums, the map's gradient or the block's own two, and the fold
    launches = 7 if training else {"direct": 7, "chunked": 6}[plan]
    assert targets.count("triton_kernel_wrapper_functional") == launches
    assert targets.count("aten.convolution.default") == (plan == "chunked") * (1 + training)
    assert targets.count("aten.convolution_backward.default") == (training or plan == "chunked")


# ---------------------------------------------------------------- on a device


@compiled
@plans
@modes
@pytest.mark.parametrize("name", BLOCKS)
def test_the_public_function(kernels, name, plan, training):
    block = BLOCKS[name]

    def call(block, x, weight, bias, norm, *, plan, layout):
        there = copy.deepcopy(norm).to(kernels.device)
        parameters = [None if t is None else t.to(kernels.device) for t in (x, weight, bias)]
        out = ours(block, *parameters, there, plan=plan, layout=layout).cpu()
        for mine, found in zip(norm.buffers(), there.buffers(), strict=True):
            mine.copy_(found)
        return out

    with mock.patch.multiple(op, forward_op=FORWARD_OP, backward_op=BACKWARD_OP):
        tensors = normal_tensors(block, torch.float32)
        layout = random.choice(["channels_first", "channels_last", "locations_time_major", "features"])
        norm = random_norm(block, training).requires_grad_(False)
        assert_normed(block, tensors, norm, plan=plan, layout=layout, our=call)


@compiled
@plans
@modes
def test_compiled_and_captured_calls_give_the_same_bits(kernels, plan, training):
    tensors = _on(kernels.device, normal_tensors(SMALL, torch.float32))
    norm = random_norm(SMALL, training, track_running_stats=not training).to(kernels.device)

    def call(x, weight, bias):
        return ours(SMALL, x, weight, bias, norm, plan=plan, layout="locations")

    with mock.patch.multiple(op, forward_op=FORWARD_OP, backward_op=BACKWARD_OP):
        grad = torch.ones(3, 9, 18, device=kernels.device)
        eager = evaluate(call, tensors, grad)
        fast = evaluate(torch.compile(call, fullgraph=True), tensors, grad)
        assert all(torch.equal(fast[name], eager[name]) for name in eager)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            captured = call(**tensors)
        for t in tensors.values():
            t.neg_()
        graph.replay()
        with torch.no_grad():
            assert torch.equal(captured, call(**tensors))
