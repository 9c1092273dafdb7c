"""The plan "fft": convolutions with large kernels, results and all gradients, by the numbers rule."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from field_models import Speech
from helpers import (
    LAYOUTS,
    POOL_2X2,
    SEED,
    STRIDED,
    Block,
    assert_block,
    assert_close_as_torch,
    decided,
    evaluate,
    needs_extension,
    normal_tensors,
    our_block,
    strided,
    torch_block,
    torch_ways,
)
from norms import assert_normed, random_norm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cnnlstm_fast as cf
from cnnlstm_fast.functional import conv_block
from cnnlstm_fast.ops import conv_fft as op
from cnnlstm_fast.ops.conv_block import PLANS, backward_op, forward_op
from cnnlstm_fast.planning import choose
from cnnlstm_fast.spec import BlockSpec

pytestmark = needs_extension
IMAGE = Block(3, 5, (19, 34), 6, (9, 7), padding=(4, 3))

BLOCKS = {
    "image": IMAGE,
    "strided": Block(2, 3, (33, 41), 8, (11, 9), stride=(2, 3), padding=(5, 2)),
    "pooled": replace(IMAGE, pool=POOL_2X2),
    "tall": Block(2, 4, (60, 5), 7, (31, 2), padding=(0, 1), bias=False),
    "signal": Block(2, 6, (150,), 9, (31,), (1,), (15,), (1,)),
    "strided signal": Block(2, 3, (131,), 5, (24,), (4,), (3,), (1,)),
    "one channel": Block(2, 1, (47, 33), 4, (41, 11), stride=(2, 2), padding=(20, 5), activation="hardtanh"),
}
blocks = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)

image_and_signal = pytest.mark.parametrize(
    "block", [BLOCKS["strided"], BLOCKS["signal"]], ids=["image", "signal"]
)


def large_kernel(rng: random.Random) -> Block:
    """A block whose kernel is large along one axis or both, at least 32 results large."""
    while True:
        dims = rng.choice((1, 2, 2))
        kernel = tuple(rng.choice((1, 2, 5, 8, 11, 16, 21)) for _ in range(dims))
        block = Block(
            n=rng.choice((1, 2, 3)),
            c=rng.choice((1, 2, 3, 8, 16, 17)),
            size=tuple(rng.choice((3, 7, 16, 23, 41)) * rng.choice((1, 1, 3)) for _ in range(dims)),
            c_out=rng.choice((4, 5, 16, 19, 32)),
            kernel=kernel,
            stride=tuple(rng.choice((1, 1, 2, 3)) for _ in range(dims)),
            padding=tuple(rng.choice((0, k // 2, k)) for k in kernel),
            dilation=(1,) * dims,
            bias=rng.random() < 0.7,
            activation=rng.choice((None, "relu", "hardtanh", "gelu")),
            pool=rng.choice((None, None, POOL_2X2)) if dims == 2 else None,
        )
        out = block.out_shape()
        if out is None or 0 in out or max(kernel) < 5 or math.prod(out) < 32:
            continue
        if math.prod(out) * math.prod(block.shapes()["weight"][1:]) < 3e7:
            return block


def gradient_for(block: Block, tensors) -> torch.Tensor:
    mask = decided(block, tensors)
    return (torch.randn(mask.shape) + 0.3) * mask


def some(block: Block):
    tensors = normal_tensors(block, torch.float32)
    return tensors, gradient_for(block, tensors)


@pytest.fixture(params=["as it is", "small"])
def work(request, monkeypatch):
    """The work at a time: as it is, and so little that every loop goes round more than once."""
    if request.param == "small":
        monkeypatch.setattr(op, "_WINDOW_BYTES", 2**12)
        monkeypatch.setattr(op, "_SPECTRUM_BYTES", 2**12)


# ---------------------------------------------------------------- numbers


@pytest.mark.instruction_sets
@pytest.mark.parametrize("number", range(30))
def test_random_blocks(number, work):
    block = large_kernel(random.Random(f"{SEED} {number}"))
    torch.set_num_threads(1 + number % 2)
    tensors, grad = some(block)
    assert_block(block, tensors, grad, plan="fft", layout=random.choice(LAYOUTS))


@pytest.mark.parametrize("kernel, parts", [(16, 1), (40, 2)])
def test_a_signal_in_many_windows(kernel, parts, work):
    """The kernel in one part, whose sums run over all windows, and in several."""
    block = Block(2, 64, (400,), 64, (kernel,), (1,), (kernel // 2,), (1,), activation=None, pool=None)
    assert op.tiling((1, 400), (1, kernel), 2, 64, 64, (1, 1, 0, kernel // 2, 1, 1, 1)).parts == parts
    tensors, grad = some(block)
    assert_block(block, tensors, grad, plan="fft")


@blocks
@pytest.mark.parametrize(
    "needs",
    [("x",), ("weight",), ("bias",), ("weight", "bias"), ()],
    ids=lambda needs: " ".join(needs) or "none",
)
def test_only_the_gradients_asked_for(block, needs, work):
    tensors, grad = some(block)
    needs = tuple(n for n in needs if n in tensors)
    assert_block(block, tensors, grad if needs else None, plan="fft", needs=needs)


def _spectrogram(shape):
    return torch.randn(shape).square().add(1e-6).log() + 12  # positive, and far from zero


def _loud_and_quiet(shape):
    return torch.randn(shape) * 10 ** torch.linspace(-3, 3, shape[-1])


VALUES = {
    "ramp": lambda shape: torch.rand(shape) * 20,
    "saturated": lambda shape: torch.rand(shape).mul(60).sub(20).clamp(0, 20),
    "spectrogram": _spectrogram,
    "loud and quiet": _loud_and_quiet,
    "constant": lambda shape: torch.full(shape, 7.3),
    "tiny": lambda shape: torch.randn(shape) * 1e-30,
    "huge": lambda shape: torch.randn(shape) * 1e30,
}


@blocks
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("weights", ["zero mean", "positive"])
def test_inputs_of_all_kinds(block, values, weights):
    tensors, _ = some(replace(block, activation=None))
    tensors["x"] = VALUES[values](tensors["x"].shape)
    weight = torch.randn_like(tensors["weight"])
    tensors["weight"] = (weight if weights == "zero mean" else weight.abs()) / math.sqrt(weight[0].numel())
    block = replace(block, activation=None, pool=None)
    grad = torch.randn(block.out_shape()) + 0.3
    assert_block(block, tensors, grad, plan="fft")


def test_the_matrices_are_a_convolution():
    """In float64 arithmetic their own rounding is all that is left."""
    for hop, taps in ((1, 1), (1, 5), (6, 1), (2, 1), (4, 5), (7, 7), (25, 11)):
        t = op.transforms(hop, taps)
        x, w = torch.randn(hop + taps - 1).double(), torch.randn(taps).double()
        y = t.of_y.double() @ ((t.of_w.double() @ w) * (t.of_x.double() @ x))
        true = F.conv1d(x.view(1, 1, -1), w.view(1, 1, -1)).flatten()
        torch.testing.assert_close(y, true, rtol=1e-6, atol=1e-6)
        assert len(t.of_x) == op.Tiling(False, (1, 1), (0, 0), (1, hop), 1, 1, taps, hop).rows
        assert torch.equal(t.of_x.T, t.of_x_t) and torch.equal(t.of_w.T, t.of_w_t)
        assert torch.equal(t.of_y.T, t.of_y_t)


@image_and_signal
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "weight", "bias", "grad"])
def test_specials(block, value, where):
    """They stand where PyTorch puts them, in the result and in all gradients."""
    block = replace(block, activation=None)
    tensors = normal_tensors(block, torch.float32)
    grad = torch.randn(block.out_shape())
    target = grad if where == "grad" else tensors[where]
    target.view(-1)[random.randrange(target.numel())] = value
    assert_block(block, tensors, grad, plan="fft")


def test_a_special_that_no_tap_meets():
    x, weight = torch.randn(2, 3, 20, 33), torch.randn(4, 3, 7, 7)
    x[:, :, :, -1] = math.nan  # the stride leaves the last column out
    out = conv_block(x, weight, stride=(1, 3), plan="fft")
    assert out.isfinite().all()


def test_overflow_inside_a_transform():
    """Sums of a transform may overflow where the convolution does not."""
    x, weight = torch.full((1, 2, 12, 40), 1e37), torch.zeros(3, 2, 5, 5)
    weight[:, :, 2, 2] = 0.5
    out = conv_block(x, weight, plan="fft")
    assert torch.equal(out, torch.full_like(out, 1e37))


# ---------------------------------------------------------------- memory


@image_and_signal
@pytest.mark.parametrize("how", STRIDED)
@pytest.mark.parametrize("which", ["x", "weight", "grad"])
def test_strided(block, how, which):
    tensors, grad = some(block)
    if which == "grad":
        assert_block(
            block, tensors, grad, plan="fft", our_grad=lambda g: g if how == "expanded" else strided(g, how)
        )
    else:
        tensors[which] = strided(tensors[which], how)
        assert_block(block, tensors, grad, plan="fft")


def test_gradients_have_the_memory_that_the_other_plans_give():
    x = torch.randn(2, 4, 20, 24).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(5, 4, 7, 7, requires_grad=True)
    for plan in ("fft", "direct"):
        of_x, of_weight = torch.autograd.grad(conv_block(x, weight, plan=plan).sum(), (x, weight))
        assert of_x.is_contiguous(memory_format=torch.channels_last) and of_weight.is_contiguous()


@blocks
@pytest.mark.parametrize("layout", ["channels_first", "channels_last", "rows_time_major"])
def test_the_result_is_contiguous_in_its_layout(block, layout):
    tensors = normal_tensors(block, torch.float32)
    ours, other = (our_block(block, **tensors, plan=plan, layout=layout) for plan in ("fft", "direct"))
    assert ours.stride() == other.stride()


class _Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.elements = max(self.elements, found.untyped_storage().nbytes() // 4)
        return found


def test_work_at_a_time_is_bounded():
    """Beside the result, the gradients and the spectra of the weights, whatever the signal's length."""
    weight = torch.randn(16, 16, 1, 33)
    for length in (2000, 200000):
        x = torch.randn(2, 16, 1, length)
        grad = torch.randn(2, 16, 1, length)
        conv = [1, 1, 0, 16, 1, 1, 1]
        with _Largest() as forward:
            op._forward(x, weight, None, conv, torch.empty(2, 1, length, 16))
        with _Largest() as backward:
            op._backward(grad, x, weight, conv, torch.empty_like(x), torch.empty_like(weight))
        assert max(forward.elements, backward.elements) <= max(x.numel(), 2**20)


