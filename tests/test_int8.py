"""Frozen models in int8: against the scheme in float64, by the processor's unit and in plain C++."""

from __future__ import annotations

import copy
import functools
import json
import random
import warnings
from pathlib import Path

import pytest
import torch
from forked import run_forked
from helpers import assert_close_as_torch, needs_extension
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import cnnlstm_fast as cf
from cnnlstm_fast.freeze import int8, program
from cnnlstm_fast.freeze.stacks import join_layers

pytestmark = [needs_extension, pytest.mark.filterwarnings("ignore")]

UNIT = torch.ops.cnnlstm_fast.int8_unit() if cf._ext.loaded else ""
#: Roundings of float32 of a few sums of such sizes; sums of int8 themselves are exact.
EPS = 16 * torch.finfo(torch.float32).eps
#: Tensors of a state.
KINDS = {"LSTM": 2, "GRU": 1}


# ---------------------------------------------------------------- the scheme, in float64


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers as float64, and scales (..., 1)."""
    most = rows.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(most, 127) / most  # a number over a tensor is rounded twice
    numbers = (rows * inverse).round().nan_to_num(0, 0, 0)
    scale = torch.where(most < 2**-100, 0, most / 127)
    scale[~rows.isfinite().all(-1)] = float("nan")
    return torch.where(scale > 0, numbers, 0).double(), scale.double()


def product(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """rows @ weight.T, and how large its parts are."""
    a, of_a = quantized(rows)
    w, of_w = quantized(weight)
    exact = (a @ w.T) * (of_a * of_w.T)
    return exact, exact.abs()


def linear(x: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    y, size = product(x, layer.weight)
    bias = 0.0 if layer.bias is None else layer.bias.double()
    return y + bias, size + (0.0 if layer.bias is None else bias.abs())


def step(kind: str, weights: list[Tensor], x: Tensor, state: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The next state (h, and c of an LSTM), and how large pre-activations are."""
    w_ih, w_hh, *biases = weights
    of_x, of_h = (b.double() for b in biases) if biases else (torch.zeros(w_ih.shape[0]).double(),) * 2
    (a, size_a), (b, size_b) = product(x, w_ih), product(state[0], w_hh)
    a, b, size = a + of_x, b + of_h, (size_a + size_b + of_x.abs() + of_h.abs()).amax(-1, keepdim=True)
    if kind == "LSTM":
        i, f, g, o = (a + b).chunk(4, -1)
        c = f.sigmoid() * state[1].double() + i.sigmoid() * g.tanh()
        return [o.sigmoid() * c.tanh(), c], size + state[1].abs().double().amax(-1, keepdim=True)
    (r, z, n), (r_h, z_h, n_h) = a.chunk(3, -1), b.chunk(3, -1)
    n = (n + (r + r_h).sigmoid() * n_h).tanh()
    z = (z + z_h).sigmoid()
    return [n + z * (state[0].double() - n)], size + state[0].abs().double().amax(-1, keepdim=True)


def frozen(model: nn.Module, *inputs: Tensor):
    made = cf.freeze(model.eval(), *inputs, dtype=torch.int8)
    assert made._versions, made.why_not
    return made


def plans(made, *inputs: Tensor) -> list[str]:
    return [s.plan for s in cf.explain(made, *inputs).stages if s.op.split("+")[0] in (*KINDS, "Linear")]


class Each(nn.Module):
    """Layers side by side, each of an input of its own: one program to capture."""

    def __init__(self, layers: nn.ModuleList):
        super().__init__()
        self.layers = layers

    def forward(self, *inputs: Tensor):
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


# ---------------------------------------------------------------- linear layers


