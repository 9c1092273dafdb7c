"""The Triton kernels of the block op: in Triton's interpreter on any machine, compiled on a CUDA device.

The interpreter's copy of the kernels is a module of its own, made while Triton's switch is on;
nothing else in the process sees the switch.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ACTIVATIONS,
    CURVED,
    FIELD_BLOCKS,
    STRIDED,
    Block,
    as_2d,
    assert_block,
    assert_close_as_torch,
    decided,
    evaluate,
    integer_tensors,
    normal_tensors,
    our_block,
    random_blocks,
    strided,
    torch_block,
    torch_ways,
    winners,
)
from interpreted import interpreter_and_cuda, kernels_of, launch_in_bounds, no_launch, with_open_sizes
from torch import Tensor
from triton_blocks import (
    ACTIVATION_ARGS,
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
    dtypes,
    plans,
)

# In the interpreter a case takes a tenth of a second or more.
pytestmark = [pytest.mark.usefixtures("float32_means_float32"), pytest.mark.some(10), pytest.mark.share(3)]


class Kernels:
    """The host functions of the kernels, and where their tensors have to be."""

    def __init__(self, module, device: str):
        self.module, self.device = module, device

    def forward(self, block, x, weight, bias=None, *, plan, order=(0, 1, 2, 3), keep=True):
        """(the map in (N, C, H, W), its argmax codes) of a 2-d block."""
        args = (*_op_args(block), list(order), PLANS[plan], keep)
        raw, codes, self.slopes = self.module.forward(x, weight, bias, *args, run=launch_in_bounds)
        assert raw.is_contiguous()
        assert self.slopes.shape == (raw.shape if keep and block.activation in CURVED else (0,))
        return raw.permute([order.index(axis) for axis in range(4)]), codes

    def backward(
        self, block, grad, x, weight, codes, *, plan, order=(0, 1, 2, 3), needs=("x", "weight", "bias")
    ):
        """{name: gradient} of those in ``needs``; ``grad`` is in (N, C, H, W). After the forward of a
        curved activation, whose slopes it takes."""
        wanted = [name in needs for name in ("x", "weight", "bias")]
        grad = grad.permute(order)
        if block.activation in CURVED:
            block, grad = replace(block, activation=None), grad * self.slopes
        args = (*_op_args(block), list(order), PLANS[plan])
        found = self.module.backward(grad, x, weight, codes, *args, *wanted, run=launch_in_bounds)
        grads = dict(zip(("x", "weight", "bias"), found, strict=True))
        assert all(grads[name].numel() == 0 for name in grads if name not in needs)
        return {name: grads[name] for name in needs}


@interpreter_and_cuda
def kernels(request):
    yield from kernels_of("conv_block", request.param, Kernels)


@_without_cudnn()
def _assert_exact(kernels, block, tensors, grad, *, plan, order=(0, 1, 2, 3)):
    """Map, codes and gradients of whole numbers that no order of adding rounds: equal to float64's."""
    block, tensors = as_2d(block, tensors)
    grad = grad if grad.dim() == 4 else grad.unsqueeze(2)
    _, true = torch_ways(block, tensors, grad)
    plain = replace(block, activation=None, pool=None)
    argmax = winners(block, torch_block(plain, **{name: t.double() for name, t in tensors.items()}))
    there = _on(kernels.device, tensors | {"grad": grad})
    grad, x, weight = there.pop("grad"), there["x"], there["weight"]
    out, codes = kernels.forward(block, **there, plan=plan, order=order)
    found = {"out": out}
    if block.pool or (block.activation and block.activation not in CURVED):
        assert torch.equal(_decode(codes, _window(block), block.c_out), argmax.int()), f"codes of {block}"
    found |= kernels.backward(block, grad, x, weight, codes, plan=plan, order=order, needs=tuple(tensors))
    for name, mine in found.items():
        assert mine.dtype == x.dtype
        wrong = mine.cpu().double() != true[name]
        assert not wrong.any(), f"{name} differs in {wrong.sum()} of {wrong.numel()}: {block}, {order}"


# ---------------------------------------------------------------- numbers


