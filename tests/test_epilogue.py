"""The op ``epilogue``: norm, sum and activations in one pass, forward and backward."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers import assert_close_as_torch
from torch import Tensor, nn

from cnnlstm_fast.functional import epilogue as functional
from cnnlstm_fast.functional.epilogue import Sum, program_of, run_program
from cnnlstm_fast.ops import epilogue as op

pytestmark = pytest.mark.instruction_sets

#: Shapes (N, C, ...): planes of many and of few positions, rows, odd sizes, one position, one channel.
SHAPES = {
    "image": (3, 5, 13, 11),
    "channels": (2, 40, 4, 5),
    "whole vectors": (4, 32, 6, 8),
    "planes in pieces": (2, 3, 43, 37),
    "signal": (5, 19, 7),
    "rows": (37, 21),
    "wide rows": (6, 1100),
    "one channel": (4, 1, 9, 6),
    "volume": (2, 6, 3, 5, 4),
}
#: Programs as they are written: n a norm, + a sum, a letter an activation.
ACTIVATIONS = {
    "r": nn.ReLU(), "h": nn.Hardtanh(-0.7, 0.9), "l": nn.LeakyReLU(0.1), "e": nn.ELU(0.8), "t": nn.Tanh(),
    "s": nn.SiLU(), "g": nn.GELU(), "p": nn.Softplus(1.3, 3.0), "i": nn.Sigmoid(),
    "u": nn.GELU(approximate="tanh"), "m": nn.Mish(), "w": nn.Hardswish(), "d": nn.Hardsigmoid(),
}  # fmt: skip
PROGRAMS = [
    "n",
    "nr",
    "n+r",
    "n+l",
    "n+h",
    "+",
    "+r",
    "rn",
    "ln",
    "tn",
    "rnr",
    "en+l",
    "ns+",
    "n+",
    "l",
    "sg",
    "pn",
    "ui",
    "mn",
    "nw",
    "wnd",
]


def norm_of(shape, training: bool, affine: bool = True) -> nn.Module:
    norm = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(len(shape), nn.BatchNorm1d)(shape[1], affine=affine)
    with torch.no_grad():
        if affine:
            norm.weight.normal_()
            norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 3)
    return norm.train(training)


def stages_of(program: str, norm: nn.Module, alpha: float) -> list:
    table = {"n": norm, "+": Sum(alpha), **ACTIVATIONS}
    return [table[letter] for letter in program]


def eager(z: Tensor, stages: list, added: Tensor | None) -> Tensor:
    for stage in stages:
        z = torch.add(z, added, alpha=stage.alpha) if isinstance(stage, Sum) else stage(z)
    return z


def ours(z: Tensor, stages: list, added: Tensor | None) -> Tensor:
    program = program_of(stages)
    trained = torch.is_grad_enabled()
    assert functional.why_not_epilogue(z, program, trained) is None
    return run_program(z, program, added)


def results(fn, program: str, tensors: dict, norm: nn.Module, alpha: float, grad: Tensor | None) -> dict:
    """Result, gradients, and the norm's buffers."""
    norm = copy.deepcopy(norm).to(
        tensors["z"].dtype if tensors["z"].dtype == torch.float64 else torch.float32
    )
    leaves = {
        k: t.detach().clone(memory_format=torch.preserve_format).requires_grad_(grad is not None)
        for k, t in tensors.items()
    }
    with torch.set_grad_enabled(grad is not None):
        out = fn(leaves["z"], stages_of(program, norm, alpha), leaves.get("added"))
    found = {"out": out.detach()}
    if grad is not None:
        wanted = leaves | {f"norm.{k}": p for k, p in norm.named_parameters() if "n" in program}
        grads = torch.autograd.grad(out, list(wanted.values()), grad.to(out.dtype))
        found |= {f"grad.{k}": g for k, g in zip(wanted, grads, strict=True)}
    return found | {f"norm.{k}": b.clone() for k, b in norm.named_buffers() if b.is_floating_point()}