@torch.no_grad()
def test_linear_layers_are_the_scheme():
    outs = [1, 3, 17, 65, random.randint(2, 60), random.randint(60, 260)]
    shapes = list(
        zip(
            [1, 3, 17, 65, random.randint(2, 300), random.randint(1000, 2100)],
            random.sample(outs, 6),
            strict=True,
        )
    )
    shapes += [(65, 130), (3, 64)]
    layers = nn.ModuleList(nn.Linear(ins, outs, bias=random.random() < 0.7) for ins, outs in shapes)
    made = frozen(Each(layers), *(torch.randn(3, ins) for ins, _ in shapes))
    for rows in (1, 0, random.randint(2, 40), 70):
        inputs = [torch.randn(rows, ins) * torch.exp2(4 * torch.randn(rows, 1)) for ins, _ in shapes]
        for layer, x, found in zip(layers, inputs, made(*inputs), strict=True):
            true, size = linear(x, layer)
            assert ((found - true).abs() <= EPS * size + 1e-30).all(), (layer, rows)


@torch.no_grad()
def test_activations_follow_in_float32():
    parts = [nn.Hardtanh(-0.5, 0.25), nn.GELU(), nn.LeakyReLU(0.3)]
    layers = nn.ModuleList(nn.Sequential(nn.Linear(40, 70), activation) for activation in parts)
    inputs = [torch.randn(2, 5, 40) for _ in parts]
    made = frozen(Each(layers), *inputs)
    assert plans(made, *inputs) == ["packed int8"] * len(parts)
    for (layer, activation), x, found in zip(layers, inputs, made(*inputs), strict=True):
        assert (found - activation(linear(x, layer)[0])).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.some(1)
@pytest.mark.parametrize("bias", [True, False])
def test_special_rows_of_linear_layers(bias):
    """NaN and infinities make their whole row NaN; rows of zeros, and of nearly none, give the bias."""
    layer = nn.Linear(33, 21, bias=bias)
    x = torch.randn(9, 33)
    made = frozen(layer, x)
    clean = made(x)
    x[1, 5], x[3, 0], x[4, 32] = float("nan"), float("inf"), float("-inf")
    x[6], x[7] = 0, 1e-36
    found = made(x)
    assert found[[1, 3, 4]].isnan().all()
    assert (found[[6, 7]] == (layer.bias if bias else 0.0)).all()
    assert torch.equal(found[[0, 2, 5, 8]], clean[[0, 2, 5, 8]])
    layer.weight[4, 4] = float("inf")
    layer.weight[5] = 0
    found = made.refresh()(torch.randn(3, 33))
    assert found[:, 4].isnan().all() and found[:, :4].isfinite().all()
    assert (found[:, 5] == (layer.bias[5] if bias else 0.0)).all()


@torch.no_grad()
def test_large_and_small_numbers_of_a_row():
    """Rounding goes by the row's own largest number; half-way numbers go to the even one."""
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.copy_(127 * torch.eye(4))
    made = frozen(layer, torch.randn(2, 4))
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [2.0**90, 2.0**81, 2.0**95, -(2.0**97)]])
    assert torch.equal(made(x)[0] / 127, torch.tensor([127.0, 0.0, 2.0, -2.0]))
    true, size = linear(x, layer)
    assert ((made(x) - true).abs() <= EPS * size).all()


@torch.no_grad()
def test_sums_that_fill_an_int32():
    """The longest rows of 127 times 127; longer ones stay float32 and say so."""
    most = int8.MOST_INPUTS
    layer = nn.Linear(most, 2, bias=False)
    layer.weight.fill_(1.0)
    layer.weight[1] = -1.0
    made = frozen(layer, torch.ones(2, most))
    for rows in (1, 2, 8):
        assert torch.equal(made(torch.ones(rows, most)), torch.tensor([[most, -most]] * rows).float())
    longer = nn.Linear(most + 1, 2)
    x = torch.randn(2, most + 1)
    made = frozen(longer, x)
    assert torch.equal(made(x), cf.freeze(longer, x)(x))
    (stage,) = [s for s in cf.explain(made, x).stages if s.op == "Linear"]
    assert stage.plan == "packed" and "exact sum in int32" in stage.reason


# ---------------------------------------------------------------- recurrent layers


