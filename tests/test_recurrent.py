"""functional.lstm and functional.gru, and their reference twins, against PyTorch's cells step by step."""

from __future__ import annotations

import math
import os
import random
import re
from functools import partial

import pytest
import torch
from helpers import assert_close_as_torch, needs_extension, strided
from sequences import (
    Case,
    assert_case,
    gradients,
    kinds,
    plain_torch,
    plans,
    random_case,
    random_cases,
    result_gradients,
)
from torch import Tensor, nn

import cnnlstm_fast as cf
from cnnlstm_fast.planning import recurrent as planning


def of_plan(drawn, plan: str):
    """The case under a plan, or None where the plan has to refuse it, which is checked."""
    if plan == "library" and not drawn.case.plain:
        with pytest.raises(ValueError, match="neither reset nor lengths"):
            drawn.ours(plan=plan, **drawn.leaves)
        return None
    if plan == "reference":
        return partial(drawn.ours, functions=cf.reference)
    return partial(drawn.ours, plan=plan)


# ---------------------------------------------------------------- numbers


@random_cases(40)
@plans
def test_results_and_gradients(case, plan):
    drawn = case.draw()
    run = of_plan(drawn, plan)
    if run is not None:
        assert_case(drawn, run, result_gradients(drawn))


@random_cases(20)
@plans
def test_inference(case, plan):
    drawn = case.draw()
    run = of_plan(drawn, plan)
    if run is not None:
        assert_case(drawn, run, None)


@random_cases(12, bias=True)
def test_bfloat16(case):
    drawn = case.draw(torch.bfloat16)
    assert_case(drawn, drawn.ours, {n: g.bfloat16() for n, g in result_gradients(drawn).items()})


@kinds
@pytest.mark.parametrize("more", [{}, {"reset": True, "lengths": True}], ids=["plain", "reset and lengths"])
def test_long_sequences(kind, more):
    """Errors do not pile up over a hundred steps."""
    drawn = Case(kind, 9, 40, 100, 3, layers=2, bidirectional=True, **more).draw()
    assert_case(drawn, drawn.ours, result_gradients(drawn))


@random_cases(10, layers=2)
@pytest.mark.parametrize("alone", ["out", "h_n", "c_n"])
def test_gradient_of_one_result(case, alone):
    drawn = case.draw()
    grads = result_gradients(drawn)
    if alone in grads:
        assert_case(drawn, drawn.ours, {alone: grads[alone]})


@random_cases(10, layers=2, state=True)
@pytest.mark.parametrize("wanted", ["x", "h_0", "weight_ih_l0", "bias_hh_l1"])
def test_gradient_of_one_leaf(case, wanted):
    drawn = case.draw()
    if wanted not in drawn.leaves:
        return
    grads = result_gradients(drawn)
    alone = {wanted: drawn.leaves[wanted]}
    rest = {n: t for n, t in drawn.leaves.items() if n != wanted}
    true = gradients(
        lambda **one: drawn.cell_by_cell(**one, **{n: t.double() for n, t in rest.items()}), alone, grads,
        torch.float64,
    )  # fmt: skip
    way = gradients(lambda **one: drawn.cell_by_cell(**one, **rest), alone, grads)
    mine = gradients(lambda **one: drawn.ours(**one, **rest), alone, grads)
    for name, got in mine.items():
        assert_close_as_torch(got, way[name], true[name], f"{name} of {case}")


@random_cases(8, batch=2, time=3, hidden=3, inputs=2, layers=1, proj_size=0)
def test_gradcheck(case):
    """In float64, through the public function."""
    drawn = case.draw(torch.float64)
    leaves = {n: t.requires_grad_() for n, t in drawn.leaves.items()}
    assert torch.autograd.gradcheck(
        lambda *tensors: tuple(drawn.ours(**dict(zip(leaves, tensors, strict=True))).values()),
        list(leaves.values()),
    )