@plans
@dtypes
@_small_blocks(8)
def test_random_blocks_are_as_near_to_float64_as_torch(kernels, block, dtype, plan):
    if plan == "chunked" and dtype != torch.float32:
        # Like PyTorch on CUDA it rounds before it adds the bias, which `decided` does not allow for.
        block = replace(block, bias=False)
    block, tensors = as_2d(block, normal_tensors(block, dtype))
    order = random.choice(ORDERS)
    grad = (torch.randn(block.out_shape()) * decided(block, tensors)).to(dtype)
    tensors = _on(kernels.device, tensors | {"grad": grad})
    grad, x, weight = tensors.pop("grad"), tensors["x"], tensors["weight"]
    ways, true = torch_ways(block, tensors, grad)
    out, codes = kernels.forward(block, **tensors, plan=plan, order=order)
    found = {"out": out}
    found |= kernels.backward(block, grad, x, weight, codes, plan=plan, order=order, needs=tuple(tensors))
    for name, mine in found.items():
        assert_close_as_torch(mine, [way[name] for way in ways], true[name], f"{name} of {block}, {order}")


@plans
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS)[2:])
def test_activations(kernels, activation, dtype, plan):
    block = replace(TUTORIAL, activation=activation, pool=random.choice([TUTORIAL.pool, None]))
    if plan == "chunked" and dtype != torch.float32:
        block = replace(block, bias=False)
    tensors = normal_tensors(block, dtype)
    tensors["weight"] *= 2  # where curves bend
    grad = (torch.randn(block.out_shape()) * decided(block, tensors)).to(dtype)
    there = _on(kernels.device, tensors | {"grad": grad})
    grad, x, weight = there.pop("grad"), there["x"], there["weight"]
    ways, true = torch_ways(block, there, grad)
    out, codes = kernels.forward(block, **there, plan=plan, order=(0, 2, 3, 1))
    found = {"out": out}
    found |= kernels.backward(
        block, grad, x, weight, codes, plan=plan, order=(0, 2, 3, 1), needs=tuple(tensors)
    )
    for name, mine in found.items():
        assert_close_as_torch(mine, [way[name] for way in ways], true[name], f"{name} of {block}")


@plans
@pytest.mark.parametrize("activation", ["hardtanh", "relu6", "size"])
def test_activations_in_whole_numbers(kernels, activation, plan):
    block = replace(TUTORIAL, activation=activation)
    _assert_exact(kernels, block, *integer_tensors(block, torch.float32), plan=plan)


@plans
@pytest.mark.parametrize("activation", list(ACTIVATIONS)[2:])
def test_activations_over_their_whole_range(kernels, activation, plan):
    module = ACTIVATIONS[activation].module
    x = torch.cat([torch.linspace(-120, 120, 200), torch.linspace(-3, 3, 200), torch.logspace(-30, 17, 50)])
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0])]).view(1, 1, 1, -1)
    block = Block(1, 1, x.shape[2:], 1, (1, 1), bias=False, activation=activation)
    there = _on(kernels.device, {"x": x, "weight": torch.ones(1, 1, 1, 1), "grad": torch.ones(x.shape)})
    grad = there.pop("grad")
    out, codes = kernels.forward(block, **there, plan=plan)
    dx = kernels.backward(block, grad, *there.values(), codes, plan=plan, needs=("x",))["x"]
    exact = evaluate(lambda x: module(x), {"x": x.double()}, torch.ones(x.shape).double())
    size = x.double().abs().clamp(min=1) if activation.startswith("gelu") else exact["out"].abs()
    assert ((out.cpu() - exact["out"]).abs() <= 1e-6 * size + 1e-36).all()
    assert ((dx.cpu() - exact["x"]).abs() <= 2e-6).all()