class WithStates(nn.Module):
    """Recurrent layers side by side, each of an input and a state of its own."""

    def __init__(self, kind: str, shapes: list[tuple[int, int]]):
        super().__init__()
        self.layers = nn.ModuleList(getattr(nn, kind)(*shape, bias=random.random() < 0.7) for shape in shapes)

    def forward(self, xs: list[Tensor], states: list[tuple[Tensor, ...]]):
        found = [m(x, s if len(s) == 2 else s[0]) for m, x, s in zip(self.layers, xs, states, strict=True)]
        return [out for out, _ in found], [s if isinstance(s, tuple) else (s,) for _, s in found]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_layers_are_the_scheme(kind):
    """Each step from the state that was there; the whole sequence has the bits of step after step."""
    shapes = [(1, 1), (17, 65), (random.randint(2, 90), 3), (1100, 17), (140, 130)]
    model, steps = WithStates(kind, shapes), 3
    made = None
    for batch in (random.randint(2, 40), 1, 70):
        xs = [torch.randn(steps, batch, inputs) for inputs, _ in shapes]
        states = [tuple(torch.randn(KINDS[kind], 1, batch, h)) for _, h in shapes]
        made = made or frozen(model, xs, states)
        whole, last = made(xs, states)
        for t in range(steps):
            before, (outs, states) = states, made([x[t : t + 1] for x in xs], states)
            for i, layer in enumerate(model.layers):
                weights = [p.detach() for p in layer.parameters()]
                true, size = step(kind, weights, xs[i][t], [s[0] for s in before[i]])
                for found, expected in zip(states[i], true, strict=True):
                    assert ((found[0] - expected).abs() <= 4 * EPS * (1 + size)).all(), (layer, batch)
                assert torch.equal(outs[i][0], states[i][0][0]) and torch.equal(outs[i][0], whole[i][t])
        assert all(map(torch.equal, pytree.tree_leaves(last), pytree.tree_leaves(states)))
    assert len(made._versions) == 1


@torch.no_grad()
@pytest.mark.some(1)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_and_directions_are_those_alone(kind):
    """Bits of both directions and of several layers, batch first, are those of each alone."""
    module = getattr(nn, kind)
    both, two = module(19, 33, bidirectional=True, batch_first=True), module(19, 33, 2, batch_first=True)
    alone = [module(width, 33, batch_first=True) for width in (19, 19, 19, 33)]
    for layer, given, ends in zip(
        alone, (both, both, two, two), ("_l0", "_l0_reverse", "_l0", "_l1"), strict=True
    ):
        for name, p in layer.named_parameters():
            p.copy_(getattr(given, name.replace("_l0", ends)))
    x = torch.randn(7, 11, 19)
    inputs = [x, x, x, x.flip(1), x, torch.randn(7, 11, 33)]
    made = frozen(Each(nn.ModuleList([both, two, *alone])), *inputs)
    assert plans(made, *inputs) == ["fused int8"] * 7
    found = [out for out, _ in made(*inputs)]
    assert torch.equal(found[0], torch.cat([found[2], found[3].flip(1)], 2))
    last = made(*inputs[:5], found[4])[5][0]
    assert torch.equal(found[1], last)


@torch.no_grad()
@pytest.mark.some(1)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_stay_by_themselves(kind):
    """A sequence has the bits that it has alone; NaN stays in it, and a reset ends it as in float32."""
    layer = getattr(cf, kind)(9, 21)
    x, done = torch.randn(8, 40, 9), torch.rand(8, 40) < 0.1

    class Resets(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, done):
            return self.layer(x, None, reset=done)[0]

    made = frozen(Resets(), x, done)
    clean = made(x, done)
    for i in (0, 33, 39):
        assert torch.equal(made(x[:, i : i + 1], done[:, i : i + 1])[:, 0], clean[:, i])
    x[3, 7, 2], x[3, 8, 2] = float("nan"), float("inf")
    done[:, 7:9], done[6, 7:9] = False, True
    expected = made(x.nan_to_num(0, 0, 0), done)
    out = made(x, done)
    assert out[3:6, 7:9].isnan().all()
    assert torch.equal(out[6:], expected[6:]) and torch.equal(out[:3], expected[:3])
    others = [i for i in range(40) if i not in (7, 8)]
    assert torch.equal(out[:, others], expected[:, others])


