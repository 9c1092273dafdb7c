"""What the tests of recurrent layers share: random layers, and cells run step by step as their truth."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from helpers import SEED, assert_close_as_torch, needs_extension
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import cnnlstm_fast as cf

PLANS = ("fused", "library", "reference", "auto")
plans = pytest.mark.parametrize(
    "plan", [pytest.param(p, marks=needs_extension if p == "fused" else ()) for p in PLANS]
)
kinds = pytest.mark.parametrize("kind", ["LSTM", "GRU"])


@dataclass(frozen=True)
class Case:
    """A stack of layers and what it is given."""

    kind: str
    inputs: int
    hidden: int
    time: int
    batch: int | None  # None: one sequence without a batch
    layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    bias: bool = True
    proj_size: int = 0
    state: bool = True
    reset: bool = False
    lengths: bool = False

    @property
    def plain(self) -> bool:
        return not (self.reset or self.lengths)

    @property
    def options(self) -> dict:
        """Keywords of the functions."""
        more = {"proj_size": self.proj_size} if self.kind == "LSTM" else {}
        return more | dict(
            num_layers=self.layers,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            bias=self.bias,
        )

    def module(self, kinds=nn, **more) -> nn.RNNBase:
        """As a module of ``kinds``, which has an ``LSTM`` and a ``GRU``."""
        return getattr(kinds, self.kind)(self.inputs, self.hidden, **self.options, **more)

    def draw(self, dtype=torch.float32) -> Drawn:
        """Fresh parameters and data."""
        module = self.module()
        params = {  # of a size at which rounding errors do not grow from step to step
            n: (torch.randn(p.shape) * p.shape[-1] ** -0.5 if p.dim() > 1 else torch.randn(p.shape) / 2).to(
                dtype
            )
            for n, p in module.named_parameters()
        }
        batch = self.batch or 1
        rows = self.layers * (2 if self.bidirectional else 1)
        sizes = {"h_0": self.proj_size or self.hidden, "c_0": self.hidden}
        if self.kind == "GRU":
            del sizes["c_0"]
        state = {n: torch.randn(rows, batch, s).to(dtype) for n, s in sizes.items()} if self.state else {}
        x = torch.randn(self.time, batch, self.inputs).to(dtype)
        reset = torch.rand(self.time, batch) < random.choice((0.1, 0.5)) if self.reset else None
        lengths = torch.randint(0, self.time + 1, (batch,)) if self.lengths else None
        if self.lengths:
            lengths[random.randrange(batch)] = random.randrange(1, self.time + 1)
        return Drawn(self, {"x": x, **state}, params, reset, lengths)


@dataclass(frozen=True)
class Drawn:
    """A case's tensors, time-major and with a batch whatever the case says."""

    case: Case
    data: dict[str, Tensor]  # x, and h_0 and c_0 if there is a state
    params: dict[str, Tensor]
    reset: Tensor | None
    lengths: Tensor | None

    @property
    def leaves(self) -> dict[str, Tensor]:
        return self.data | self.params

    def laid_out(self, x: Tensor) -> Tensor:
        """Something time-major in the shape that the case gives and gets."""
        if self.case.batch is None:
            return x.squeeze(1)
        return x.transpose(0, 1) if self.case.batch_first else x

    def ours(self, *, functions=cf.functional, plan="auto", **leaves: Tensor) -> dict[str, Tensor]:
        """One call of ``functions``' lstm or gru: {out, h_n, c_n}, time-major and with a batch."""
        case, one = self.case, self.case.batch is None
        state = [leaves[n].squeeze(1) if one else leaves[n] for n in ("h_0", "c_0") if n in leaves]
        function = getattr(functions, case.kind.lower())
        out, last = function(
            self.laid_out(leaves["x"]),
            None if not state else state[0] if case.kind == "GRU" else tuple(state),
            [leaves[n] for n in self.params],
            **case.options,
            reset=None if self.reset is None else self.laid_out(self.reset),
            lengths=None if self.lengths is None else self.lengths[0] if one else self.lengths,
            plan=plan,
        )
        last = (last,) if case.kind == "GRU" else last
        shape = self.laid_out(torch.empty(case.time, case.batch or 1, 1)).shape[:-1]
        assert out.shape[:-1] == shape
        out = out.unsqueeze(1) if one else out.transpose(0, 1) if case.batch_first else out
        last = [s.unsqueeze(1) for s in last] if one else last
        return {"out": out, **dict(zip(("h_n", "c_n"), last, strict=False))}

    def cell_by_cell(self, **leaves: Tensor) -> dict[str, Tensor]:
        """The same by PyTorch's cells: each layer, direction, sequence and step on its own."""
        case, x = self.case, leaves["x"]
        sequences = list(x.unbind(1))  # (T, I) each
        lengths = [case.time] * len(sequences) if self.lengths is None else self.lengths.tolist()
        cell = _lstm_cell if case.kind == "LSTM" else _gru_cell
        widths = {"h_0": case.proj_size or case.hidden, "c_0": case.hidden}
        if case.kind == "GRU":
            del widths["c_0"]
        last: dict[str, list[Tensor]] = {"h_n": [], "c_n": []}
        for layer in range(case.layers):
            directions = []
            for reverse in range(2 if case.bidirectional else 1):
                suffix = f"_l{layer}_reverse" if reverse else f"_l{layer}"
                p = {n.removesuffix(suffix): leaves[n] for n in self.params if n.endswith(suffix)}
                row = len(last["h_n"])
                outs, finals = [], []
                for b, sequence in enumerate(sequences):
                    state = [
                        leaves[n][row, b] if case.state else x.new_zeros(width) for n, width in widths.items()
                    ]
                    steps = [x.new_zeros(widths["h_0"])] * case.time
                    for t in reversed(range(lengths[b])) if reverse else range(lengths[b]):
                        if self.reset is not None and self.reset[t, b]:
                            state = [torch.zeros_like(s) for s in state]
                        state = cell(p, sequence[t], state)
                        steps[t] = state[0]
                    outs.append(torch.stack(steps))
                    finals.append(state)
                directions.append(torch.stack(outs))  # (B, T, H)
                for name, states in zip(last, zip(*finals, strict=True), strict=False):
                    last[name].append(torch.stack(states))
            sequences = list(torch.cat(directions, -1))
        return {"out": torch.stack(sequences, 1)} | {n: torch.stack(s) for n, s in last.items() if s}