@plans
@pytest.mark.parametrize(
    ("beta", "threshold"), [(1.0, 20.0), (2.0, 1.0), (0.3, 2.5), (-0.5, 3.0), (3.0, -2.0), (1.0, 100.0)]
)
def test_softplus_of_any_numbers(kernels, beta, threshold, plan):
    """Values and slopes beside the threshold, where the result may jump, far from it, and of specials."""
    beside = threshold / beta * (1 + torch.finfo(torch.float32).eps * torch.arange(-9, 10))
    special = torch.tensor([0.0, -0.0, 1e38, -1e38, math.nan, math.inf, -math.inf])
    x = torch.cat([beside, torch.linspace(-80, 120, 401), torch.linspace(-3, 3, 200), special])
    x = x.view(1, 1, 1, -1)
    there = _on(kernels.device, {"x": x, "weight": torch.ones(1, 1, 1, 1)})
    conv = _op_args(Block(1, 1, x.shape[2:], 1, (1, 1)))[0]
    number = ACTIVATION_ARGS["softplus"][0]
    with _without_cudnn():
        out, _, slopes = kernels.module.forward(
            *there.values(), None, conv, number, [beta, threshold], [], [0, 1, 2, 3], PLANS[plan], True
        )
    theirs = evaluate(lambda x: F.softplus(x, beta, threshold), {"x": x}, torch.ones(x.shape))
    for mine, their in ((out, theirs["out"]), (slopes, theirs["x"])):
        torch.testing.assert_close(mine.cpu(), their, rtol=2e-5, atol=1e-37, equal_nan=True)


@plans
def test_zeros_after_the_last_row_and_column(kernels, plan):
    """As padding="same" wants for an even kernel, against a whole input that holds these zeros."""
    block = replace(TUTORIAL, kernel=(2, 4), padding=(0, 1))
    tensors, _ = integer_tensors(replace(block, size=(6, 7)), torch.float32)
    padded = tensors["x"].clone()
    padded[:, :, -1], padded[..., -1] = 0, 0
    x, weight, bias = _on(kernels.device, tensors | {"x": padded[:, :, :-1, :-1].contiguous()}).values()
    whole = padded.to(kernels.device)
    conv, *rest = _op_args(block)
    args = (*rest, [0, 1, 2, 3], PLANS[plan])
    with _without_cudnn():
        results = []
        for given, at in ((x, [*conv, 1, 1]), (whole, conv)):
            out, codes, _ = kernels.module.forward(given, weight, bias, at, *args, True)
            grads = kernels.module.backward(
                torch.ones_like(out), given, weight, codes, at, *args, True, True, True
            )
            results.append([out, codes, grads[0][:, :, :5, :6], *grads[1:]])
    assert all(map(torch.equal, *results))


@plans
@_small_blocks(12)
def test_ties_and_codes_are_exact_in_every_memory(kernels, block, plan):
    tensors, grad = integer_tensors(block, random.choice([torch.float32, torch.bfloat16]))
    tensors["x"] = strided(tensors["x"], random.choice(STRIDED[:3] + STRIDED[4:]))
    tensors["weight"] = strided(tensors["weight"], random.choice(["sliced", "transposed", "channels_last"]))
    grad = strided(grad, random.choice(["sliced", "transposed", "backwards_dims"]))
    _assert_exact(kernels, block, tensors, grad, plan=plan, order=random.choice(ORDERS))


@plans
@pytest.mark.parametrize("how", STRIDED)
def test_strided_and_expanded_inputs_are_exact(kernels, how, plan):
    tensors, grad = integer_tensors(TUTORIAL, torch.float32)
    tensors["x"], grad = strided(tensors["x"], how), strided(grad, how)
    _assert_exact(kernels, TUTORIAL, tensors, grad, plan=plan)


@plans
def test_the_gradient_of_a_sum_has_no_strides_at_all(kernels, plan):
    tensors, grad = integer_tensors(TUTORIAL, torch.float32)
    _assert_exact(kernels, TUTORIAL, tensors, torch.ones(()).expand(grad.shape), plan=plan)


@pytest.mark.some(24)
@plans
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "".join("NCHW"[axis] for axis in order))
def test_every_memory_order_is_exact(kernels, order, plan):
    block = replace(TUTORIAL, n=2, c=1, size=(4, 6), c_out=17)
    _assert_exact(kernels, block, *integer_tensors(block, torch.bfloat16), plan=plan, order=order)


@pytest.mark.some(13)
@plans
@pytest.mark.parametrize("block", SPECIAL_BLOCKS.values(), ids=SPECIAL_BLOCKS)
def test_special_blocks_are_exact(kernels, block, plan):
    tensors, grad = integer_tensors(block, torch.float32)
    _assert_exact(kernels, block, tensors, grad, plan=plan, order=random.choice(ORDERS))