@torch.no_grad()
@pytest.mark.some(1)
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_end_sequences(kind):
    layer = getattr(cf, kind)(5, 18, bidirectional=True)
    x, lengths = torch.randn(9, 6, 5), torch.tensor([9, 2, 5, 5, 1, 8])

    class Lengths(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, lengths):
            return self.layer(x, None, lengths=lengths)[0]

    made = frozen(Lengths(), x, lengths)
    out = made(x, lengths)
    assert plans(made, x, lengths) == ["fused int8"]
    for i, length in enumerate(lengths.tolist()):
        alone = made(x[:length, i : i + 1], torch.tensor([length]))
        assert torch.equal(out[:length, i], alone[:, 0]) and not out[length:, i].any()


@torch.no_grad()
def test_projections_stay_float32():
    layer, x = nn.LSTM(12, 20, proj_size=7), torch.randn(4, 3, 12)
    made = frozen(layer, x)
    assert torch.equal(made(x)[0], cf.freeze(layer, x)(x)[0])
    (stage,) = [s for s in cf.explain(made, x).stages if s.op == "LSTM"]
    assert stage.plan == "fused" and "no int8: a projected LSTM" in stage.reason


@torch.no_grad()
@pytest.mark.some(1)
@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_overlapping_layers_change_no_bit(kind, monkeypatch):
    """On one to three threads; units shared by threads, and layers one behind the other, included."""
    module = getattr(nn, kind)
    model = nn.Sequential(nn.Linear(40, 200), module(200, 300), First(), module(300, 140), First()).eval()
    inputs = [torch.randn(31, batch, 40) for batch in (1, 5, 70)]
    made = frozen(model, inputs[0])
    assert [n["op"] for n in join_layers(made._versions[0].data["nodes"], [])].count("stack") == 1
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([made(x) for x in inputs])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))
    monkeypatch.setattr(program, "join_layers", lambda nodes, later: list(nodes))
    assert all(map(torch.equal, map(copy.deepcopy(made), inputs), found[0]))


class First(nn.Module):
    def forward(self, pair):
        return pair[0]


