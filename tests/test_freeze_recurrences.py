"""Recurrent layers of frozen models: layers whose steps overlap, and loops that become one layer."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers import assert_close_as_torch, needs_extension
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import cnnlstm_fast as cf
from cnnlstm_fast.freeze import program

pytestmark = needs_extension


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture
def on_threads():
    """Calls a function with torch at each of several numbers of threads."""
    before = torch.get_num_threads()

    def run(function):
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            function()

    yield run
    torch.set_num_threads(before)


class Layers(nn.Module):
    """One layer behind the other, whose states are results too."""

    def __init__(self, kind: type[nn.RNNBase], sizes: list[int], batch_first: bool, bias: bool = True):
        super().__init__()
        pairs = itertools.pairwise(sizes)
        self.layers = nn.ModuleList(kind(i, h, batch_first=batch_first, bias=bias) for i, h in pairs)

    def forward(self, x: Tensor, *states: Tensor):
        found = []
        for i, layer in enumerate(self.layers):
            state = None
            if states and isinstance(layer, nn.LSTM):
                state = (states[2 * i], states[2 * i + 1])
            elif states:
                state = states[2 * i]
            x, last = layer(x, state)
            found += last if isinstance(last, tuple) else [last]
        return x, found


@pytest.mark.some(3)
@dtypes
@pytest.mark.parametrize(("kind", "batch_first"), [(nn.LSTM, False), (nn.GRU, True)])
@pytest.mark.parametrize(("batch", "with_state"), [(1, False), (6, True)])
@torch.no_grad()
def test_layers_whose_steps_overlap(on_threads, kind, batch_first, batch, with_state, dtype, monkeypatch):
    """The bits of one layer after the other, also at steps that no chunk divides."""
    sizes = [70, 131, 160, 140] if kind is nn.LSTM else [9, 131, 129]
    model = Layers(kind, sizes, batch_first).eval().to(dtype)
    x = torch.randn(batch, 37, sizes[0])
    states = [torch.randn(1, batch, h) for h in sizes[1:] for _ in range(2)] if with_state else []
    given = (x if batch_first else x.transpose(0, 1).contiguous(), *states)
    inputs = tuple(t.to(dtype) for t in given)
    states = inputs[1:]
    together = cf.freeze(model, *inputs)
    monkeypatch.setattr(program, "join_layers", lambda nodes, later: list(nodes))
    apart = copy.deepcopy(together)
    assert together._versions, together.why_not
    nans = inputs[0].clone()
    nans.view(-1)[sizes[0] * 7 :: 9001] = float("nan")
    true, _ = copy.deepcopy(model).double()(*(t.double() for t in inputs))

    def compare():
        for more in (inputs, (nans, *states)):
            (out, last), (expected, expected_last) = together(*more), apart(*more)
            for a, b in zip([out, *last], [expected, *expected_last], strict=True):
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
                assert a.stride() == b.stride()
        assert_close_as_torch(together(*inputs)[0], model(*inputs)[0], true, "layers")

    on_threads(compare)


class Loop(nn.Module):
    """A layer, or two, stepped in Python: (T, B, I) -> what its steps give, in one of several ways."""

    def __init__(self, kind: type[nn.RNNBase], way: str, batch_first: bool = False, layers: int = 1):
        super().__init__()
        self.way, self.kind = way, kind
        self.rnn = nn.ModuleList(
            kind(13 if i == 0 else 19, 19, batch_first=batch_first) for i in range(layers)
        )
        self.head = nn.Linear(19, 5)

    def step(self, x: Tensor, states: list, keep: Tensor | None):
        for i, layer in enumerate(self.rnn):
            state = states[i]
            if keep is not None and isinstance(state, tuple):
                state = (keep * state[0], state[1] * keep)
            elif keep is not None and state is not None:
                state = keep * state
            x, states[i] = layer(x, state)
        return x

    def forward(self, x: Tensor, keep: Tensor):
        batch, axis = x.shape[1], 1 if self.rnn[0].batch_first else 0
        zeros = x.new_zeros(1, batch, 19)
        lstm, scaled = self.kind is nn.LSTM, "keep" in self.way
        states = [(zeros, zeros) if lstm else zeros for _ in self.rnn] if scaled else [None for _ in self.rnn]
        steps, keeps = [], (1.0 - keep).unbind()
        for t, one in enumerate(x):
            factor = keeps[t].view(1, -1, 1) if scaled else None
            if "late" in self.way and t == 0:
                factor = None
            y = self.step(one.unsqueeze(axis), states, factor)
            if "last state" in self.way:
                y = (states[-1][0] if lstm else states[-1]).transpose(0, axis)
            steps.append(y)
        if "stack" in self.way:
            y = torch.stack([self.head(y.squeeze(axis)) for y in steps], 1)
        elif "one" in self.way:
            y = self.head(steps[3])
        else:
            y = self.head(torch.cat(steps, axis))
        return y, states[-1]


WAYS = ["keep", "keep late", "cat", "stack", "keep last state", "one"]


@pytest.mark.some(4)
@dtypes
@pytest.mark.parametrize(
    ("way", "kind"), [(way, (nn.LSTM, nn.GRU)[i % 3 == 1]) for i, way in enumerate(WAYS)]
)
@torch.no_grad()
def test_loops_over_steps(on_threads, kind, way, dtype):
    batch_first, layers = "stack" in way or way == "one", 2 if way in ("keep", "cat") else 1
    model = Loop(kind, way, batch_first, layers).eval().to(dtype)
    frozen = cf.freeze(model, torch.randn(6, 2, 13).to(dtype), torch.rand(6, 2).to(dtype))
    assert frozen._versions, frozen.why_not
    recurrent = [n for n in frozen._versions[0].data["nodes"] if n["op"] == "recurrent"]
    assert len(recurrent) == layers
    assert all((n["keep"] is not None) == ("keep" in way) for n in recurrent)
    exact = copy.deepcopy(model).double()

    def compare():
        for batch in (1, 2, 5, 17):
            x, keep = (
                torch.randn(6, batch, 13).to(dtype),
                torch.rand(6, batch).mul(3).floor().div(2).to(dtype),
            )
            assert_same(frozen(x, keep), model(x, keep), exact(x.double(), keep.double()), way)
            if dtype is torch.bfloat16:  # where PyTorch's own spreads it
                continue
            x[4, 0, 3] = float("inf")
            assert_same(frozen(x, keep), model(x, keep), exact(x.double(), keep.double()), way)

    on_threads(compare)
    assert len(frozen._versions) == 1


def assert_same(got, plain, exact, what):
    for a, b, c in zip(*map(pytree.tree_leaves, (got, plain, exact)), strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a.isnan(), b.isnan())
        assert_close_as_torch(a.nan_to_num(), b.nan_to_num(), c.nan_to_num(), what)


class FedBack(nn.Module):
    """A step reads what the step before gave: no loop to roll."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(7, 11), nn.Linear(11, 7)

    def forward(self, x: Tensor):
        state, y, steps = None, x, []
        for _ in range(4):
            y, state = self.rnn(y, state)
            y = self.head(y)
            steps.append(y)
        return torch.cat(steps)


class CellRead(nn.Module):
    """The cell between steps is a result: what a layer gives has none of them."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(7, 11)

    def forward(self, x: Tensor):
        state, cells = None, []
        for one in x.unbind():
            _, state = self.rnn(one.unsqueeze(0), state)
            cells.append(state[1])
        return torch.cat(cells)


@pytest.mark.parametrize("kind", [FedBack, CellRead])
@torch.no_grad()
def test_loops_that_stay(kind):
    model = kind().eval()
    frozen = cf.freeze(model, torch.randn(1 if kind is FedBack else 4, 3, 7))
    nodes = frozen._versions[0].data["nodes"]
    assert sum(n["op"] == "recurrent" for n in nodes) == 4
    for batch in (1, 6):
        x = torch.randn(1 if kind is FedBack else 4, batch, 7)
        assert_close_as_torch(frozen(x), model(x), copy.deepcopy(model).double()(x.double()), kind.__name__)