def test_only_what_a_gradient_reads_is_kept():
    x, weight = torch.randn(2, 4, 20, 24, requires_grad=True), torch.randn(5, 4, 7, 7)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        conv_block(x, weight, activation=None, plan="fft")
        assert [t.shape for t in kept if t.numel()] == [weight.shape]
        kept.clear()
        conv_block(x.detach(), weight.requires_grad_(), activation=None, plan="fft")
        assert [t.shape for t in kept if t.numel()] == [x.shape]


# ---------------------------------------------------------------- whole blocks


@blocks
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("first", [False, True], ids=["all", "first layer"])
def test_norms(block, training, first):
    tensors = normal_tensors(block, torch.float32)
    needs = ("weight", "bias") if first else ("x", "weight", "bias")
    assert_normed(block, tensors, random_norm(block, training), plan="fft", needs=needs)


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_a_frozen_norm(frozen):
    norm = random_norm(IMAGE, False)
    for name in frozen:
        getattr(norm, name).requires_grad_(False)
    assert_normed(IMAGE, normal_tensors(IMAGE, torch.float32), norm, plan="fft")


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(8, 5), (3, 12), (12,)])
def test_padding_by_name(padding, kernel):
    x = torch.randn(2, 3, *(21, 18)[: len(kernel)])
    weight, bias = torch.randn(4, 3, *kernel) / 10, torch.randn(4)
    conv = F.conv1d if len(kernel) == 1 else F.conv2d
    grad = torch.randn(conv(x, weight, padding=padding).shape)

    def run(way, *leaves):
        leaves = [t.detach().requires_grad_() for t in leaves]
        out = way(*leaves)
        return out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))

    ours = run(lambda *t: conv_block(*t, padding=padding, activation=None, plan="fft"), x, weight, bias)
    theirs = run(lambda *t: conv(*t, padding=padding), x, weight, bias)
    true = run(lambda *t: conv(*t, padding=padding), x.double(), weight.double(), bias.double())
    for mine, other, truth in zip(ours, theirs, true, strict=True):
        assert_close_as_torch(mine, other, truth)