@_without_cudnn()
@plans
@pytest.mark.parametrize("name", ["tutorial", "no activation", "14 elements", "dilated pool"])
def test_nan_and_infinities_stand_where_torch_puts_them(kernels, name, plan):
    block = SPECIAL_BLOCKS.get(name, TUTORIAL)
    tensors, grad = integer_tensors(block, torch.float32)
    for value in (math.nan, math.inf, -math.inf):
        tensors["x"].view(-1)[random.randrange(tensors["x"].numel())] = value
    grad.view(-1)[random.randrange(grad.numel())] = math.nan
    ways, true = torch_ways(block, tensors, grad)
    plain = replace(block, activation=None, pool=None)
    argmax = winners(block, torch_block(plain, **{name: t.double() for name, t in tensors.items()}))
    there = _on(kernels.device, tensors | {"grad": grad})
    grad, x, weight = there.pop("grad"), there["x"], there["weight"]
    out, codes = kernels.forward(block, **there, plan=plan)
    assert torch.equal(_decode(codes, _window(block), block.c_out), argmax.int())
    found = {"out": out} | kernels.backward(block, grad, x, weight, codes, plan=plan, needs=tuple(tensors))
    for name, mine in found.items():
        assert_close_as_torch(mine.cpu(), [way[name] for way in ways], true[name], f"{name} of {block}")


# ---------------------------------------------------------------- what is asked for


@plans
def test_only_what_is_asked_for_is_computed(kernels, plan):
    tensors, grad = integer_tensors(TUTORIAL, torch.float32)
    there = _on(kernels.device, tensors | {"grad": grad})
    grad, x, weight = there.pop("grad"), there["x"], there["weight"]
    out, codes = kernels.forward(TUTORIAL, **there, plan=plan)
    without, nothing = kernels.forward(TUTORIAL, **there, plan=plan, keep=False)
    assert torch.equal(out, without) and nothing.shape == (0,) and nothing.dtype == torch.uint8
    everything = kernels.backward(TUTORIAL, grad, x, weight, codes, plan=plan)
    for name, expected in everything.items():
        alone = kernels.backward(TUTORIAL, grad, x, weight, codes, plan=plan, needs=(name,))
        assert torch.equal(alone[name], expected), name


@plans
@pytest.mark.parametrize("pool", [TUTORIAL.pool, None])
def test_empty_batch(kernels, pool, plan):
    block = replace(TUTORIAL, n=0, pool=pool)
    tensors = _on(kernels.device, normal_tensors(block, torch.float32))
    out, codes = kernels.forward(block, **tensors, plan=plan)
    assert out.shape == block.out_shape()
    grads = kernels.backward(block, out, tensors["x"], tensors["weight"], codes, plan=plan)
    assert all(torch.equal(grads[name], torch.zeros_like(t)) for name, t in tensors.items())


@plans
def test_64_bit_offsets_change_nothing(kernels, monkeypatch, plan):
    tensors, grad = integer_tensors(TUTORIAL, torch.float32)
    monkeypatch.setitem(kernels.module.over_positions.__globals__, "NARROW_REACH", 0)
    _assert_exact(kernels, TUTORIAL, tensors, grad, plan=plan)


@plans
def test_runs_twice_to_the_same_bits(kernels, plan):
    tensors = _on(kernels.device, normal_tensors(TUTORIAL, torch.float32))
    runs = []
    for _ in range(2):
        out, codes = kernels.forward(TUTORIAL, **tensors, plan=plan)
        grads = kernels.backward(TUTORIAL, out, tensors["x"], tensors["weight"], codes, plan=plan)
        runs.append([out, codes, *grads.values()])
    assert all(map(torch.equal, *runs))


# ---------------------------------------------------------------- wrong calls, and what only the device knows


def _arguments(device: str, *, backward: bool, block: Block = TUTORIAL) -> dict:
    """What the host functions take, under their names."""
    there = {name: torch.zeros(shape, device=device) for name, shape in block.shapes().items()}
    names = ("conv", "activation", "act", "pool")
    args = {**there, **dict(zip(names, _op_args(block), strict=True)), "order": [0, 1, 2, 3], "plan": 1}
    if not backward:
        return args | {"keep": True}
    del args["bias"]
    grad = torch.zeros(block.out_shape(), device=device)
    codes = torch.zeros(2, 2, 3, 2, 8, dtype=torch.uint8, device=device)
    return {"grad": grad, **args, "codes": codes, "need_x": True, "need_weight": True, "need_bias": True}