def _lstm_cell(p: dict[str, Tensor], x: Tensor, state: list[Tensor]) -> list[Tensor]:
    h, c = torch.lstm_cell(
        x[None], [s[None] for s in _unprojected(p, state)], p["weight_ih"], _square(p), *_biases(p)
    )
    return [p["weight_hr"] @ h[0] if "weight_hr" in p else h[0], c[0]]


def _unprojected(p: dict[str, Tensor], state: list[Tensor]) -> list[Tensor]:
    """A projected h in the width that ``lstm_cell`` takes, filled up with zeros."""
    h, c = state
    return [torch.cat([h, h.new_zeros(len(c) - len(h))]), c]


def _square(p: dict[str, Tensor]) -> Tensor:
    w = p["weight_hh"]
    return torch.cat([w, w.new_zeros(len(w), len(w) // 4 - w.shape[1])], 1)


def _gru_cell(p: dict[str, Tensor], x: Tensor, state: list[Tensor]) -> list[Tensor]:
    return [torch.gru_cell(x[None], state[0][None], p["weight_ih"], p["weight_hh"], *_biases(p))[0]]


def _biases(p: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    return p.get("bias_ih"), p.get("bias_hh")


def gradients(fn, leaves: dict[str, Tensor], grads: dict[str, Tensor], dtype=None) -> dict[str, Tensor]:
    """``fn(**leaves)`` and, by name, the gradient of every leaf, zero where nothing reaches it.

    ``grads`` are those of the results, some may be missing.
    """
    leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in leaves.items()}
    results = fn(**leaves)
    wanted = [n for n in grads if n in results and results[n].requires_grad]
    found = torch.autograd.grad(
        [results[n] for n in wanted],
        list(leaves.values()),
        [grads[n].to(results[n].dtype) for n in wanted],
        allow_unused=True,
    )
    found = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), found, strict=True)]
    return {n: t.detach() for n, t in results.items()} | dict(zip(leaves, found, strict=True))


