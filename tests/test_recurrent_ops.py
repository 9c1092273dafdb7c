"""The two ops behind functional.lstm and gru: sizes that cross every tile, panel and chunk of the kernels,
what PyTorch's machinery asks of an op, bits, and arguments that do not fit."""

from __future__ import annotations

import itertools
import os
import random
import threading
from dataclasses import dataclass

import pytest
import torch
from helpers import SEED, assert_close_as_torch, needs_extension
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from cnnlstm_fast.ops import recurrent as op

pytestmark = needs_extension
modes = pytest.mark.parametrize("mode", ["LSTM", "GRU"])
_NAMES = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
NAMES = ("x", "h0", "c0", *_NAMES, *(f"{n}_r" for n in _NAMES))


@dataclass(frozen=True)
class Case:
    """One layer and what it is given; sizes as in ops/recurrent.py."""

    mode: str
    steps: int
    batch: int
    inputs: int
    hidden: int
    directions: int = 1
    proj_size: int = 0
    bias: bool = True
    state: bool = True
    reset: bool = False
    lengths: bool = False
    batch_first: bool = False

    def draw(self, dtype=torch.float32) -> tuple[dict[str, Tensor | None], Tensor | None, Tensor | None]:
        """Tensors by name, time-major; reset; lengths."""
        gates, width = (4 if self.mode == "LSTM" else 3) * self.hidden, self.proj_size or self.hidden

        def uniform(*size, fan):
            return (torch.rand(size) * 2 - 1) * (3 / fan) ** 0.5

        tensors = dict.fromkeys(NAMES)
        tensors["x"] = torch.randn(self.steps, self.batch, self.inputs)
        if self.state:
            tensors["h0"] = torch.randn(self.directions, self.batch, width)
            if self.mode == "LSTM":
                tensors["c0"] = torch.randn(self.directions, self.batch, self.hidden)
        for suffix in ("", "_r")[: self.directions]:
            tensors[f"w_ih{suffix}"] = uniform(gates, self.inputs, fan=self.inputs)
            tensors[f"w_hh{suffix}"] = uniform(gates, width, fan=width)
            if self.bias:
                tensors[f"b_ih{suffix}"], tensors[f"b_hh{suffix}"] = torch.randn(2, gates) / 2
            if self.proj_size:
                tensors[f"w_hr{suffix}"] = uniform(width, self.hidden, fan=self.hidden)
        tensors = {n: t if t is None else t.to(dtype) for n, t in tensors.items()}
        reset = torch.rand(self.steps, self.batch) < random.choice((0.05, 0.3)) if self.reset else None
        lengths = torch.randint(0, self.steps + 1, (self.batch,)) if self.lengths else None
        return tensors, reset, lengths


def loop(case: Case, reset, lengths, x, h0, c0, *weights) -> tuple[Tensor, ...]:
    """The layer step by step in plain PyTorch: out, h_n, and c_n of an LSTM. Time-major."""
    outs, finals = [], []
    for d in range(case.directions):
        w_ih, w_hh, b_ih, b_hh, w_hr = weights[5 * d : 5 * d + 5]
        b_ih, b_hh = (0, 0) if b_ih is None else (b_ih, b_hh)
        h = x.new_zeros(case.batch, w_hh.shape[1]) if h0 is None else h0[d]
        c = x.new_zeros(case.batch, case.hidden) if c0 is None else c0[d]
        out = [h] * case.steps
        for t in range(case.steps)[:: -1 if d else 1]:
            valid = torch.ones(case.batch, 1, dtype=bool) if lengths is None else (lengths > t)[:, None]
            kept = torch.ones(case.batch, 1, dtype=bool) if reset is None else ~reset[t][:, None]
            h_before, c_before = torch.where(kept, h, 0), torch.where(kept, c, 0)
            of_x, of_h = x[t] @ w_ih.T + b_ih, h_before @ w_hh.T + b_hh
            if case.mode == "LSTM":
                i, f, g, o = (of_x + of_h).chunk(4, 1)
                c_new = f.sigmoid() * c_before + i.sigmoid() * g.tanh()
                h_new = o.sigmoid() * c_new.tanh()
                h_new = h_new if w_hr is None else h_new @ w_hr.T
                c = torch.where(valid, c_new, c)
            else:
                r, z = (of_x + of_h)[:, : 2 * case.hidden].sigmoid().chunk(2, 1)
                n = (of_x[:, 2 * case.hidden :] + r * of_h[:, 2 * case.hidden :]).tanh()
                h_new = (1 - z) * n + z * h_before
            h = torch.where(valid, h_new, h)
            out[t] = torch.where(valid, h_new, 0)
        outs.append(torch.stack(out))
        finals.append((h, c) if case.mode == "LSTM" else (h,))
    return torch.cat(outs, -1), *(torch.stack(s) for s in zip(*finals, strict=True))