CONV, POOLED = [1, 1, 1, 1, 1, 1, 1], [2, 2, 2, 2, 0, 0, 1, 1, 0]


def _with(values: list[int], at: int, value: int) -> list[int]:
    return [*values[:at], value, *values[at + 1 :]]


WRONG_BLOCKS = {
    "a 3-d input": (dict(x=torch.zeros(3, 5, 6)), "expected a 4-d input and weight, got 3-d"),
    "a 2-d weight": (dict(weight=torch.zeros(20, 27)), "expected a 4-d input and weight, got 4-d and 2-d"),
    "float64": (dict(x=torch.zeros(2, 3, 5, 6).double()), "got torch.float64, .*float16 only"),
    "whole numbers": (dict(x=torch.zeros(2, 3, 5, 6).long()), "got torch.int64, .*float16 only"),
    "mixed dtypes": (dict(weight=torch.zeros(20, 3, 3, 3).bfloat16()), "differ in dtype"),
    "another device": (dict(weight=torch.zeros(20, 3, 3, 3, device="meta")), "different devices"),
    "no conv": (dict(conv=[]), "conv must be .*, got 0 values"),
    "a short conv": (dict(conv=CONV[:6]), "conv must be .*, got 6 values"),
    "half the padding after": (dict(conv=[*CONV, 1]), "conv must be .*, got 8 values"),
    "a stride of 0": (dict(conv=_with(CONV, 0, 0)), r"conv\[0\] = 0 is out of range"),
    "negative padding": (dict(conv=_with(CONV, 3, -1)), r"conv\[3\] = -1 is out of range"),
    "a huge dilation": (dict(conv=_with(CONV, 5, 2**31)), r"conv\[5\] = 2147483648 is out of range"),
    "no groups": (dict(conv=_with(CONV, 6, 0)), r"conv\[6\] = 0 is out of range"),
    "huge padding": (dict(conv=_with(CONV, 2, 2**30)), "too large"),
    "a short pool": (dict(pool=[2, 2]), "pool must be empty or have 9 values, got 2"),
    "an empty window": (dict(pool=_with(POOLED, 0, 0)), r"pool\[0\] = 0 is out of range"),
    "a huge window": (dict(pool=_with(POOLED, 1, 2**32)), r"pool\[1\] = 4294967296 is out of range"),
    "255 elements": (dict(pool=[1, 255, 1, 1, 0, 0, 1, 1, 0]), "more than 254 elements"),
    "a pool padded by its kernel": (dict(pool=_with(POOLED, 4, 2)), "padding is more than half the kernel"),
    "a pool wider than the map": (dict(pool=[2, 7, 1, 1, 0, 0, 1, 1, 0]), "map of 5x6 is too small"),
    "a window beside the map": (
        dict(x=torch.zeros(2, 3, 5, 1), pool=[2, 2, 1, 1, 0, 1, 1, 2, 0]),
        "a pool window meets no element",
    ),
    "an image too small": (dict(conv=[1, 1, 0, 0, 3, 1, 1]), "an input of 5x6 is too small for the kernel"),
    "an empty image": (dict(x=torch.zeros(2, 3, 0, 6)), "an input of 0x6 is too small"),
    "too many channels": (dict(x=torch.zeros(2, 4, 5, 6)), "4 channels does not fit a weight"),
    "no channels": (
        dict(x=torch.zeros(2, 0, 5, 6), weight=torch.zeros(20, 0, 3, 3)),
        "0 channels does not fit",
    ),
    "groups that divide nothing": (dict(conv=_with(CONV, 6, 7)), "with groups=7"),
    "an unknown activation": (dict(activation=99), "unknown activation 99"),
    "a negative activation": (dict(activation=-1), "unknown activation -1"),
    "a ReLU with a number": (dict(act=[1.0]), "activation 1 has 0 numbers, got 1"),
    "half a Hardtanh": (dict(activation=2, act=[1.0]), "activation 2 has 2 numbers, got 1"),
    "an order with an axis twice": (dict(order=[0, 1, 2, 2]), "order must be a permutation of 0, 1, 2, 3"),
    "an order of axes that are not": (dict(order=[0, 1, 2, 4]), "order must be a permutation of 0, 1, 2, 3"),
    "a plan of the CPU": (dict(plan=3), "unknown plan 3"),
    "no plan": (dict(plan=0), "unknown plan 0"),
}