@random_cases(8, batch=2, time=3, hidden=3, inputs=2, layers=2, bidirectional=False)
def test_double_backward(case):
    """A gradient's gradient, against the same of the cells."""
    drawn = case.draw()
    grads = result_gradients(drawn)

    def penalty(fn, dtype):
        leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in drawn.leaves.items()}
        results = fn(**leaves)
        total = sum((r * grads[n].to(dtype)).sum() for n, r in results.items())
        first = torch.autograd.grad(total, list(leaves.values()), create_graph=True, allow_unused=True)
        used = [g for g in first if g is not None]
        size = sum(g.square().sum() for g in used)
        found = torch.autograd.grad(size, list(leaves.values()), allow_unused=True)
        return [torch.zeros(()) if g is None else g for g in found]

    true, way, mine = (
        penalty(fn, dtype)
        for fn, dtype in (
            (drawn.cell_by_cell, torch.float64),
            (drawn.cell_by_cell, torch.float32),
            (drawn.ours, torch.float32),
        )
    )
    for name, m, w, t in zip(drawn.leaves, mine, way, true, strict=True):
        if t.dim():
            assert_close_as_torch(m, w, t, f"{name} of {case}")


@kinds
@plans
def test_saturated_gates(kind, plan):
    """Pre-activations far beyond where exponentials overflow, and just there."""
    layer = getattr(nn, kind)(1, 32)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.weight_ih_l0[:, 0] = torch.linspace(0.5, 1, len(layer.weight_ih_l0)) * (
            2.0 * torch.randint(0, 2, (len(layer.weight_ih_l0),)) - 1
        )
    near = torch.linspace(80, 180, 401)
    x = torch.cat([near, -near, torch.tensor([1e4, -1e4, 3e38, -3e38])])[None, :, None].requires_grad_()
    functions = cf.reference if plan == "reference" else cf.functional
    out, _ = getattr(functions, kind.lower())(x, None, layer._flat_weights, plan=plan)
    (grad,) = torch.autograd.grad(out.sum(), x)
    expected, _ = layer.double()(x.double())
    assert grad.isfinite().all()
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- resets and lengths


@kinds
@plans
def test_a_reset_begins_anew(kind, plan):
    """One call with resets is one call per episode."""
    if plan == "library":
        return
    layer = getattr(nn, kind)(5, 7, 2)
    x = torch.randn(9, 1, 5)
    reset = torch.zeros(9, 1, dtype=torch.bool)
    reset[[3, 4, 7]] = True
    functions = cf.reference if plan == "reference" else cf.functional
    out, last = getattr(functions, kind.lower())(
        x, None, layer._flat_weights, num_layers=2, reset=reset, plan=plan
    )
    episodes = [layer(part) for part in (x[:3], x[3:4], x[4:7], x[7:])]
    torch.testing.assert_close(out, torch.cat([e[0] for e in episodes]))
    torch.testing.assert_close(last, episodes[-1][1])


@kinds
@plans
@pytest.mark.parametrize("batch_first", [True, False])
def test_gradients_stop_at_a_reset(kind, plan, batch_first):
    if plan == "library":
        return
    layer = getattr(nn, kind)(5, 7, 2, batch_first=batch_first)
    x = torch.randn(2, 6, 5) if batch_first else torch.randn(6, 2, 5)
    x.requires_grad_()
    state = torch.randn(2, 2, 7, requires_grad=True)
    hx = (state, state) if kind == "LSTM" else state
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3, 0] = True
    functions = cf.reference if plan == "reference" else cf.functional
    out, _ = getattr(functions, kind.lower())(
        x, hx, layer._flat_weights, num_layers=2, batch_first=batch_first,
        reset=reset.T if batch_first else reset, plan=plan,
    )  # fmt: skip
    (out[:, 3:] if batch_first else out[3:]).sum().backward()
    touched = (x.grad if not batch_first else x.grad.transpose(0, 1)).abs().sum(-1) > 0
    assert touched.tolist() == [[False, True]] * 3 + [[True, True]] * 3
    assert (state.grad.abs().sum((0, 2)) > 0).tolist() == [False, True]


@kinds
@plans
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_lies_behind_the_end_is_not_read(kind, plan, poison):
    if plan == "library":
        return
    layer = getattr(nn, kind)(5, 7, 2, bidirectional=True)
    lengths = torch.tensor([4, 0, 6, 1])
    x = torch.randn(6, 4, 5)
    behind = torch.arange(6)[:, None] >= lengths
    functions = cf.reference if plan == "reference" else cf.functional
    found = []
    for value in (0.0, poison):
        given = x.masked_fill(behind[..., None], value).requires_grad_()
        reset = torch.zeros(6, 4, dtype=torch.bool) if value == 0 else behind  # no reset there either
        out, last = getattr(functions, kind.lower())(
            given, None, layer._flat_weights, num_layers=2, bidirectional=True, lengths=lengths,
            reset=reset, plan=plan,
        )  # fmt: skip
        h_n = last[0] if kind == "LSTM" else last
        grads = torch.autograd.grad(out.sum() + h_n.sum(), [given, *layer.parameters()])
        found.append([out, h_n, *grads])
        assert not out[behind].any()
        assert not grads[0][behind].any()
    for clean, poisoned in zip(*found, strict=True):
        assert torch.equal(clean, poisoned)


