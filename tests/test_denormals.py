"""Denormal numbers: none comes out of a kernel, and the mode of every thread is as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forked import run_forked
from helpers import needs_extension
from torch import Tensor, nn

import cnnlstm_fast as cf

pytestmark = needs_extension

LEAST = 2.0**-126  # the least normal number


def denormals(*tensors: Tensor) -> int:
    return sum(int(((t != 0) & (t.abs() < LEAST)).sum()) for t in tensors)


def flushed(t: Tensor) -> Tensor:
    return torch.where(t.abs() < LEAST, 0.0, t)


@pytest.mark.instruction_sets
@pytest.mark.parametrize("c", [1, 16])
def test_products_around_the_least_normal_number(c):
    """Exact products, of one tap: those below it are zero, all others have every bit."""
    x = torch.zeros(3, c, 24, 24)
    x[:, 0] = torch.randint(-(1 << 22), 1 << 22, (3, 24, 24)) * 2.0**-82
    weight = torch.zeros(16, c, 1, 1)
    weight[:, 0, 0, 0] = 2.0**-65 * (1 << torch.arange(16))
    exact = (x[:, :1].double() * weight[:, 0].double()).float()
    assert denormals(exact) > 100 and (exact.abs() >= LEAST).sum() > 100
    with torch.no_grad():
        y = cf.functional.conv_block(x, weight, activation=None, plan="direct")
    assert torch.equal(y, flushed(exact))


@pytest.mark.instruction_sets
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("loud", [1, 300])
@pytest.mark.parametrize("hidden", [24, 300])
def test_gradients_through_time(kind, loud, hidden):
    """Gradients that vanish, and gates that saturate: PyTorch's are full of denormals, ours have none."""
    layer, twin = getattr(cf, kind)(8, hidden), getattr(nn, kind)(8, hidden)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(0.5)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(196, 4, 8) * loud
    found = []
    for module in (layer, twin):
        inputs = x.clone().requires_grad_()
        out, state = module(inputs)
        grads = torch.autograd.grad(out[-1].sum(), [inputs, *module.parameters()])
        found.append([out, *(state if kind == "LSTM" else [state]), *grads])
    mine, theirs = found
    assert denormals(*theirs) > 0
    assert denormals(*mine) == 0
    steps = mine[-len(list(layer.parameters())) - 1].abs().amax((1, 2))
    assert steps[-1] > 1e-6 and steps[0] == 0


def test_a_step_alone():
    """A stream works on the caller's thread where the weights are few."""
    layer = cf.LSTM(4, 5)
    stream = layer.stream(batch=2)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.weight_ih_l0[10:15, 0] = 2.0**-70  # the cell's input alone
    stream = layer.stream(batch=2)
    assert stream(torch.full((2, 4), 2.0**-70)).eq(0).all()
    assert stream(torch.full((2, 4), 2.0**-20)).gt(0).all()


def test_gradients_of_a_block():
    """What arrives denormal counts as zero, in the maps and in the sums."""
    x = torch.randn(4, 3, 20, 20).requires_grad_()
    weight, bias = torch.randn(16, 3, 3, 3).requires_grad_(), torch.randn(16).requires_grad_()
    for plan in ("direct", "winograd"):
        y = cf.functional.conv_block(
            x, weight, bias, padding=1, activation="relu", pool=nn.MaxPool2d(2), plan=plan
        )
        grad = torch.randn_like(y)
        grad[:2] *= 1e-38
        grads = torch.autograd.grad(y, [x, weight, bias], grad)
        assert denormals(*grads) == 0
        assert all(g.abs().max() > 1e-3 for g in grads)


CALLS = """
import torch, cnnlstm_fast as cf
from torch import nn
{before}
tiny = torch.full((1 << 20,), 1e-40)
kept = tiny * torch.ones(1)
def calls():
    x = torch.randn(4, 8, 40, 40, requires_grad=True)
    conv = nn.Conv2d(8, 32, 3, padding=1)
    for plan in ("direct", "winograd", "chunked"):
        y = cf.functional.conv_block(
            x, conv.weight, conv.bias, padding=1, activation="relu", pool=nn.MaxPool2d(2), plan=plan)
        y.sum().backward()
    block = cf.Sequential(conv, nn.BatchNorm2d(32), nn.ReLU())
    block(x).sum().backward()
    cf.functional.conv_block(torch.randn(2, 32, 81, 60), torch.randn(32, 32, 21, 11), plan="fft")
    for layer in (cf.LSTM(8, 300), cf.GRU(2000, 40), cf.LSTM(8, 40, proj_size=9, bidirectional=True)):
        layer(torch.randn(50, 5, layer.input_size))[0].sum().backward()
    cf.LSTM(8, 40).stream(2)(torch.randn(2, 8))
    cf.LSTM(8, 600).stream(2)(torch.randn(2, 8))
    with_error()
def with_error():
    try:
        torch.ops.cnnlstm_fast.recurrent_stream_step(*(torch.zeros(1),) * 4, None, 0, 1, 1, 0)
    except RuntimeError:
        return
    raise AssertionError
calls()
assert torch.equal(tiny * torch.ones(1), kept), "a thread's mode changed"
print(int(kept.count_nonzero()), kept[0].item() != 0)
"""


@pytest.mark.parametrize(
    "before, mine",
    [("", True), ("torch.set_flush_denormal(True)", False), ("torch.set_flush_denormal(False)", True)],
)
def test_the_mode_of_every_thread_is_as_it_was(before, mine):
    run = run_forked(CALLS.format(before=before))
    assert run.returncode == 0, run.stderr
    kept, first = run.stdout.split()
    assert first == str(mine)
    if mine:
        assert int(kept) == 1 << 20


def test_all_parallel_work_flushes():
    """Nothing goes to torch's threads but by the wrapper that sets the mode."""
    sources = (Path(__file__).parents[1] / "csrc").rglob("*")
    direct = [p.name for p in sources if p.is_file() and "stable::parallel_for" in p.read_text()]
    assert direct == ["threads.h"]