def inside(shape, memory_format: bool) -> Tensor:
    x = torch.randn(shape)
    if memory_format and len(shape) > 3:
        x = x.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)])
    return x


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_epilogue_as_torch(program, name, last, training):
    shape = SHAPES[name]
    z, added = inside(shape, last) + 0.5, inside(shape, last)
    tensors = {"z": z} | ({"added": added} if "+" in program else {})
    norm, alpha = norm_of(shape, training), 0.75 if training else 1.0
    grad = torch.randn(shape)
    true = {k: t.double() for k, t in tensors.items()}
    exact = results(eager, program, true, norm, alpha, grad.double())
    torchs = results(eager, program, tensors, norm, alpha, grad)
    found = results(ours, program, tensors, norm, alpha, grad)
    assert found["out"].stride() == z.stride() or z.is_contiguous()
    assert found.keys() == exact.keys()
    for k in exact:
        if shape[1] == 1 and k.startswith("grad.norm"):  # one sum, which may be the difference of large terms
            torch.testing.assert_close(found[k].double(), exact[k], rtol=1e-4, atol=1e-5)
        else:
            assert_close_as_torch(found[k], torchs[k], exact[k])


@pytest.mark.parametrize("program", ["n", "n+r", "rn", "ln", "n+"])
@pytest.mark.parametrize("name", ["image", "channels", "rows"])
def test_bfloat16(program, name):
    shape = SHAPES[name]
    tensors = {"z": torch.randn(shape).bfloat16()}
    if "+" in program:
        tensors["added"] = torch.randn(shape).bfloat16()
    norm, grad = norm_of(shape, True), torch.randn(shape).bfloat16()
    exact = results(eager, program, {k: t.double() for k, t in tensors.items()}, norm, 1.0, grad.double())
    torchs = results(eager, program, tensors, norm, 1.0, grad)
    found = results(ours, program, tensors, norm, 1.0, grad)
    for k in exact:
        assert_close_as_torch(found[k], torchs[k], exact[k])


@pytest.mark.parametrize("program", ["n+r", "+r", "rn", "n+h", "+l", "nr"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_specials(program, last, training):
    """NaN, infinities and zeros come out where PyTorch puts them, forward and backward."""
    shape = (2, 6, 7, 19)
    z, added, grad = inside(shape, last), inside(shape, last), torch.randn(shape)
    for t, values in ((z, (float("nan"), float("inf"), 0.0)), (added, (float("nan"), -float("inf")))):
        for value in values:
            t[tuple(torch.randint(size, ()) for size in (2, 3, 7, 19))] = value
    z[:, 4] = 0
    added[:, 4] = 0
    grad[0, 4, 0, :2] = torch.tensor([float("inf"), float("nan")])
    tensors = {"z": z} | ({"added": added} if "+" in program else {})
    norm = norm_of(shape, training)
    norm.bias.data[4] = 0
    torchs = results(eager, program, tensors, norm, 1.0, grad)
    found = results(ours, program, tensors, norm, 1.0, grad)
    for k in torchs:
        a, b = found[k], torchs[k]
        assert torch.equal(a.isnan(), b.isnan()), k
        assert torch.equal(a.isinf(), b.isinf()), k
        assert torch.equal(a[a.isinf()], b[b.isinf()]), k


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("program", [program for program in PROGRAMS if "+" in program])
def test_a_gradient_of_the_added_tensor_alone(program, training):
    shape = (2, 6, 5, 4)
    z, added, grad = torch.randn(shape), torch.randn(shape, requires_grad=True), torch.randn(shape)
    norm = norm_of(shape, training).requires_grad_(False)
    found = [
        torch.autograd.grad(fn(z, stages_of(program, copy.deepcopy(norm), 0.5), added), added, grad)
        for fn in (eager, ours)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("program", ["n", "+", "n+r", "l"])
def test_gradients_of_zero(program, create_graph):
    """PyTorch's gradient of ``sgn`` is a tensor without memory; an op gets an expanded number for it."""
    shape = (2, 6, 5, 4)
    for z in (torch.randn(shape), inside(shape, True)):
        leaves = [z.requires_grad_(), *([torch.randn(shape, requires_grad=True)] if "+" in program else [])]
        norm = norm_of(shape, True)
        out = ours(z, stages_of(program, norm, 0.5), leaves[1] if "+" in program else None)
        for grad in torch.autograd.grad(out.sgn().sum(), leaves, create_graph=create_graph):
            assert torch.equal(grad, torch.zeros(shape))


@pytest.mark.parametrize("program", ["n+r", "+l", "rn", "+", "tn+h", "n"])
@pytest.mark.parametrize("last", [False, True])
def test_second_derivatives(program, last):
    shape, results = (3, 5, 4, 3), []
    z, added, grad, other = inside(shape, last), inside(shape, last), torch.randn(shape), torch.randn(shape)
    norm = norm_of(shape, True)
    for fn in (eager, ours):
        leaves = [t.clone().requires_grad_() for t in (z, added)]
        twin = copy.deepcopy(norm)
        out = fn(leaves[0], stages_of(program, twin, 0.5), leaves[1] if "+" in program else None)
        given = grad.clone().requires_grad_()
        wanted = [
            leaves[0],
            *([leaves[1]] if "+" in program else []),
            *([twin.weight] if "n" in program else []),
        ]
        first = torch.autograd.grad(out, wanted, given, create_graph=True)
        second = torch.autograd.grad((first[0] * other).sum(), [given, *wanted], allow_unused=True)
        results.append([*first, *second])
    for a, b in zip(*results, strict=True):
        if a is None or b is None:
            assert (a is None or a.abs().max() == 0) and (b is None or b.abs().max() == 0)
        else:
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("program", ["+r", "+l", "n+r"])
@pytest.mark.parametrize("needed", ["z", "added", "both"])
def test_second_derivatives_of_zero_are_there_where_pytorchs_are(program, needed):
    """Hooks are called with them, and optimizers take a gradient of zero otherwise than none."""
    tensors, found = [torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)], []
    norm = norm_of(tensors[0].shape, False).requires_grad_(False)
    for fn in (eager, ours):
        z, added = (
            t.clone().requires_grad_(needed in (name, "both"))
            for name, t in zip(("z", "added"), tensors, strict=True)
        )
        wanted = [t for t in (z, added) if t.requires_grad]
        first = torch.autograd.grad(
            fn(z, stages_of(program, norm, 0.5), added).sum(), wanted, create_graph=True
        )
        found.append([torch.autograd.grad(t.sum(), wanted, retain_graph=True) for t in first])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (3, 4, 0, 5), (0, 4)])