@kinds
@plans
def test_a_reset_stops_what_went_wrong_before(kind, plan):
    """A NaN of the last episode does not reach the next."""
    if plan == "library":
        return
    layer = getattr(nn, kind)(5, 7)
    x = torch.randn(6, 2, 5)
    x[1, 0] = math.nan
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3] = True
    functions = cf.reference if plan == "reference" else cf.functional
    with torch.no_grad():
        out, _ = getattr(functions, kind.lower())(x, None, layer._flat_weights, reset=reset, plan=plan)
    assert out[1:3, 0].isnan().all()
    assert out[3:].isfinite().all() and out[:, 1].isfinite().all()


@pytest.mark.parametrize(
    "given",
    [
        lambda t: t.int(),
        lambda t: t.to(torch.uint8),
        lambda t: t.tolist(),
        lambda t: t.repeat_interleave(2)[::2],
    ],
)
def test_lengths_of_any_kind(given):
    layer = nn.GRU(5, 7)
    x, lengths = torch.randn(6, 3, 5), torch.tensor([2, 6, 5])
    expected = cf.functional.gru(x, None, layer._flat_weights, lengths=lengths)
    got = cf.functional.gru(x, None, layer._flat_weights, lengths=given(lengths))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@kinds
@pytest.mark.parametrize("state", [True, False])
def test_lengths_of_zero(kind, state):
    """Nothing but the initial state comes through."""
    drawn = Case(kind, 5, 7, 4, 3, layers=2, bidirectional=True, state=state, lengths=True).draw()
    drawn.lengths.zero_()
    assert_case(drawn, drawn.ours, None)
    leaves = {n: t.requires_grad_() for n, t in drawn.leaves.items()}
    results = drawn.ours(**leaves)
    sum(t.sum() for t in results.values()).backward()
    for name, t in leaves.items():
        assert torch.equal(t.grad, torch.full_like(t, float(name in ("h_0", "c_0")))), name


@kinds
@pytest.mark.parametrize("how", ["sliced", "transposed", "expanded", "offset"])
def test_strided_tensors(kind, how):
    """Inputs, states and parameters in any memory, resets expanded and transposed."""
    drawn = Case(kind, 6, 7, 5, 4, layers=2, bidirectional=True, reset=True, lengths=True).draw()
    leaves = {n: strided(t, how) if t.dim() > 1 else t for n, t in drawn.leaves.items()}
    for reset in (drawn.reset.T.contiguous().T, drawn.reset[:, :1].expand(5, 4)):
        odd = type(drawn)(drawn.case, drawn.data, drawn.params, reset, drawn.lengths)
        plain = type(drawn)(drawn.case, drawn.data, drawn.params, reset.contiguous(), drawn.lengths)
        expected = plain.ours(**{n: t.contiguous() for n, t in leaves.items()})
        got = odd.ours(**leaves)
        for name, t in got.items():
            torch.testing.assert_close(t, expected[name])


# ---------------------------------------------------------------- modes of PyTorch


@kinds
@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_draws_as_torch(kind, batch_first):
    layer = getattr(nn, kind)(5, 7, 3, dropout=0.4, batch_first=batch_first)
    x = torch.randn(6, 4, 5)
    results = []
    functions = [
        partial(getattr(module, kind.lower()), hx=None, params=layer._flat_weights, num_layers=3,
                batch_first=batch_first, dropout=0.4, training=True)
        for module in (cf.functional, cf.reference)
    ]  # fmt: skip
    for function in (layer, *functions):
        torch.manual_seed(3)
        results.append(function(x))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@kinds
def test_dropout_of_everything(kind):
    layer = getattr(nn, kind)(5, 7, 2, dropout=1.0)
    x = torch.randn(6, 4, 5)
    got = getattr(cf.functional, kind.lower())(
        x, None, layer._flat_weights, num_layers=2, dropout=1.0, training=True
    )
    torch.testing.assert_close(got, layer(x))