def plain_torch(drawn: Drawn, **leaves: Tensor) -> dict[str, Tensor]:
    """A plain case by PyTorch's module."""
    module = drawn.case.module(dtype=leaves["x"].dtype)
    state = [leaves[n] for n in ("h_0", "c_0") if n in leaves]
    x = leaves["x"].transpose(0, 1) if drawn.case.batch_first else leaves["x"]
    out, last = torch.func.functional_call(
        module,
        {n: leaves[n] for n in drawn.params},
        (x, None if not state else state[0] if drawn.case.kind == "GRU" else tuple(state)),
    )
    out = out.transpose(0, 1) if drawn.case.batch_first else out
    return {
        "out": out,
        **dict(zip(("h_n", "c_n"), (last,) if drawn.case.kind == "GRU" else last, strict=False)),
    }


def result_gradients(drawn: Drawn) -> dict[str, Tensor]:
    """Random gradients of all results."""
    with torch.no_grad():
        results = drawn.cell_by_cell(**drawn.leaves)
    return {n: torch.randn(t.shape) for n, t in results.items()}


def assert_case(drawn: Drawn, fn, grads: dict[str, Tensor] | None) -> None:
    """``fn(**leaves) -> {out, h_n, c_n}`` and every gradient by the numbers rule.

    PyTorch's own ways are its cells, which is how resets are written with it, the reference's loop of its
    operators, and its module.
    """
    run = partial(gradients, grads=grads) if grads else _forward
    true = run(drawn.cell_by_cell, drawn.leaves, dtype=torch.float64)
    ways = [
        run(drawn.cell_by_cell, drawn.leaves),
        run(partial(drawn.ours, functions=cf.reference), drawn.leaves),
    ]
    if drawn.case.plain:
        ways.append(run(partial(plain_torch, drawn), drawn.leaves))
    mine = run(fn, drawn.leaves)
    assert mine.keys() == true.keys()
    for name, got in mine.items():
        assert_close_as_torch(got, [way[name] for way in ways], true[name], f"{name} of {drawn.case}")


def _forward(fn, leaves: dict[str, Tensor], dtype=None) -> dict[str, Tensor]:
    with torch.no_grad():
        return fn(**{n: t.to(dtype or t.dtype) for n, t in leaves.items()})


_SIZES = (3, 5, 7, 8, 15, 16, 17, 24, 31, 33, 48, 65)

#: A step's elements. Not fewer: the numbers rule compares norms, which one lucky element of a few decides.
_MIN_ELEMENTS = 15


def random_case(rng: random.Random, **fixed) -> Case:
    """A small case of any kind, at odd sizes and at those that fill registers."""
    kind = fixed.get("kind") or rng.choice(("LSTM", "GRU"))
    batch = fixed["batch"] if "batch" in fixed else rng.choice((None, 1, 2, 3, 5, 9, 17))
    fewest = -(-_MIN_ELEMENTS // (batch or 1))
    sizes = [size for size in _SIZES if size >= fewest]
    hidden = fixed.get("hidden") or rng.choice(sizes)
    projects = kind == "LSTM" and hidden > fewest and rng.random() < 0.25
    chosen = dict(
        kind=kind,
        inputs=rng.choice(sizes),
        hidden=hidden,
        time=rng.choice((1, 2, 3, 5, 8)),
        batch=batch,
        layers=rng.choice((1, 1, 2, 3)),
        bidirectional=rng.random() < 0.4,
        batch_first=rng.random() < 0.5,
        bias=rng.random() < 0.8,
        proj_size=rng.randrange(fewest, hidden) if projects else 0,
        state=rng.random() < 0.6,
        reset=rng.random() < 0.5,
        lengths=rng.random() < 0.5,
    )
    return Case(**(chosen | fixed))


def random_cases(count: int, **fixed):
    """Parametrize ``case`` over ``count`` random cases."""
    rng = random.Random(f"{SEED} {count} {sorted(fixed)}")
    cases = [random_case(rng, **fixed) for _ in range(count)]
    return pytest.mark.parametrize("case", [pytest.param(c, id=f"{i}") for i, c in enumerate(cases)])


def pack(drawn: Drawn, *, enforce_sorted: bool):
    """The case's ``x`` packed; lengths must be positive, and sorted where that is enforced."""
    x = drawn.laid_out(drawn.data["x"])
    return pack_padded_sequence(x, drawn.lengths, drawn.case.batch_first, enforce_sorted)