WRONG_FORWARDS = {
    "a short bias": (dict(bias=torch.zeros(19)), r"expected a bias of shape \(20,\)"),
    "one bias for all": (dict(bias=torch.zeros(1)), r"got \(1,\)"),
    "a bias of rank 0": (dict(bias=torch.zeros(())), r"expected a bias of shape \(20,\)"),
    "a bias of another dtype": (
        dict(bias=torch.zeros(20).double()),
        "input and bias differ in dtype: .*float64",
    ),
}

WRONG_BACKWARDS = {
    "a gradient of another size": (
        dict(grad=torch.zeros(2, 20, 2, 4)),
        r"gradient has .*expected \(2, 20, 2, 3\)",
    ),
    "a gradient in another order": (dict(order=[0, 2, 3, 1]), r"expected \(2, 2, 3, 20\)"),
    "a 3-d gradient": (dict(grad=torch.zeros(20, 2, 3)), r"gradient has shape \(20, 2, 3\)"),
    "a gradient of another dtype": (
        dict(grad=torch.zeros(2, 20, 2, 3).half()),
        "input and gradient differ in dtype",
    ),
    "codes of half the batch": (
        dict(codes=torch.zeros(1, 2, 3, 2, 8, dtype=torch.uint8)),
        r"expected \(2, 2, 3, 2, 8\)",
    ),
    "codes of a large window": (
        dict(codes=torch.zeros(2, 2, 3, 2, 16, dtype=torch.uint8)),
        r"expected \(2, 2, 3, 2, 8\)",
    ),
    "no codes": (dict(codes=torch.zeros(0, dtype=torch.uint8)), r"codes have shape \(0,\)"),
    "codes that nothing kept": (dict(activation=0, pool=[], grad=torch.zeros(2, 20, 5, 6)), "has no codes"),
    "codes of another dtype": (
        dict(codes=torch.zeros(2, 2, 3, 2, 8)),
        "codes must be contiguous torch.uint8",
    ),
    "codes with gaps": (
        dict(codes=torch.zeros(2, 2, 3, 2, 16, dtype=torch.uint8)[..., ::2]),
        "codes must be contiguous torch.uint8",
    ),
}


@pytest.mark.parametrize(
    ("backward", "wrong"),
    [
        pytest.param(way == "backward", wrong, id=f"{way}: {name}")
        for way, more in (("forward", WRONG_FORWARDS), ("backward", WRONG_BACKWARDS))
        for name, wrong in (WRONG_BLOCKS | more).items()
    ],
)
def test_wrong_calls_start_no_kernel(kernels, backward, wrong):
    changes, message = wrong
    on_device = {
        name: value.to(kernels.device) if isinstance(value, Tensor) and not value.is_meta else value
        for name, value in changes.items()
    }
    function = kernels.module.backward if backward else kernels.module.forward
    with pytest.raises(RuntimeError, match=message):
        function(**_arguments(kernels.device, backward=backward) | on_device, run=no_launch)


def test_checks_leave_the_batch_of_a_trace_open():
    from cnnlstm_fast.kernels import checks

    args = _arguments("cpu", backward=True)
    env, args = with_open_sizes(args, {"x": (0,), "grad": (0,), "codes": (0,)})
    x, weight, block = args["x"], args["weight"], _op_args(TUTORIAL)
    assert type(x.shape[0]) is torch.SymInt
    _, size = checks.check_block(x, weight, *block, args["order"], 1)
    checks.check_bias(x, weight, weight[:, 0, 0, 0])
    checks.check_block_backward(args["grad"], x, weight, args["codes"], 1, block[-1], args["order"], size)
    assert not env.guards


@pytest.mark.parametrize("name", ["tutorial", "no pool", "15 elements", "gaps", "dilated pool"])
@plans
def test_any_codes_are_safe(kernels, name, plan):
    """Codes that name no element of their window, or one outside the map, lead nowhere."""
    block = SPECIAL_BLOCKS.get(name, TUTORIAL)
    tensors, grad = integer_tensors(block, torch.float32)
    there = _on(kernels.device, tensors | {"grad": grad})
    grad, x, weight = there.pop("grad"), there["x"], there["weight"]
    _, codes = kernels.forward(block, **there, plan=plan)
    codes = torch.randint(0, 256, codes.shape, dtype=torch.uint8).to(kernels.device)
    args = (*_op_args(block), [0, 1, 2, 3], PLANS[plan])
    for needs in ((True, True, True), (False, False, True)):
        found = kernels.module.backward(grad, x, weight, codes, *args, *needs, run=launch_in_bounds)
        assert all(g.isfinite().all() for g in found)