@kinds
@pytest.mark.parametrize("batch", [0, 1])
def test_empty_batch(kind, batch):
    layer = getattr(nn, kind)(5, 7, 2, bidirectional=True)
    function = partial(
        getattr(cf.functional, kind.lower()), params=layer._flat_weights, num_layers=2, bidirectional=True
    )
    x = torch.randn(3, batch, 5)
    torch.testing.assert_close(function(x, None), layer(x))
    out, _ = function(x, None, reset=torch.zeros(3, batch, dtype=torch.bool), lengths=torch.full((batch,), 3))
    torch.testing.assert_close(out, layer(x)[0])


def autocast_calls():
    for kind in ("LSTM", "GRU"):
        for more in ({}, {"bidirectional": True}, *([{"proj_size": 3}] if kind == "LSTM" else [])):
            for state in (False, True):
                for dtype in (torch.float32, torch.bfloat16):
                    yield kind, more, state, dtype


@pytest.mark.parametrize("kind, more, state, dtype", autocast_calls())
def test_autocast_gives_the_dtypes_of_torch(kind, more, state, dtype):
    layer = getattr(nn, kind)(5, 7, 2, **more)
    rows = 4 if layer.bidirectional else 2
    hx = [torch.randn(rows, 3, s).to(dtype) for s in (layer.proj_size or 7, 7)]
    hx = None if not state else tuple(hx) if kind == "LSTM" else hx[1]
    x = torch.randn(6, 3, 5).to(dtype)
    function = partial(getattr(cf.functional, kind.lower()), params=layer._flat_weights, num_layers=2, **more)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, got = layer(x, hx), function(x, hx)
        torch.testing.assert_close(got, expected, rtol=0.03, atol=0.03)
        resets = function(x, hx, reset=torch.zeros(6, 3, dtype=torch.bool))
        torch.testing.assert_close(resets, expected, rtol=0.03, atol=0.03)
        got[0].float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@needs_extension
@pytest.mark.parametrize("kind, inputs", [("LSTM", 5), ("GRU", 300)])
def test_autocast_rounds_nothing_that_our_kernels_read(kind, inputs, monkeypatch):
    """Without a unit for bfloat16 they compute in float32: only results become bfloat16."""
    monkeypatch.setattr(planning, "_OUR_UNIT", "")
    monkeypatch.setattr(planning, "_LIBRARY_HAS_AMX", False)
    monkeypatch.setattr(planning, "_LIBRARY_HAS_BFLOAT16", False)
    layer = getattr(cf, kind)(inputs, 7, 2, bidirectional=True)
    x = torch.randn(6, 3, inputs)
    wide = layer(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)[0]
        given_low = layer(x.bfloat16())[0]
    assert torch.equal(low.bfloat16(), wide.bfloat16())
    assert torch.equal(given_low.bfloat16(), layer(x.bfloat16().float())[0].bfloat16())
    found, true = (
        torch.autograd.grad(out.float().square().sum(), layer.weight_hh_l0)[0] for out in (low, wide)
    )
    assert (found - true).norm() < 0.02 * true.norm()


@random_cases(4, batch=3, state=True)
def test_torch_func(case):
    """vmap, grad and jvp, which run the reference."""
    drawn = case.draw()

    def scalar(x):
        return drawn.ours(**(drawn.leaves | {"x": x}))["out"].square().sum()

    def expected(x):
        return drawn.cell_by_cell(**(drawn.leaves | {"x": x}))["out"].square().sum()

    x = drawn.data["x"]
    torch.testing.assert_close(torch.func.grad(scalar)(x), torch.func.grad(expected)(x), rtol=1e-4, atol=1e-4)
    stacked = torch.stack([x, x.flip(0)])
    torch.testing.assert_close(
        torch.func.vmap(scalar)(stacked), torch.stack([expected(s) for s in stacked]), rtol=1e-4, atol=1e-4
    )
    tangent = torch.randn_like(x)
    torch.testing.assert_close(
        torch.func.jvp(scalar, (x,), (tangent,)), torch.func.jvp(expected, (x,), (tangent,)), rtol=1e-3,
        atol=1e-3,
    )  # fmt: skip


@kinds
def test_per_sample_gradients(kind):
    layer = getattr(nn, kind)(4, 6)
    params = dict(layer.named_parameters())
    xs = torch.randn(3, 5, 1, 4)

    def loss(params, x):
        return getattr(cf.functional, kind.lower())(x, None, list(params.values()))[0].square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, xs)
    for i, x in enumerate(xs):
        (layer(x)[0].square().sum()).backward()
        for name, p in params.items():
            torch.testing.assert_close(got[name][i], p.grad, rtol=1e-4, atol=1e-5)
            p.grad = None