def test_empty(shape):
    for program in ("+r", "n+r", "r"):
        norm = norm_of(shape, False)
        z, added = torch.randn(shape, requires_grad=True), torch.randn(shape)
        out = ours(z, stages_of(program, norm, 1.0), added if "+" in program else None)
        assert out.shape == shape
        out.sum().backward()
        assert z.grad.shape == shape


def test_keeps_bits_of_a_sum():
    """Behind a sum one bit per element is kept for the backward, and neither the sum nor the added tensor."""
    z, added = torch.randn(4, 64, 16, 16, requires_grad=True), torch.randn(4, 64, 16, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(z, [Sum(), nn.ReLU()], added)
    assert sum(t.numel() * t.element_size() for t in kept) == z.numel() / 8


def test_same_bits_for_every_number_of_threads():
    torch.manual_seed(1)
    threads, found = torch.get_num_threads(), []
    for last, count in itertools.product((False, True), (1, 2, 3)):
        torch.set_num_threads(count)
        try:
            torch.manual_seed(2)
            tensors = {"z": inside((5, 24, 30, 31), last), "added": inside((5, 24, 30, 31), last)}
            grad = torch.randn(5, 24, 30, 31)
            found.append((last, results(ours, "n+r", tensors, norm_of((5, 24), True), 1.0, grad)))
        except RuntimeError:
            raise
        finally:
            torch.set_num_threads(threads)
    for last, one in found:
        for other_last, other in found:
            if last == other_last:
                assert all(torch.equal(one[k], other[k]) for k in one)


def test_fake_kernel():
    z = torch.randn(3, 5, 9, 11)
    gamma, beta = torch.randn(5), torch.randn(5)
    for map in (z, z.contiguous(memory_format=torch.channels_last), z[:, :, 0, 0].contiguous()):
        args = (
            map,
            gamma,
            beta,
            None,
            None,
            None,
            torch.zeros_like(map),
            [0, 1, 3],
            [0.0] * 2 + [1.0] + [0.0] * 3,
            1e-5,
            True,
        )
        torch.library.opcheck(op.forward_op, args, test_utils=("test_schema", "test_faketensor"))
        out, passed, stats = op.forward_op(*args)
        torch.library.opcheck(
            op.backward_op, (torch.ones_like(out), map, passed, stats, *args[7:10], False, True, True),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("stages", "keep", "why"),
    [
        ([0, 0], False, "one norm"), ([1, 0], False, "one activation may follow"), ([1, 3, 3], False, "one"),
        ([1, 7], True, "two slopes"), ([3] * 5, False, "too long"),
    ],
)  # fmt: skip
def test_programs_that_are_refused(stages, keep, why):
    assert why in op.why_not(stages, keep)
    z = torch.randn(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match="epilogue"):
        op.forward_op(
            z,
            None,
            None,
            None,
            None,
            None,
            z if 1 in stages else None,
            stages,
            [0.0] * 2 * len(stages),
            1e-5,
            keep,
        )