def test_unbatched_and_empty():
    x, weight = torch.randn(3, 20, 18), torch.randn(4, 3, 7, 9)
    out = conv_block(x, weight, plan="fft")
    torch.testing.assert_close(out, F.relu(F.conv2d(x, weight)), rtol=1e-4, atol=1e-4)
    empty = torch.randn(0, 3, 20, 18, requires_grad=True)
    out = conv_block(empty, weight.requires_grad_(), plan="fft")
    assert out.shape == (0, 4, 14, 10)
    of_x, of_weight = torch.autograd.grad(out.sum(), (empty, weight))
    assert of_x.shape == empty.shape and not of_weight.any()


# ---------------------------------------------------------------- autograd and compilers


@image_and_signal
def test_double_backward(block):
    """Gradients of a function of gradients, against float64."""

    def second(way, tensors, dtype):
        leaves = {k: t.detach().to(dtype).requires_grad_() for k, t in tensors.items()}
        first = torch.autograd.grad(way(**leaves).square().sum(), list(leaves.values()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()))

    block = replace(block, activation=None)
    tensors = normal_tensors(block, torch.float32)
    ours = second(lambda **t: our_block(block, **t, plan="fft"), tensors, torch.float32)
    theirs, true = (
        second(lambda **t: torch_block(block, **t), tensors, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for mine, other, truth in zip(ours, theirs, true, strict=True):
        assert_close_as_torch(mine, other, truth)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    torch._dynamo.reset()
    block = BLOCKS["strided"]
    run = torch.compile(
        lambda x, weight, bias: our_block(block, x, weight, bias, plan="fft"),
        fullgraph=True, backend="aot_eager", dynamic=dynamic,
    )  # fmt: skip
    for n in (2, 3):
        case = replace(block, n=n)
        tensors, grad = some(case)
        ours = evaluate(run, tensors, grad)
        ways, true = torch_ways(case, tensors, grad)
        for name in ours:
            assert_close_as_torch(ours[name], [way[name] for way in ways], true[name], name)


def test_exported():
    class Front(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, (9, 7))

        def forward(self, x):
            return conv_block(x, self.conv.weight, self.conv.bias, plan="fft")

    model, x = Front(), torch.randn(2, 3, 30, 28)
    exported = torch.export.export(model, (x,))
    (node,) = [node for node in exported.graph.nodes if "conv_block" in str(node.target)]
    assert PLANS["fft"] in node.args
    torch.testing.assert_close(exported.module()(x), model(x))


@image_and_signal
def test_opcheck(block):
    tensors = {
        k: t if t.dim() != 3 else t.unsqueeze(2) for k, t in normal_tensors(block, torch.float32).items()
    }
    pairs = [(1, *values)[-2:] if block.rank == 3 else values for values in (block.stride, block.padding)]
    conv = [*pairs[0], *((0, *block.padding)[-2:]), 1, 1, 1]
    for order in ([0, 1, 2, 3], [3, 0, 2, 1]):
        args = conv, 1, [], [], order, PLANS["fft"]
        forward = tensors["x"], tensors["weight"], tensors.get("bias"), *args, True
        torch.library.opcheck(forward_op, forward)
        out, codes, _ = forward_op(*forward)
        backward = torch.randn_like(out), tensors["x"], tensors["weight"], codes, *args
        for needs in ((True, True, True), (True, False, False), (False, True, True)):
            torch.library.opcheck(backward_op, (*backward, *needs))


def test_transforms_are_wrong_calls_or_right():
    """The op of the transforms refuses what does not fit, and so never reads or writes out of bounds."""
    x, matrix, out = torch.randn(2, 3, 4, 5, 2, 7), torch.randn(5, 6), torch.empty(2, 3, 4, 6, 2, 7)
    op.transform_op(x, matrix, out, False)
    true = torch.einsum("nhwkpc,km->nhwmpc", x.double(), matrix.double())
    assert_close_as_torch(out, torch.einsum("nhwkpc,km->nhwmpc", x, matrix), true)
    op.transform_op(x, matrix, out, True)
    assert_close_as_torch(out, 2 * torch.einsum("nhwkpc,km->nhwmpc", x, matrix), 2 * true)
    for wrong in (
        (x[0], matrix, out),
        (x, matrix[:4], out),
        (x, matrix[:, :5], out),
        (x[:1], matrix, out),
        (x[..., :6], matrix, out),
        (x, matrix.T.contiguous().T, out),
        (x.double(), matrix, out),
        (x.transpose(4, 5).contiguous().transpose(4, 5), matrix, out),
    ):
        with pytest.raises(RuntimeError, match="transform_windows"):
            op.transform_op(*wrong, False)


@pytest.mark.parametrize(
    "places, rows, c_out, taps, channels",
    [(1, 1, 1, 1, 1), (7, 3, 5, 4, 19), (40, 5, 33, 1, 70), (2500, 2, 6, 3, 17)],
)
def test_products_of_spectra(places, rows, c_out, taps, channels):
    grad = torch.randn(rows, places, c_out + 3).transpose(0, 1)[..., :c_out]
    x = torch.randn(places + taps - 1, rows, channels + 2)[..., 2:]
    before = torch.randn(rows, c_out, 2 * taps, channels)
    out = before.clone()
    op.products_op(grad, x, out[:, :, ::2])
    windows = x.unfold(0, taps, 1)  # (places, rows, channels, taps)
    true = before[:, :, ::2] + torch.einsum("tro,trck->rokc", grad.double(), windows.double())
    assert_close_as_torch(
        out[:, :, ::2], before[:, :, ::2] + torch.einsum("tro,trck->rokc", grad, windows), true
    )
    assert torch.equal(out[:, :, 1::2], before[:, :, 1::2])


def test_products_of_spectra_are_wrong_calls_or_right():
    grad, x, out = torch.randn(6, 2, 3), torch.randn(9, 2, 5), torch.zeros(2, 3, 4, 5)
    op.products_op(grad, x, out)
    for wrong in (
        (grad[0], x, out),
        (grad[:5], x, out),
        (grad[:, :1], x, out),
        (grad, x[..., :4], out),
        (grad.transpose(1, 2).contiguous().transpose(1, 2), x, out),
        (grad, x, out[..., :1].expand(2, 3, 4, 5)),
        (grad, x.double(), out),
    ):
        with pytest.raises(RuntimeError, match="add_products"):
            op.products_op(*wrong)


def test_spectra_are_new_memory_or_a_wrong_call():
    like = torch.randn(2, 3)
    first, second = (op.new_op(like, [1200, 1100]).fill_(i) for i in range(2))  # more than 4 MiB
    assert first.shape == (1200, 1100) and first.is_contiguous()
    assert first.unique() == 0 and second.unique() == 1
    for wrong in ((like, [3, -1]), (like, []), (like.double(), [3]), (like, [2**30, 2**30, 2**30])):
        with pytest.raises(RuntimeError, match="new_spectra"):
            op.new_op(*wrong)


def test_a_call_under_inference_mode_leaves_nothing_that_training_cannot_use():
    op.transforms.cache_clear()
    x, weight = torch.randn(1, 2, 16, 17), torch.randn(3, 2, 5, 7)
    with torch.inference_mode():
        conv_block(x, weight, plan="fft")
    conv_block(x, weight.requires_grad_(), plan="fft").sum().backward()
    assert weight.grad.isfinite().all()


# ---------------------------------------------------------------- the choice


def _planned(shape, weight_shape, stride=(1, 1), padding=(0, 0), dtype=torch.float32, **spec) -> str:
    spec = BlockSpec(stride=stride, padding=padding, **spec)
    x, weight = torch.empty(shape, dtype=dtype), torch.empty(weight_shape, dtype=dtype)
    return choose.choose("auto", spec, x, weight, None)[0]


@pytest.mark.usefixtures("known_rates")
def test_large_kernels_are_chosen():
    assert _planned((4, 32, 81, 200), (32, 32, 21, 11), (2, 1), (10, 5)) == "fft"
    assert _planned((4, 64, 56, 56), (64, 64, 9, 9), padding=(4, 4)) == "fft"
    assert _planned((4, 64, 1, 2000), (64, 64, 1, 65), padding=(0, 32)) == "fft"


@pytest.mark.parametrize(
    "call",
    [
        dict(shape=(4, 64, 56, 56), weight_shape=(64, 64, 3, 3)),
        dict(shape=(4, 1, 161, 400), weight_shape=(32, 1, 41, 11), stride=(2, 2), padding=(20, 5)),
        dict(shape=(4, 64, 56, 56), weight_shape=(64, 64, 9, 9), dtype=torch.bfloat16),
        dict(shape=(4, 64, 56, 56), weight_shape=(64, 32, 9, 9), groups=2),
        dict(shape=(4, 64, 56, 56), weight_shape=(64, 64, 9, 9), dilation=(2, 2)),
        dict(shape=(1, 64, 20, 20), weight_shape=(64, 64, 9, 9)),
        dict(shape=(4, 1, 1, 16000), weight_shape=(64, 1, 1, 80), stride=(1, 4)),
        dict(shape=(8, 16, 1, 2000), weight_shape=(32, 16, 1, 50), padding=(0, 25)),
    ],
    ids=[
        "small kernel",
        "one channel",
        "bfloat16",
        "groups",
        "dilation",
        "small map",
        "raw waveform",
        "signal",
    ],
)
@pytest.mark.usefixtures("known_rates")
def test_others_are_not(call):
    assert _planned(**call) != "fft"


@pytest.mark.usefixtures("known_rates")
def test_explain_names_it():
    front = cf.accelerate(Speech(hidden=8, layers=1).conv).eval()
    with torch.no_grad():
        report = cf.explain(front, torch.rand(4, 1, 161, 400))
    stage, *_ = [s for s in report.stages if s.plan == "fft"]
    assert " by fft, " in stage.reason


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (dict(x=torch.ones(1, 4, 9, 9), weight=torch.ones(4, 2, 3, 3), groups=2), "groups"),
        (dict(x=torch.ones(1, 4, 9, 9), weight=torch.ones(4, 4, 3, 3), dilation=2), "dilation"),
        (dict(x=torch.ones(1, 4, 9, 9).bfloat16(), weight=torch.ones(4, 4, 3, 3).bfloat16()), "bfloat16"),
    ],
    ids=["groups", "dilation", "bfloat16"],
)
def test_what_it_does_not_take(call, reason):
    with pytest.raises(ValueError, match=f'plan="fft" cannot run here: .*{reason}.*plan="auto"'):
        conv_block(**call, plan="fft")


