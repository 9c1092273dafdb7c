"""functional.conv_block takes arguments, pools and modules as PyTorch does."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Block,
    assert_close_as_torch,
    evaluate,
    floats,
    fused_plans,
    integer_tensors,
    needs_extension,
    plans,
)
from torch import nn

from cnnlstm_fast import backends, reference
from cnnlstm_fast.functional import conv_block


@plans
def test_arguments_in_every_form(plan):
    """Ints, tuples, lists, one-element lists and numpy integers mean the same."""
    numpy = pytest.importorskip("numpy")
    x, w = torch.randint(-3, 4, (2, 4, 13, 12)).float(), torch.randint(-3, 4, (32, 2, 3, 3)).float()
    expected = F.max_pool2d(F.relu(F.conv2d(x, w, None, 2, 1, 2, 2)), 2)
    pool = torch.nn.MaxPool2d(2)
    for two, one in [
        (2, 1), ((2, 2), (1, 1)), ([2, 2], [1, 1]), ((2,), [1]), (torch.Size([2, 2]), torch.Size([1, 1])),
        (numpy.int64(2), numpy.int32(1)), ((numpy.int64(2),) * 2, [numpy.int64(1)] * 2),
    ]:  # fmt: skip
        out = conv_block(x, w, stride=two, padding=one, dilation=two, groups=2, pool=pool, plan=plan)
        assert torch.equal(out, expected), f"stride={two!r}, padding={one!r}"
    for kernel in (2, (2, 2), [2, 2], numpy.int64(2)):
        pool = torch.nn.MaxPool2d(kernel)
        out = conv_block(x, w, stride=2, padding=1, dilation=2, groups=2, pool=pool, plan=plan)
        assert torch.equal(out, expected), f"pool kernel {kernel!r}"
    out = conv_block(x, w, stride=2, padding=1, dilation=2, groups=numpy.int64(2), pool=pool, plan=plan)
    assert torch.equal(out, expected)


@plans
def test_activation_by_name_module_or_none(plan):
    x, w = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
    y = F.conv2d(x, w)
    for activation, expected in [
        ("relu", F.relu(y)), (torch.nn.ReLU(), F.relu(y)), (torch.nn.ReLU(inplace=True), F.relu(y)), (None, y)
    ]:  # fmt: skip
        torch.testing.assert_close(conv_block(x, w, activation=activation, plan=plan), expected)


@plans
@floats
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(2, 3), (4, 1), (3, 6), (1, 2)], ids=str)
@pytest.mark.parametrize("rank", [3, 4])
def test_padding_by_name(plan, dtype, padding, kernel, rank):
    """An even kernel pads one more after the last row than before the first; gradients too, and twice."""
    kernel, size, dilation = kernel[4 - rank :], (9, 10)[4 - rank :], (2, 1)[4 - rank :]
    block = Block(2, 3, size, 18, kernel, (1,) * len(size), (0,) * len(size), dilation)
    tensors, grad = integer_tensors(replace(block, padding=kernel), dtype)
    fn = F.conv2d if rank == 4 else F.conv1d
    pool = torch.nn.MaxPool2d(2) if rank == 4 else torch.nn.MaxPool1d(2)

    def theirs(x, weight, bias):
        return pool(F.relu(fn(x, weight, bias, padding=padding, dilation=dilation)))

    def ours(x, weight, bias):
        return conv_block(
            x, weight, bias, padding=padding, dilation=list(dilation), pool=pool, plan=plan
        )  # fmt: skip

    true = {k: t.double() for k, t in tensors.items()}
    grad = (torch.rand(theirs(**true).shape) < 0.1).to(dtype)
    found, expected = evaluate(ours, tensors, grad), evaluate(theirs, true, grad.double())
    for name in found:
        assert torch.equal(found[name].double(), expected[name]), name
    if dtype == torch.float32:
        grads = []
        for fn_, given in ((ours, tensors), (theirs, tensors)):
            leaves = {k: t.clone().requires_grad_() for k, t in given.items()}
            first = torch.autograd.grad(fn_(**leaves), list(leaves.values()), grad, create_graph=True)
            grads.append(torch.autograd.grad(first[0].square().sum(), leaves["weight"])[0])
        assert torch.equal(*grads)


def test_anything_else_is_pytorchs():
    """What no fused plan covers gives PyTorch's own bits."""

    x, w, b = torch.randn(3, 4, 12, 12), torch.randn(8, 4, 3, 3), torch.randn(8)
    y = F.conv2d(x, w, b)
    norm = nn.GroupNorm(2, 8)
    for keywords, expected in [
        ({"activation": "softsign"}, F.softsign(y)),
        ({"activation": nn.CELU(2)}, F.celu(y, 2)),
        ({"activation": nn.GLU(1)}, F.glu(y, 1)),
        ({"pool": nn.LPPool2d(2, 2)}, F.lp_pool2d(F.relu(y), 2, 2)),
        ({"norm": norm}, F.relu(norm(y))),
    ]:
        assert torch.equal(conv_block(x, w, b, **keywords), expected), keywords