def ours(case: Case, reset, lengths, x, *tensors) -> tuple[Tensor, ...]:
    """The same by the op, time-major again."""
    bf, mode = case.batch_first, op.MODES[case.mode]
    if bf:
        x, reset = x.transpose(0, 1), None if reset is None else reset.T
    args = (x, *tensors, reset, lengths, mode, bf)
    if torch.is_grad_enabled():
        steps, batch = x.shape[:2][:: -1 if bf else 1]
        rows = random.choice((-1, steps * batch if lengths is None else int(lengths.sum())))
        out, *last = op.RecurrentLayerFunction.apply(*args, random.random() < 0.5, rows)
    else:
        out, *last, saved = op.forward_op(*args, False)
        assert saved.numel() == 0
    assert out.is_contiguous()
    return out.transpose(0, 1) if bf else out, *last[: 2 if case.mode == "LSTM" else 1]


def results(fn, case: Case, drawn, grads=None, dtype=torch.float32) -> dict[str, Tensor]:
    """Outputs by name, and with ``grads`` of them every gradient."""
    tensors, reset, lengths = drawn
    leaves = {n: t.to(dtype).requires_grad_(grads is not None) for n, t in tensors.items() if t is not None}
    with torch.set_grad_enabled(grads is not None):
        out = fn(case, reset, lengths, *(leaves.get(n) for n in NAMES))
    named = dict(zip(("out", "h_n", "c_n"), out, strict=False))
    if grads is None:
        return named
    found = torch.autograd.grad(out, list(leaves.values()), [g.to(dtype) for g in grads])
    return {n: t.detach() for n, t in named.items()} | {
        f"gradient of {n}": g for n, g in zip(leaves, found, strict=True)
    }


def assert_case(case: Case, *, backward: bool = True, dtype=torch.float32) -> None:
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    elements = 0
    # The rule compares norms, which luck decides for a few elements: small cases are drawn again.
    while elements < 64 and len(found.get("out", ())) < 32:
        drawn = case.draw(dtype)
        with torch.no_grad():
            like = loop(case, *drawn[1:], *drawn[0].values())
        grads = [torch.randn(t.shape).to(dtype) for t in like] if backward else None
        true = results(loop, case, drawn, grads, torch.float64)
        torchs = results(loop, case, drawn, grads, dtype)
        for name, mine in results(ours, case, drawn, grads, dtype).items():
            found.setdefault(name, []).append((mine, torchs[name], true[name]))
        elements += min(t.count_nonzero().item() for t in true.values())
    for name, draws in found.items():
        assert_close_as_torch(*map(torch.stack, zip(*draws, strict=True)), f"{name} of {case}")