# ---------------------------------------------------------------- runs


@needs_extension
@random_cases(6, time=8, layers=2)
def test_same_bits_from_run_to_run(case):
    drawn = case.draw()
    grads = result_gradients(drawn)
    first = gradients(drawn.ours, drawn.leaves, grads)
    for _ in range(2):
        again = gradients(drawn.ours, drawn.leaves, grads)
        assert all(torch.equal(first[n], again[n]) for n in first)


@needs_extension
def test_memory_stays_flat():
    """Shapes that change from call to call leave nothing behind: 1,000 calls, or 10,000 in a long run."""
    import psutil

    long = os.environ.get("CNNLSTM_FAST_LONG") == "1"

    rng = random.Random(5)
    process = psutil.Process()

    def calls(count: int) -> int:
        for _ in range(count):
            drawn = random_case(rng, time=rng.randrange(1, 40), layers=1).draw()
            leaves = {n: t.requires_grad_() for n, t in drawn.leaves.items()}
            drawn.ours(**leaves)["out"].sum().backward()
        return process.memory_info().rss

    before = calls(300)
    assert calls(9700 if long else 700) - before < 16 << 20


# ---------------------------------------------------------------- errors

r = torch.randn


def weights(kind="LSTM", inputs=5, hidden=7, **more) -> list[Tensor]:
    return list(getattr(nn, kind)(inputs, hidden, **more)._flat_weights)


def call(kind="lstm", x=None, hx=None, params=None, **more):
    x = r(6, 3, 5) if x is None else x
    params = weights(kind.upper()) if params is None else params
    return getattr(cf.functional, kind)(x, hx, params, **more)


def no(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool)