class Tagger(nn.Module):
    """A convolution and recurrent layers over steps: what a stream takes."""

    def __init__(self, kind: str):
        super().__init__()
        self.conv = nn.Conv1d(4, 24, 3)
        self.rnn = getattr(nn, kind)(24, 33, 2, batch_first=True)
        self.fc = nn.Linear(33, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu().transpose(1, 2)
        return self.fc(self.rnn(y)[0]).transpose(1, 2)


# ---------------------------------------------------------------- units


_RUN = """
import sys, torch, cnnlstm_fast
from cnnlstm_fast.freeze.program import Program
data, constants, given = torch.load(sys.argv[1])
found = [Program(data, constants, int8=True).run(inputs) for inputs in given]
torch.save((torch.ops.cnnlstm_fast.int8_unit(), found), sys.argv[2])
"""


@functools.cache
def layers_of_all_kinds():
    """Some layers as a program, and inputs of it."""
    sizes = [("Linear", 65, 33), ("Linear", 1000, 130), ("Linear", 1, 16), ("LSTM", 31, 65), ("GRU", 130, 70)]
    layers = nn.ModuleList(getattr(nn, name)(*size) for name, *size in [*sizes, ("LSTM", 64, 128, 2)])

    def draw(batch: int) -> list[Tensor]:
        inputs = [torch.randn(*(5,) * isinstance(m, nn.RNNBase), batch, m.width) for m in layers]
        for x in inputs:
            x[..., batch // 2, 0] = float("nan") if batch == 7 else 0.5
        return inputs

    for m in layers:
        m.width = m.input_size if isinstance(m, nn.RNNBase) else m.in_features
    made = frozen(Each(layers), *draw(3))
    return made._versions[0], [draw(batch) for batch in (1, 2, 7, 16, 33, 70)]


def compare_with(tmp_path: Path, close, **env: str) -> str:
    """Compare what a process of its own gives for these layers; returns the unit that it used."""
    version, given = layers_of_all_kinds()
    constants = {name: t.detach().clone() for name, t in version.program.constants.items()}
    files = [str(tmp_path / "given"), str(tmp_path / "found")]
    data = json.loads(json.dumps(version.data))  # as a file keeps it
    torch.save((data, constants, given), files[0])
    ran = run_forked(f"import sys; sys.argv[1:] = {files!r}\n{_RUN}", **env)
    assert ran.returncode == 0, ran.stderr[-2000:]
    used, found = torch.load(files[1])
    for inputs, others in zip(given, found, strict=True):
        for a, b in zip(version.program.run(inputs), others, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            close(a.nan_to_num(7.0), b.nan_to_num(7.0))
    return used


def same_bits(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a, b)


def same_but_for_gates(a: Tensor, b: Tensor) -> None:
    """Gates are rounded otherwise, which can turn the rounding of a state to int8."""
    assert (a - b).abs().max() <= 0.02 and (a - b).abs().mean() <= 2e-4


@torch.no_grad()
@pytest.mark.parametrize("other", [unit for unit in ("emulated", "avx512_vnni", "amx") if unit != UNIT])
def test_all_units_give_the_same_bits(other, tmp_path):
    used = compare_with(tmp_path, same_bits, CNNLSTM_FAST_INT8=other)
    assert used == other or UNIT == "emulated"


@torch.no_grad()
@pytest.mark.some(1)
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_lower_sets_multiply_in_plain_code(isa, tmp_path):
    assert compare_with(tmp_path, same_but_for_gates, CNNLSTM_FAST_ISA=isa) == "emulated"


# ---------------------------------------------------------------- error


@torch.no_grad()
def test_errors_are_smaller_than_those_of_dynamic_quantization():
    """Against float64, of models of a linear layer behind recurrent ones, of all sizes."""
    if torch.backends.quantized.engine in ("none", ""):
        pytest.skip("this build of PyTorch has no engine for quantized layers")
    ratios = []
    for kind in KINDS:
        inputs, hidden = random.randint(8, 80), random.randint(8, 160)
        ways = random.choice([1, 2])
        recurrent = getattr(nn, kind)(inputs, hidden, random.randint(1, 2), bidirectional=ways == 2)
        width = ways * hidden
        model = nn.Sequential(recurrent, First(), nn.Linear(width, 40), nn.ReLU(), nn.Linear(40, 20)).eval()
        x = torch.randn(random.randint(2, 20), random.randint(1, 20), inputs)
        x *= torch.exp2(torch.randn(x.shape[1], 1))
        own = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.GRU, nn.Linear}, torch.qint8)
        true = copy.deepcopy(model).double()(x.double())
        ours, theirs = ((f(x) - true).norm().item() for f in (frozen(model, x), own))
        ratios.append(ours / theirs)
    assert sum(ratios) <= len(ratios), ratios


# ---------------------------------------------------------------- the model around


@torch.no_grad()
@pytest.mark.some(1)
@pytest.mark.parametrize("kind", KINDS)
def test_files_copies_and_refreshing(kind, tmp_path):
    model, x = Tagger(kind).eval(), torch.randn(3, 4, 20)
    made = frozen(model, x)
    out = made(x)
    made.save(tmp_path / "model.cf")
    loaded = cf.load_frozen(tmp_path / "model.cf")
    assert torch.equal(loaded(x), out) and plans(loaded, x) == ["fused int8"] * 2 + ["packed int8"]
    assert loaded(torch.randn(1, 4, 9)).shape == (1, 6, 7)
    assert torch.equal(copy.deepcopy(made)(x), out)
    maps = torch.cat([cf.freeze(model.conv, x, dtype=torch.int8)(x), cf.freeze(model.conv, x)(x)])
    assert torch.equal(maps[:3], maps[3:])  # a convolution stays float32
    other = Tagger(kind).eval()
    expected = frozen(other, x)(x)
    for one in (made, loaded):
        one.load_state_dict(other.state_dict())
        assert torch.equal(one(x), expected)
    model.fc.weight.mul_(2), model.fc.bias.mul_(2)
    assert torch.equal(made(x), expected) and torch.equal(made.refresh()(x), 2 * expected)
    assert made(x).requires_grad is False


@torch.no_grad()
def test_other_dtypes_and_strides():
    """`.to` another dtype runs as PyTorch's, and back in int8; copies of strided inputs have their bits."""
    model, x = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 7)).eval(), torch.randn(3, 4, 20)
    made = frozen(model, x)
    out = made(x)
    strided = torch.randn(4, 3, 20).transpose(0, 1).copy_(x)
    assert not strided.is_contiguous() and torch.equal(made(strided), out)
    made.double()
    true = model(x.double())  # the parameters are the model's own
    assert_close_as_torch(made(x.double()), model(x.double()), true, "double")
    made.float()
    assert torch.equal(made(x), out) and plans(made, x)[-1] == "packed int8"