def test_autocast_is_left_to_the_others():
    x, weight = torch.randn(4, 32, 48, 48), torch.randn(32, 32, 11, 11)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv_block(x, weight).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="bfloat16"):
            conv_block(x, weight, plan="fft")


# ---------------------------------------------------------------- determinism


def test_the_same_bits_twice():
    block = replace(BLOCKS["strided"], n=5)
    tensors, grad = some(block)

    def run():
        return evaluate(lambda **t: our_block(block, **t, plan="fft"), tensors, grad)

    first, second = run(), run()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_threads_and_neighbours_change_little():
    x, weight = torch.randn(4, 16, 30, 50), torch.randn(16, 16, 9, 9) / 36
    whole = conv_block(x, weight, activation=None, plan="fft")
    torch.set_num_threads(1)
    for of in (slice(4), slice(2, 3)):
        other = conv_block(x[of], weight, activation=None, plan="fft")
        assert (other - whole[of]).norm() <= 1e-6 * whole[of].norm()


def test_a_loud_neighbour_is_not_heard():
    x, weight = torch.randn(3, 4, 30, 50), torch.randn(5, 4, 9, 9) / 18
    alone = conv_block(x[1:2], weight, activation=None, plan="fft")
    x[::2] *= 1e6
    beside = conv_block(x, weight, activation=None, plan="fft")[1:2]
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- errors on their way