OTHER_POOLS = {
    "average": lambda: nn.AvgPool2d(2),
    "average, borders counted": lambda: nn.AvgPool2d((3, 2), (2, 1), (1, 0), ceil_mode=True),
    "average, borders left out": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "average, divisor": lambda: nn.AvgPool2d((2, 3), divisor_override=5),
    "global average": lambda: nn.AdaptiveAvgPool2d(1),
    "adaptive average": lambda: nn.AdaptiveAvgPool2d((None, 3)),
    "global max": lambda: nn.AdaptiveMaxPool2d(1),
    "adaptive max that divides": lambda: nn.AdaptiveMaxPool2d((5, None)),
    "adaptive max that does not": lambda: nn.AdaptiveMaxPool2d((3, 7)),
    "average of a signal": lambda: nn.AvgPool1d(3, 2, 1, count_include_pad=False),
    "global average of a signal": lambda: nn.AdaptiveAvgPool1d(1),
    "adaptive max of a signal": lambda: nn.AdaptiveMaxPool1d(4),
}


@plans
@pytest.mark.parametrize("normed", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("layout", ["channels_first", "features"])
@pytest.mark.parametrize("pool", OTHER_POOLS)
def test_other_pools(pool, layout, normed, plan):
    """Average, adaptive and global pools behind what is fused: as near to the truth as PyTorch."""
    pool = OTHER_POOLS[pool]()
    signal = type(pool).__name__.endswith("1d")
    shapes = {
        "x": (5, 4, 20) if signal else (5, 4, 10, 8),
        "w": (40, 4, 3) if signal else (40, 4, 3, 3),
        "b": (40,),
    }
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    values["w"] /= values["w"][0].numel() ** 0.5  # a tanh that is not saturated
    norm = (nn.BatchNorm1d if signal else nn.BatchNorm2d)(40) if normed else None
    keywords = dict(padding=1, activation="tanh", pool=pool, layout=layout)

    def way(fn, dtype=torch.float32, **more):
        leaves = [values[name].to(dtype).requires_grad_() for name in shapes]
        of_type = copy.deepcopy(norm).to(dtype) if normed else None
        y = fn(*leaves, norm=of_type, **keywords, **more)
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(y.shape, generator=generator).to(dtype)
        wanted = leaves[:2] if normed else leaves  # behind a norm the bias has no gradient but noise
        return y, *torch.autograd.grad(y, wanted, grad)

    mine = way(conv_block, plan=plan)
    assert mine[0].is_contiguous()
    for found, torchs, true in zip(
        mine, way(reference.conv_block), way(reference.conv_block, torch.float64), strict=True
    ):
        assert_close_as_torch(found, torchs, true, f"{pool}, {plan}")


@plans
def test_an_average_pool_of_one_image(plan):
    x, w = torch.randn(3, 9, 9), torch.randn(16, 3, 3, 3)
    expected = F.avg_pool2d(F.relu(F.conv2d(x, w)), 2).flatten()
    found = conv_block(x, w, pool=nn.AvgPool2d(2), layout="features", plan=plan)
    torch.testing.assert_close(found, expected)


def test_a_call_that_is_pytorchs_stays_checked(never_ours):
    """What was once left to PyTorch by its sizes is looked at again when anything about it changes."""
    x, w = torch.randn(2, 64, 9, 9), torch.randn(16, 64, 5, 5)
    for _ in range(2):
        assert torch.equal(conv_block(x, w), F.relu(F.conv2d(x, w)))
    with pytest.raises(ValueError, match="channels"):
        conv_block(x[:, :5], w)
    with pytest.raises(TypeError, match="dtype"):
        conv_block(x.double(), w)
    with pytest.raises(ValueError, match="return_indices"):
        conv_block(x, w, pool=nn.MaxPool2d(2, return_indices=True))
    with pytest.raises(ValueError, match="divisor"):
        conv_block(x, w, groups=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv_block(x, w).dtype == torch.bfloat16
    called = []
    pool = nn.AvgPool2d(2)
    conv_block(x, w, pool=pool)
    pool.register_forward_hook(lambda *_: called.append(1))
    conv_block(x, w, pool=pool)
    assert called


@needs_extension
def test_a_known_call_is_not_planned_again(always_ours, monkeypatch):
    """A second call of the same sizes and modes finds its plan; anything else about it makes a new one."""
    planning = sys.modules["cnnlstm_fast.functional.conv_block"]
    planned: list[str] = []
    plan_call = planning.plan_call
    monkeypatch.setattr(planning, "plan_call", lambda *args: planned.append("") or plan_call(*args))
    x, w, b = torch.randn(2, 3, 9, 11), torch.randn(16, 3, 3, 3), torch.randn(16)
    parts = dict(norm=nn.BatchNorm2d(16).eval(), activation=nn.LeakyReLU(0.1), pool=nn.MaxPool2d(2))
    called: list[int] = []

    def check(new: bool, *tensors, **more) -> None:
        planned.clear()
        for _ in range(2):
            options = parts | more
            got, expected = conv_block(*tensors, **options), reference.conv_block(*tensors, **options)
            assert got.dtype == expected.dtype and got.requires_grad == expected.requires_grad
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert len(planned) == new

    check(True, x, w, b)
    check(False, torch.randn(2, 3, 9, 11), w, b)
    check(True, x.to(memory_format=torch.channels_last), w, b)
    check(True, x, w)
    check(True, x, w.clone().requires_grad_(), b)
    check(True, x, w, b, padding=1)
    check(True, x, w, b, layout="columns")
    check(True, x, w, b, activation="relu")
    parts["activation"].negative_slope = 0.3
    check(True, x, w, b)
    parts["pool"].stride = 1
    check(True, x, w, b)
    parts["norm"].running_mean.add_(1)
    check(False, x, w, b)
    with torch.no_grad():
        check(True, x, w, b)
    parts["norm"].train()
    check(True, x, w, b)
    parts["norm"].eval()
    check(False, x, w, b)
    handle = parts["pool"].register_forward_hook(lambda *_: called.append(1))
    conv_block(x, w, b, **parts)
    handle.remove()
    assert called
    check(False, x, w, b)
    del parts["norm"]
    check(True, x, w, b)
    got = torch.vmap(lambda x: conv_block(x, w, b, **parts))(x[None])[0]
    torch.testing.assert_close(got, reference.conv_block(x, w, b, **parts))
    with pytest.raises(ValueError, match="shape"):
        conv_block(x, w, b[:8], **parts)
    monkeypatch.setattr(backends, "allow_transforms", False)
    check(True, x, w, b)


def test_an_images_pool_on_signals():
    """PyTorch takes (N, C, L) for an unbatched image, and so does the block."""
    x, weight = torch.randn(2, 4, 9), torch.randn(6, 4, 3)
    expected = F.max_pool2d(F.relu(F.conv1d(x, weight)), 2)
    assert torch.equal(conv_block(x, weight, pool=torch.nn.MaxPool2d(2)), expected)


def test_hooks_on_parts_run():
    """Forward and backward hooks of the activation and the pool are called, global ones too."""
    from torch.nn.modules import module

    x, w = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3)
    register = {
        "forward": lambda m, hook: m.register_forward_hook(hook),
        "forward pre": lambda m, hook: m.register_forward_pre_hook(hook),
        "full backward": lambda m, hook: m.register_full_backward_hook(hook),
        "full backward pre": lambda m, hook: m.register_full_backward_pre_hook(hook),
        "global forward": lambda m, hook: module.register_module_forward_hook(hook),
        "global forward pre": lambda m, hook: module.register_module_forward_pre_hook(hook),
        "global full backward": lambda m, hook: module.register_module_full_backward_hook(hook),
    }
    for which in ("activation", "pool"):
        for kind, hook_on in register.items():
            parts = {"activation": nn.ReLU(), "pool": nn.MaxPool2d(2)}
            called = []
            handle = hook_on(parts[which], lambda *_, called=called: called.append(1) and None)
            try:
                conv_block(x, w, **parts).sum().backward()
            finally:
                handle.remove()
            assert called, f"{kind} hook on the {which} was not called"


def test_a_changed_module_is_not_fused():
    """A subclass, or an instance with a forward of its own, runs as it is."""

    class Doubling(nn.ReLU):
        def forward(self, y):
            return 2 * super().forward(y)

    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    expected = 2 * F.relu(F.conv2d(x, w))
    assert torch.equal(conv_block(x, w, activation=Doubling()), expected)
    patched = nn.ReLU()
    patched.forward = lambda y: 2 * F.relu(y)
    assert torch.equal(conv_block(x, w, activation=patched), expected)


@fused_plans
def test_a_pool_that_shows_its_indices(plan):

    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with pytest.raises(ValueError, match="indices"):
        conv_block(x, w, pool=nn.MaxPool2d(2, return_indices=True), plan=plan)