@torch.no_grad()
def test_parts_of_a_model_that_has_no_program():
    """Parts are compared in float32, and then packed in int8."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.front, self.back = nn.Sequential(nn.Linear(20, 40), nn.ReLU()), nn.Linear(40, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.front(x)
            return self.back(y) if y.mean() > -1 else y

    model, x = Branches().eval(), torch.randn(6, 20)
    made = cf.freeze(model, x, dtype=torch.int8)
    assert len(made._frozen_pieces()) == 2
    true, _ = linear(linear(x, model.front[0])[0].relu().float(), model.back)
    assert (made(x) - true).abs().max() <= 2e-2 * true.abs().max()
    assert (made(x) - model(x)).norm() > 1e-4 * model(x).norm()


@torch.no_grad()
@pytest.mark.some(1)
@pytest.mark.parametrize("kind", KINDS)
def test_streams(kind):
    """Chunks give the whole's results, but where a rounding of the convolution turns one to int8."""
    made = frozen(Tagger(kind), torch.randn(2, 4, 20))
    stream = made.stream(batch=2)
    x = torch.randn(2, 4, 33)
    found = torch.cat([stream(chunk) for chunk in x.split([3, 10, 1, 19], 2)], 2)
    whole = made(x)
    assert found.shape == whole.shape and (found - whole).abs().max() <= 0.02 * whole.abs().max()
    alone = frozen(getattr(nn, kind)(7, 20), torch.randn(5, 2, 7))
    stream, x = alone.stream(batch=2), torch.randn(11, 2, 7)
    assert torch.equal(torch.cat([stream(chunk)[0] for chunk in x.split(3)]), alone(x)[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.qint8, torch.bool, "int8", int])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=r"torch\.bfloat16, torch\.int8, or None"):
        cf.freeze(nn.Linear(3, 2), torch.randn(1, 3), dtype=dtype)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_models_that_are_quantized_already(kind):
    """What `quantize_dynamic` made runs and is explained as before, whatever takes it."""
    if torch.backends.quantized.engine in ("none", ""):
        pytest.skip("this build of PyTorch has no engine for quantized layers")
    module = nn.Sequential(getattr(nn, kind)(9, 14, 2), First(), nn.Linear(14, 5)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(module, {nn.LSTM, nn.GRU, nn.Linear}, torch.qint8)
    x = torch.randn(6, 3, 9)
    expected = model(x)
    for made in (cf.accelerate(model), cf.freeze(model, x), cf.freeze(model, x, dtype=torch.int8)):
        for _ in range(2):
            assert torch.equal(made(x), expected)
    for one in (model, cf.accelerate(model), cf.freeze(model, x)):
        assert cf.explain(one, x).stages and not cf.explain(one, x).error