@pytest.mark.parametrize("loud", [30.0, 1e3, 1e6], ids="{:g}".format)
@pytest.mark.parametrize("where", ["row", "rows", "column", "place", "one image"])
@pytest.mark.parametrize("axis", ["tall", "wide"])
def test_loud_places_beside_quiet_ones(loud, where, axis):
    """Clipped, so that nothing but the quiet ones' results counts."""
    kernel = (21, 5) if axis == "tall" else (5, 21)
    block = Block(2, 16, (50, 60), 16, kernel, padding=(2, 2), activation="hardtanh", bias=False)
    tensors = normal_tensors(block, torch.float32)
    x = tensors["x"].abs_()
    rows = {"row": x[:, :, 25], "rows": x[:, :, :25]}
    part = (rows | {"column": x[..., 31], "place": x[1, 3, 20, 33], "one image": x[1]})[where]
    part.mul_(loud)
    assert_block(block, tensors, gradient_for(block, tensors), plan="fft")


def test_an_uneven_input_is_the_librarys_and_explain_says_so():
    model = cf.Sequential(nn.Conv2d(32, 32, (21, 11), padding=(10, 5)), nn.Hardtanh(0, 20))
    x = torch.rand(1, 32, 81, 100)
    with torch.no_grad():
        assert cf.explain(model, x).stages[1].plan == "fft"
        x[:, :, 50:] = 0  # silence is no quiet place
        assert cf.explain(model, x).stages[1].plan == "fft"
        x[:, :, 20] = 1e4
        stage = cf.explain(model, x).stages[1]
    assert stage.plan == "chunked" and "quiet positions" in stage.reason