def random_cases(count: int, **fixed):
    rng = random.Random(f"{SEED} {count} {sorted(fixed)}")
    cases = []
    for _ in range(count):
        mode = fixed.get("mode") or rng.choice(("LSTM", "GRU"))
        hidden = fixed.get("hidden") or rng.choice((1, 3, 8, 15, 16, 17, 33, 48, 64, 65, 80))
        chosen = dict(
            mode=mode,
            steps=rng.choice((1, 2, 3, 7, 12)),
            batch=rng.choice((1, 2, 3, 5, 6, 7, 11, 12, 13, 24, 25, 63, 131)),
            inputs=rng.choice((1, 2, 7, 16, 33, 64, 129, 140)),
            hidden=hidden,
            directions=rng.choice((1, 1, 2)),
            proj_size=rng.randrange(1, hidden) if mode == "LSTM" and hidden > 1 and rng.random() < 0.3 else 0,
            bias=rng.random() < 0.8,
            state=rng.random() < 0.5,
            reset=rng.random() < 0.5,
            lengths=rng.random() < 0.5,
            batch_first=rng.random() < 0.5,
        )
        cases.append(Case(**(chosen | fixed)))
    return pytest.mark.parametrize("case", [pytest.param(c, id=f"{i}") for i, c in enumerate(cases)])


# ------------------------------------------------------------------- the numbers rule


@pytest.mark.instruction_sets
@random_cases(60)
def test_results_and_gradients(case):
    assert_case(case)


@random_cases(30)
def test_inference(case):
    assert_case(case, backward=False)


@random_cases(10)
def test_bfloat16(case):
    assert_case(case, dtype=torch.bfloat16)


@pytest.mark.instruction_sets
@random_cases(6, inputs=1100, hidden=40)
def test_many_inputs(case):
    """Projected for many steps at once."""
    assert_case(case)


@pytest.mark.instruction_sets
@random_cases(6, hidden=270, proj_size=0)
def test_weights_shared_by_cores(case):
    """Cores divide the units, not the sequences."""
    assert_case(case)


@pytest.mark.some(2)
@pytest.mark.parametrize("more", [{}, {"reset": True, "lengths": True}], ids=["plain", "reset and lengths"])
@modes
def test_several_chunks(mode, more):
    """Pre-activations' gradients, and projections of many inputs, of more steps than are kept at a time."""
    assert_case(Case(mode, 130, 33, 70, 128, directions=2, **more))
    assert_case(Case(mode, 20, 130, 1030, 128, **more))


@modes
def test_saturated_gates(mode):
    """Pre-activations beyond every exponent, infinite ones among them."""
    case = Case(mode, 3, 4, 2, 17, state=False, bias=False)
    tensors, *_ = case.draw()
    tensors["x"] = torch.tensor([[0.0, 1.0], [90.0, -90.0], [1e30, -1e30], [float("inf"), 1.0]])[
        :, :2
    ].expand(3, 4, 2)
    found, own, true = (
        results(f, case, (tensors, None, None), dtype=d)
        for f, d in ((ours, torch.float32), (loop, torch.float32), (loop, torch.float64))
    )
    for name, mine in found.items():
        assert_close_as_torch(mine, own[name], true[name], name)


@modes
def test_nan_stays_with_its_sequence(mode):
    case = Case(mode, 5, 13, 7, 20, state=False)
    tensors, *_ = case.draw()
    clean = results(ours, case, (tensors, None, None))["out"]
    tensors["x"][2, 4, 3] = torch.nan
    out = results(ours, case, (tensors, None, None))["out"]
    assert out[2:, 4].isnan().all()
    assert torch.equal(out[:2], clean[:2])
    others = [b for b in range(13) if b != 4]
    assert torch.equal(out[:, others], clean[:, others])


# ------------------------------------------------------------------- bits


def bits(case: Case, drawn, threads: int, grads=None) -> dict[str, Tensor]:
    torch.set_num_threads(threads)
    try:
        return results(ours, case, drawn, grads)
    finally:
        torch.set_num_threads(2)