# ---------------------------------------------------------------- ahead of time, and registration


@plans
def test_tracing_shows_the_kernels(plan):
    """Under AOTAutograd the op on CUDA tensors becomes its kernels, so that inductor can see them."""
    from functorch.compile import aot_function
    from torch._subclasses import FakeTensorMode

    from cnnlstm_fast.ops.conv_block import backward_op, forward_op

    args = (*_op_args(TUTORIAL), [0, 2, 3, 1], PLANS[plan])

    def step(x, weight, bias, grad):
        out, codes, _ = forward_op(x, weight, bias, *args, True)
        return (out, *backward_op(grad, x, weight, codes, *args, True, True, True))

    class Captured(Exception):
        pass

    def capture(graph, inputs):
        raise Captured([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])

    with FakeTensorMode(), pytest.raises(Captured) as captured:
        shapes = [*TUTORIAL.shapes().values(), (2, 2, 3, 20)]
        inputs = [torch.empty(shape, device="cuda") for shape in shapes]
        aot_function(step, fw_compiler=capture)(*inputs)
    targets = captured.value.args[0]
    assert not [target for target in targets if "cnnlstm_fast" in target]
    assert targets.count("triton_kernel_wrapper_functional") == {"direct": 4, "chunked": 2}[plan]
    assert ("aten.convolution.default" in targets) == (plan == "chunked")


# ---------------------------------------------------------------- on a device


field_blocks = pytest.mark.parametrize(
    "block", [block for block in FIELD_BLOCKS.values() if block.groups == 1], ids=str
)


@compiled
@random_blocks(60)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_random_blocks(kernels, block, dtype):
    for plan in PLANS:
        test_random_blocks_are_as_near_to_float64_as_torch(kernels, block, dtype, plan)


@compiled
@plans
@field_blocks
def test_the_public_function(kernels, block, plan):
    tensors = normal_tensors(block, torch.float32)
    grad = torch.randn(block.out_shape()) * decided(block, tensors)
    there = _on(kernels.device, tensors | {"grad": grad})
    grad = there.pop("grad")
    layout = random.choice(["channels_first", "channels_last", "locations_time_major", "features", "columns"])
    assert_block(block, there, grad, plan=plan, layout=layout)


@compiled
@plans
def test_compiled_and_captured_calls_give_the_same_bits(kernels, plan):
    tensors = _on(kernels.device, normal_tensors(TUTORIAL, torch.float32))

    def call(**tensors):
        return our_block(TUTORIAL, **tensors, plan=plan, layout="locations")

    eager = evaluate(call, tensors, torch.ones(2, 6, 20, device="cuda"))
    fast = evaluate(torch.compile(call, fullgraph=True), tensors, torch.ones(2, 6, 20, device="cuda"))
    assert all(torch.equal(fast[name], eager[name]) for name in eager)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(**tensors)
    for t in tensors.values():
        t.neg_()
    graph.replay()
    assert torch.equal(captured, call(**tensors)) and not torch.equal(captured, eager["out"])


@compiled
def test_direct_does_not_see_the_rest_of_the_batch(kernels):
    block = replace(TUTORIAL, n=5)
    tensors = _on(kernels.device, normal_tensors(block, torch.float32))
    together, _ = kernels.forward(block, **tensors, plan="direct")
    for i in range(5):
        alone, _ = kernels.forward(block, **tensors | {"x": tensors["x"][i : i + 1]}, plan="direct")
        assert torch.equal(alone[0], together[i])


@compiled
def test_tf32_only_where_torch_allows_it(kernels, monkeypatch):
    block = FIELD_BLOCKS["tutorial"]
    tensors = _on(kernels.device, normal_tensors(block, torch.float32))
    true = torch_block(block, **{name: t.double() for name, t in tensors.items()})

    def error():
        out, _ = kernels.forward(block, **tensors, plan="direct")
        return ((out.double() - true).norm() / true.norm()).item()

    assert error() < 2**-20
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert 2**-16 < error() < 2**-9
