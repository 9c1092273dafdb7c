"""The same bits: run to run, in another process, with other threads, beside other samples; strict mode.

What is promised where: our own kernels (``direct``, the recurrent ones) give the same bits whatever the
number of threads and the batch's other members are; where a library's product or convolution is called
(``chunked``, ``reference``) only the same call gives the same bits. test_numbers.py has single blocks;
here are whole models, forward and backward.
"""

from __future__ import annotations

import hashlib
import random

import pytest
import torch
from forked import run_forked
from helpers import needs_extension
from torch import nn

import cnnlstm_fast as cf
from cnnlstm_fast.functional import conv_block

pytestmark = needs_extension


class Direct(nn.Module):
    """A block by our own convolution, then our own LSTM."""

    def __init__(self, kind="LSTM"):
        super().__init__()
        self.conv = nn.Conv2d(3, 20, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.rnn = getattr(cf, kind)(20 * 6, 24, batch_first=True, bidirectional=True)
        self.kind = kind.lower()

    def forward(self, x):
        y = conv_block(
            x, self.conv.weight, self.conv.bias, padding=1, pool=self.pool, layout="columns", plan="direct"
        )
        function = getattr(cf.functional, self.kind)
        out, _ = function(
            y, None, list(self.rnn.parameters()), batch_first=True, bidirectional=True, plan="fused"
        )
        return out


MODELS = {
    "direct LSTM": Direct,
    "direct GRU": lambda: Direct("GRU"),
    "simple": lambda: cf.CNN_LSTM_Simple(3, 24, 2, 5),
    "1d": lambda: cf.CNN_LSTM_1DConv(3, 24, 2, 5),
    "distributed": lambda: cf.CNN_LSTM_TimeDistributed(3, 24, 2, 5, image_size=(12, 14)),
    "sequential": lambda: cf.Sequential(
        nn.Conv2d(3, 33, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(33, 17, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
    ),
}
OWN = ("direct LSTM", "direct GRU")


def case(name: str):
    model = MODELS[name]()
    x = torch.randn(5, 4, 3, 12, 14) if name == "distributed" else torch.randn(5, 3, 12, 14)
    return model, x


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The result and all gradients of one training step."""
    x = x.clone().requires_grad_()
    out = model(x)
    slope = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, [x, *model.parameters()], slope)]


@pytest.mark.parametrize("name", MODELS)
def test_run_to_run(name):
    """Repeated, and among other calls that leave other things in scratch memory and caches."""
    model, x = case(name)
    first = step(model, x)
    for _ in range(3):
        other, y = case(random.choice(list(MODELS)))
        step(other, y)
        assert all(map(torch.equal, step(model, x), first))


@pytest.mark.parametrize("name", MODELS)
def test_strict_mode_takes_everything(name):
    """``torch.use_deterministic_algorithms(True)`` raises for nothing, and the bits are those without it."""
    model, x = case(name)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    free = step(model, x)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert all(map(torch.equal, step(model, x), free))


@pytest.mark.parametrize("name", OWN)
def test_threads_change_no_bit(name):
    """Of the result and of the input's gradient; of the parameters' gradients neither, as they are summed in
    a fixed number of slices."""
    model, x = case(name)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(step(model, x))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OWN)
def test_neighbours_change_no_bit(name):
    """A sample alone, in another place, and beside NaNs, infinities and zeros."""
    model, x = case(name)
    with torch.no_grad():
        whole = model(x)
        for i in range(len(x)):
            assert torch.equal(model(x[i : i + 1])[0], whole[i])
            for fill in (float("nan"), float("inf"), 0.0):
                beside = torch.full_like(x, fill)
                at = random.randrange(len(x))
                beside[at] = x[i]
                assert torch.equal(model(beside)[at], whole[i])


@pytest.mark.parametrize("name", [n for n in MODELS if n not in OWN])
def test_threads_and_neighbours_change_little(name):
    """Where a library's product may be called."""
    model, x = case(name)
    with torch.no_grad():
        whole = model(x)
        torch.set_num_threads(1)
        torch.testing.assert_close(model(x), whole, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model(x[2:3])[0], whole[2], rtol=1e-6, atol=1e-6)


_DIGEST = """
import hashlib, sys, torch
sys.path.insert(0, "tests")
import test_determinism as t
torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
for name in t.MODELS:
    torch.manual_seed(7)
    print(name, t.digest(name))
"""


def digest(name: str) -> str:
    model, x = case(name)
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in step(model, x))).hexdigest()


def test_process_to_process():
    """The same bits in a fresh process, whatever was computed here before."""
    ran = run_forked(_DIGEST)
    assert ran.returncode == 0, ran.stderr
    torch.set_num_threads(2)
    here = []
    for name in MODELS:
        torch.manual_seed(7)
        here.append(f"{name} {digest(name)}")
    assert ran.stdout.splitlines() == here