SHAPES = {
    "sequences shared": dict(steps=7, batch=29, inputs=33, hidden=40),
    "units shared": dict(steps=7, batch=9, inputs=33, hidden=272),
    "many inputs": dict(steps=7, batch=13, inputs=1100, hidden=40),
    "few sequences": dict(steps=7, batch=3, inputs=200, hidden=40),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@modes
@shapes
def test_same_bits_with_any_number_of_threads(mode, shape):
    case = Case(mode, directions=2, reset=True, lengths=True, **shape)
    drawn = case.draw()
    grads = [torch.randn_like(t) for t in bits(case, drawn, 1).values()]
    one, *others = (bits(case, drawn, threads, grads) for threads in (1, 2, 2, 3, 7))
    for other, name in itertools.product(others, one):
        assert torch.equal(one[name], other[name]), name


@modes
@shapes
def test_same_bits_with_any_neighbours(mode, shape):
    """The forward of every sequence alone, and of parts of the batch."""
    case = Case(mode, directions=2, reset=True, lengths=True, **shape)
    tensors, reset, lengths = case.draw()
    whole = results(ours, case, (tensors, reset, lengths))
    for some in ([0], [case.batch - 1], range(1, case.batch), range(0, case.batch, 2)):
        part = Case(mode, directions=2, reset=True, lengths=True, **(shape | {"batch": len(some)}))
        of_batch = {n: tensors[n][:, some] for n in ("x", "h0", "c0") if tensors[n] is not None}
        alone = results(ours, part, (tensors | of_batch, reset[:, some], lengths[list(some)]))
        for name, value in alone.items():
            assert torch.equal(value, whole[name][:, some]), name


@modes
@shapes
def test_same_bits_step_by_step(mode, shape):
    case = Case(mode, **shape)
    tensors, *_ = case.draw()
    whole = results(ours, case, (tensors, None, None))
    one = Case(mode, **(shape | {"steps": 1}))
    state = {n: tensors[n] for n in ("h0", "c0")}
    for t in range(case.steps):
        step = results(ours, one, (tensors | state | {"x": tensors["x"][t : t + 1]}, None, None))
        assert torch.equal(step["out"][0], whole["out"][t])
        state = {n: step.get(s) for n, s in (("h0", "h_n"), ("c0", "c_n"))}


@modes
@shapes
def test_both_layouts_give_the_same_bits(mode, shape):
    found = []
    drawn = None
    for bf in (False, True):
        case = Case(mode, directions=2, reset=True, lengths=True, batch_first=bf, **shape)
        drawn = drawn or case.draw()
        found.append(results(ours, case, drawn))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@modes
def test_evaluation_gives_the_bits_of_training(mode):
    case = Case(mode, 5, 9, 12, 33, reset=True)
    drawn = case.draw()
    grads = [torch.randn_like(t) for t in results(ours, case, drawn).values()]
    training = results(ours, case, drawn, grads)
    for name, value in results(ours, case, drawn).items():
        assert torch.equal(value, training[name]), name


@shapes
def test_calls_from_several_threads(shape):
    """Each Python thread brings a team of its own, on fewer cores than they have threads."""
    case = Case("LSTM", **shape)
    drawn = case.draw()
    expected = results(ours, case, drawn)["out"]
    found = [None] * 4

    def call(i):
        torch.set_num_threads(2)
        for _ in range(3):
            found[i] = results(ours, case, drawn)["out"]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert all(f is not None and torch.equal(f, expected) for f in found)


# ------------------------------------------------------------------- PyTorch's machinery


@random_cases(8, batch=3, steps=3, inputs=4)
def test_schema_and_fake_kernels(case):
    tensors, reset, lengths = case.draw()
    if case.batch_first:
        tensors["x"], reset = tensors["x"].transpose(0, 1), None if reset is None else reset.T
    given = [tensors[n] for n in NAMES]
    mode = op.MODES[case.mode]
    for keep in (False, True):
        args = (*given, reset, lengths, mode, case.batch_first, keep)
        torch.library.opcheck(op.forward_op, args, test_utils=("test_schema", "test_faketensor"))
    out, h_n, c_n, saved = op.forward_op(*args)
    grads = torch.randn_like(out), torch.randn_like(h_n), torch.randn_like(c_n) if c_n.numel() else None
    for needs in itertools.product((False, True), repeat=3):
        args = (*grads, *given, reset, lengths, out, saved, mode, case.batch_first, *needs)
        torch.library.opcheck(op.backward_op, args, test_utils=("test_schema", "test_faketensor"))


@modes
def test_what_is_kept(mode):
    """No more than PyTorch: gates and cells, float32, units padded to whole groups."""
    case = Case(mode, 3, 2, 5, 17)
    tensors, *_ = case.draw()
    given = [tensors[n] for n in NAMES]
    *_, saved = op.forward_op(*given, None, None, op.MODES[mode], False, True)
    assert saved.shape == (1, 3, 2, 5 if mode == "LSTM" else 4, 32) and saved.dtype == torch.float32
    values = saved[0, :, :, :, :17]
    if mode == "LSTM":
        i, f, g, o, c = values.unbind(2)
        before = torch.cat([tensors["c0"], c[:-1]])
        torch.testing.assert_close(c, f * before + i * g)
        assert i.min() >= 0 and f.min() >= 0 and o.max() <= 1 and g.min() < 0
    else:
        r, z, n, _ = values.unbind(2)
        assert r.min() >= 0 and z.max() <= 1 and n.min() < 0


@modes
@pytest.mark.parametrize("missing", ["grad_out", "grad_h_n", "grad_c_n"])
def test_missing_gradients_are_zeros(mode, missing):
    case = Case(mode, 4, 3, 5, 17)
    tensors, *_ = case.draw()
    given = [tensors[n] for n in NAMES]
    out, h_n, c_n, saved = op.forward_op(*given, None, None, op.MODES[mode], False, True)
    grads = {"grad_out": torch.randn_like(out), "grad_h_n": torch.randn_like(h_n), "grad_c_n": None}
    if mode == "LSTM":
        grads["grad_c_n"] = torch.randn_like(c_n)
    elif missing == "grad_c_n":
        return
    rest = (*given, None, None, out, saved, op.MODES[mode], False, True, True, True)
    without = op.backward_op(*(grads | {missing: None}).values(), *rest)
    zeros = op.backward_op(*(grads | {missing: torch.zeros_like(grads[missing])}).values(), *rest)
    for a, b in zip(without, zeros, strict=True):
        assert torch.equal(a, b)


@modes
@pytest.mark.parametrize("how", ["expanded", "strided", "flipped layout"])
def test_gradients_of_any_strides(mode, how):
    case = Case(mode, 4, 3, 5, 17)
    tensors, *_ = case.draw()
    given = [tensors[n] for n in NAMES]
    out, _, _, saved = op.forward_op(*given, None, None, op.MODES[mode], False, True)
    grad = {
        "expanded": torch.randn(1, 1, 1).expand_as(out),
        "strided": torch.randn(4, 3, 34)[..., ::2],
        "flipped layout": torch.randn(17, 3, 4).permute(2, 1, 0),
    }[how]
    rest = (*given, None, None, out, saved, op.MODES[mode], False, True, True, True)
    found, expected = (op.backward_op(g, None, None, *rest) for g in (grad, grad.contiguous()))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


WRONG = {
    "a 2-d input": (dict(x=torch.zeros(3, 4)), "3-d"),
    "float64": (dict(x=torch.zeros(3, 2, 5, dtype=torch.float64)), "float32 and bfloat16"),
    "mixed dtypes": (dict(w_hh=torch.zeros(32, 8, dtype=torch.bfloat16)), "dtype"),
    "input size": (dict(x=torch.zeros(3, 2, 6)), "w_ih"),
    "bias size": (dict(b_hh=torch.zeros(31)), "b_hh"),
    "one bias": (dict(b_hh=None), "alike"),
    "state size": (dict(h0=torch.zeros(1, 3, 8)), "h0"),
    "not square": (dict(w_hh=torch.zeros(32, 7)), "square"),
    "half a direction": (dict(w_ih_r=torch.zeros(32, 5)), "reverse"),
    "reset's shape": (dict(reset=torch.zeros(2, 3, dtype=torch.bool)), "reset"),
    "reset's dtype": (dict(reset=torch.zeros(3, 2)), "bool"),
    "lengths' dtype": (dict(lengths=torch.ones(2, dtype=torch.int32)), "int64"),
    "lengths too long": (dict(lengths=torch.tensor([1, 4])), "0 to"),
    "negative lengths": (dict(lengths=torch.tensor([-1, 3])), "0 to"),
}


LENGTHS = torch.tensor([3, 1])  # of packed data (4, 5)
WRONG_PACKED = {
    "no lengths": (dict(lengths=None), {}, "3-d"),
    "rising lengths": (dict(lengths=LENGTHS.flip(0)), {}, "fall"),
    "too few rows": (dict(lengths=torch.tensor([3, 2])), {}, "sum"),
    "too many rows": (dict(lengths=torch.tensor([2, 1])), {}, "sum"),
    "a negative length": (dict(lengths=torch.tensor([5, -1])), {}, "0 to"),
    "lengths that wrap": (dict(lengths=torch.tensor([2**62, 2**62])), {}, "0 to"),
    "resets": (dict(reset=torch.zeros(4, dtype=torch.bool)), {}, "no reset"),
    "batch first": ({}, dict(batch_first=True), "batch_first"),
    "rows not told": ({}, dict(rows=-1), "4 rows"),
    "other rows": ({}, dict(rows=5), "4 rows"),
    "a state of more sequences": (dict(h0=torch.zeros(1, 4, 8)), {}, "h0"),
}


@pytest.mark.parametrize("wrong", WRONG_PACKED)
def test_the_op_checks_packed_data(wrong):
    changed, options, message = WRONG_PACKED[wrong]
    tensors, *_ = Case("LSTM", 3, 2, 5, 8).draw()
    given = tensors | {"x": torch.randn(4, 5), "reset": None, "lengths": LENGTHS}
    options = dict(mode=op.MODES["LSTM"], batch_first=False, keep=True, keep_out=True, rows=4) | options
    *_, saved = op.forward_op(*given.values(), *(options | dict(batch_first=False, rows=4)).values())
    with pytest.raises(RuntimeError, match=message):
        op.forward_op(*(given | changed).values(), *options.values())
    if "rows" not in options or options["rows"] == 4:
        with pytest.raises(RuntimeError, match=message):
            op.backward_op(
                None, None, None, *(given | changed).values(), None, saved, options["mode"],
                options["batch_first"], True, True, True,
            )  # fmt: skip


def test_the_backward_takes_what_the_forward_kept():
    tensors, *_ = Case("LSTM", 3, 2, 5, 8).draw()
    given = [tensors[n] for n in NAMES]
    rest = op.MODES["LSTM"], False, True, True, True
    for keep_out, rows in itertools.product((False, True), (-1, 4)):
        out, *_, saved = op.forward_op(*given, None, LENGTHS, op.MODES["LSTM"], False, True, keep_out, rows)
        args = (None, None, None, *given, None)
        op.backward_op(*args, LENGTHS, None if keep_out else out, saved, *rest)
        with pytest.raises(RuntimeError, match="saved"):
            op.backward_op(*args, LENGTHS, out if keep_out else None, saved, *rest)
        if rows == 4:
            with pytest.raises(RuntimeError, match="saved"):
                op.backward_op(*args, torch.tensor([3, 2]), out, saved, *rest)


@pytest.mark.parametrize("wrong", WRONG)
def test_the_op_checks_its_arguments(wrong):
    changed, message = WRONG[wrong]
    tensors, *_ = Case("LSTM", 3, 2, 5, 8).draw()
    given = tensors | {"reset": None, "lengths": None} | changed
    with pytest.raises(RuntimeError, match=message):
        op.forward_op(*given.values(), op.MODES["LSTM"], False, False)


PACKED = {
    "few units": dict(steps=30, batch=70, inputs=33, hidden=40),
    "units shared": dict(steps=9, batch=300, inputs=20, hidden=272),
    "many inputs": dict(steps=40, batch=21, inputs=1100, hidden=130),
    "one long sequence": dict(steps=400, batch=40, inputs=140, hidden=24),
}


#: With all limits at their least small layers go where large ones do; under a sanitizer those take a minute.
SMALLER = 4 if os.environ.get("CNNLSTM_FAST_LEAST") == "1" else 1


@modes
@pytest.mark.parametrize("shape", PACKED.values(), ids=PACKED)
def test_rows_of_any_lengths(mode, shape):
    """Packed data, and padded data of which only valid steps are kept: the forward's bits, all gradients.

    With the outputs kept twice or read again. Lengths are far from even, so that threads are dealt out anew.
    """
    case = Case(mode, directions=2, **{name: -(-size // SMALLER) for name, size in shape.items()})
    tensors, *_ = case.draw()
    given = [tensors[n] for n in NAMES]
    long, rest = case.steps, torch.rand(case.batch - 1).pow(3).mul(case.steps).long() + 1
    lengths = torch.cat([torch.tensor([long]), rest if case.steps < 10 * case.batch else rest.clamp(max=5)])
    lengths = lengths[torch.randperm(case.batch)]
    rows, kind = int(lengths.sum()), op.MODES[mode]
    out, h_n, c_n, saved = op.forward_op(*given, None, lengths, kind, False, True)
    grads = torch.randn_like(out), torch.randn_like(h_n), torch.randn_like(c_n) if c_n.numel() else None
    expected = op.backward_op(*grads, *given, None, lengths, out, saved, kind, False, True, True, True)
    order = lengths.argsort(descending=True, stable=True)

    def packed(t):
        return None if t is None else pack_padded_sequence(t[:, order], lengths[order]).data

    def states(*found):
        return [None if t is None else t[:, order] for t in found]

    x, h0, c0, *weights = given
    for keep_out in (False, True):
        again = op.forward_op(*given, None, lengths, kind, False, True, keep_out, rows)
        for name, a, b in zip(("out", "h_n", "c_n"), again, (out, h_n, c_n), strict=False):
            assert torch.equal(a, b), name
        kept = None if keep_out else again[0]
        found = op.backward_op(*grads, *given, None, lengths, kept, again[3], kind, False, True, True, True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item() if b.numel() else 0)
        inputs = packed(x), *states(h0, c0), *weights, None, lengths[order]
        again = op.forward_op(*inputs, kind, False, True, keep_out, rows)
        assert torch.equal(again[0], packed(out))
        assert again[3].shape[1] == rows
        for a, b in zip(again[1:3], states(h_n, c_n) if mode == "LSTM" else states(h_n), strict=False):
            assert torch.equal(a, b)
        kept = None if keep_out else again[0]
        found = op.backward_op(
            packed(grads[0]), *states(*grads[1:]), *inputs, kept, again[3], kind, False, True, True, True
        )
        wanted = (
            packed(expected[0]),
            *(t if t.dim() < 3 else t[:, order] for t in expected[1:3]),
            *expected[3:],
        )
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item() if b.numel() else 0)


def test_a_gru_has_no_cells():
    """Given some, it had written their gradient from nowhere."""
    tensors, *_ = Case("GRU", 3, 2, 5, 8).draw()
    given = list(tensors.values())
    out, h_n, _, saved = op.forward_op(*given, None, None, op.MODES["GRU"], False, True)
    cells = list((tensors | {"c0": torch.randn_like(h_n)}).values())
    rest = (None, None, out, saved, op.MODES["GRU"], False, True, True, True)
    with pytest.raises(RuntimeError, match="no c0"):
        op.forward_op(*cells, None, None, op.MODES["GRU"], False, True)
    with pytest.raises(RuntimeError, match="no c0"):
        op.backward_op(torch.ones_like(out), None, None, *cells, *rest)
    with pytest.raises(RuntimeError, match="no c_n"):
        op.backward_op(torch.ones_like(out), None, torch.ones_like(h_n), *given, *rest)


@modes
def test_nothing_to_do(mode):
    """An empty batch gives empty results and zero gradients."""
    case = Case(mode, 3, 0, 4, 5)
    drawn = case.draw()
    found = results(ours, case, drawn)
    grads = [torch.randn_like(t) for t in found.values()]
    for name, value in results(ours, case, drawn, grads).items():
        assert value.numel() == 0 or not value.any(), name