# name -> (arguments, exception, words that the message must hold: got, expected, mend)
WRONG = {
    "an array": (dict(x=[[1.0]]), TypeError, ["tensor", "list"]),
    "four dimensions": (dict(x=r(2, 6, 3, 5)), ValueError, ["(2, 6, 3, 5)", "(T, B, I)", "flatten"]),
    "one dimension": (dict(x=r(5)), ValueError, ["(5,)", "(T, I)"]),
    "a map": (dict(x=r(2, 6, 3, 5), batch_first=True), ValueError, ["(B, T, I)"]),
    "no steps": (dict(x=r(0, 3, 5)), ValueError, ["(0, 3, 5)", "one step"]),
    "other features": (dict(x=r(6, 3, 4)), ValueError, ["expects 5", "4", "input_size=4"]),
    "features first": (dict(x=r(5, 6, 3)), ValueError, ["expects 5", "3", "move"]),
    "too few parameters": (dict(params=weights()[:3]), ValueError, ["3 parameters", "4", "w_ih, w_hh, b_ih"]),
    "parameters without bias": (dict(params=weights(bias=False)), ValueError, ["2 parameters", "4"]),
    "too many layers": (dict(num_layers=3), ValueError, ["4 parameters", "12", "3 layers"]),
    "a GRU's parameters": (dict(params=weights("GRU", hidden=7)), ValueError, ["(21, 5)", "4 * hidden"]),
    "a parameter's shape": (
        dict(params=[*weights()[:1], r(28, 6), *weights()[2:]]), ValueError, ["(28, 6)", "(28, 7)"],
    ),
    "a second layer's input": (
        dict(params=[*weights(), *weights()], num_layers=2), ValueError, ["(28, 5)", "layer 1", "(28, 7)"],
    ),
    "a bias's shape": (dict(params=[*weights()[:3], r(27)]), ValueError, ["(27,)", "(28,)"]),
    "a projection's shape": (
        dict(params=[*weights(proj_size=3)[:4], r(7, 3)], proj_size=3), ValueError, ["(7, 3)", "(3, 7)"],
    ),
    "a parameter that is none": (dict(params=[*weights()[:3], None]), TypeError, ["NoneType", "tensors"]),
    "an LSTM's state of one tensor": (dict(hx=r(1, 3, 7)), TypeError, ["pair", "(1, 3, 7)"]),
    "a state of lists": (dict(hx=([0.0], [0.0])), TypeError, ["h_0", "list"]),
    "a state's width": (dict(hx=(r(1, 3, 6), r(1, 3, 7))), ValueError, ["h_0", "(1, 3, 6)", "(1, 3, 7)"]),
    "a cell's width": (dict(hx=(r(1, 3, 7), r(1, 3, 6))), ValueError, ["c_0", "(1, 3, 6)", "(1, 3, 7)"]),
    "a batch-first state": (
        dict(hx=(r(3, 1, 7), r(3, 1, 7))), ValueError, ["(3, 1, 7)", "(1, 3, 7)", "never batch-first"],
    ),
    "a state without batch": (dict(hx=(r(1, 7), r(1, 7))), ValueError, ["(1, 7)", "(1, 3, 7)"]),
    "a state with batch for one sequence": (
        dict(x=r(6, 5), hx=(r(1, 1, 7), r(1, 1, 7))), ValueError, ["(1, 1, 7)", "(1, 7)"],
    ),
    "a GRU's state of two": (dict(kind="gru", hx=(r(1, 3, 7),) * 2), TypeError, ["h_0", "tuple"]),
    "double input": (dict(x=r(6, 3, 5).double()), TypeError, ["float64", "float32", ".to(dtype)"]),
    "a double state": (
        dict(hx=(r(1, 3, 7).double(), r(1, 3, 7))), TypeError, ["float64", "float32", "initial state"],
    ),
    "whole numbers": (dict(x=torch.ones(6, 3, 5, dtype=torch.int64)), TypeError, ["int64", "float32"]),
    "a float reset": (dict(reset=r(6, 3)), TypeError, ["float32", "bool", "reset.bool()"]),
    "a reset that is a list": (dict(reset=[False]), TypeError, ["list", "bool tensor"]),
    "a transposed reset": (dict(reset=no(3, 6)), ValueError, ["(3, 6)", "(6, 3) = (T, B)", "reset.T"]),
    "a transposed reset, batch first": (
        dict(x=r(3, 6, 5), batch_first=True, reset=no(6, 3)), ValueError, ["(6, 3)", "(3, 6) = (B, T)"],
    ),
    "a reset of one sequence": (dict(reset=no(6)), ValueError, ["(6,)", "(6, 3)"]),
    "a reset for one sequence": (dict(x=r(6, 5), reset=no(6, 1)), ValueError, ["(6, 1)", "(6,) = (T,)"]),
    "a reset elsewhere": (dict(reset=no(6, 3).to("meta")), ValueError, ["meta", "cpu", "reset.to('cpu')"]),
    "float lengths": (dict(lengths=torch.ones(3)), TypeError, ["float32", "integers", "lengths.long()"]),
    "bool lengths": (dict(lengths=no(3)), TypeError, ["bool", "integers"]),
    "lengths of words": (dict(lengths=["a"]), TypeError, ["list", "integers"]),
    "too few lengths": (dict(lengths=torch.tensor([1, 2])), ValueError, ["(2,)", "(3,)"]),
    "one length": (dict(lengths=torch.tensor(2)), ValueError, ["()", "(3,)"]),
    "lengths for one sequence": (dict(x=r(6, 5), lengths=torch.tensor([2])), ValueError, ["(1,)", "()"]),
    "negative lengths": (dict(lengths=torch.tensor([2, -1, 6])), ValueError, ["-1 to 6", "0 to 6", "clamp"]),
    "lengths too long": (dict(lengths=torch.tensor([2, 1, 7])), ValueError, ["1 to 7", "0 to 6", "clamp"]),
    "a dropout of two": (dict(dropout=2.0), ValueError, ["dropout=2.0", "0 to 1"]),
    "an unknown plan": (dict(plan="cudnn"), ValueError, ["'cudnn'", "fused", "library"]),
    "a library with resets": (dict(plan="library", reset=no(6, 3)), ValueError, ["library", "reset"]),
    "fused doubles": (
        dict(plan="fused", x=r(6, 3, 5).double(), params=[p.double() for p in weights()]), ValueError,
        ["float64", 'plan="auto"'],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors_say_what_to_do(name):
    arguments, exception, words = WRONG[name]
    with pytest.raises(exception) as caught:
        call(**arguments)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


def test_hints_only_where_they_help():
    with pytest.raises(ValueError) as caught:
        call(reset=no(6, 4))
    assert not re.search(r"reset\.T", str(caught.value))


@kinds
@plans
def test_plans_agree(kind, plan):
    """The name of a plan changes nothing but the way."""
    drawn = Case(kind, 6, 17, 7, 4, layers=2, bidirectional=True).draw()
    expected = plain_torch(drawn, **drawn.leaves)
    for name, t in drawn.ours(plan=plan, **drawn.leaves).items():
        torch.testing.assert_close(t, expected[name])
