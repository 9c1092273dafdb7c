"""Products of bfloat16 by the processor's unit, and by its emulation in plain C++, which runs anywhere."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import needs_extension, run_python
from sequences import assert_case, kinds, random_cases, result_gradients
from torch import nn

import cnnlstm_fast as cf
from cnnlstm_fast.planning import recurrent as planning

UNIT = torch.ops.cnnlstm_fast.bfloat16_unit() if cf._ext.loaded else ""
needs_unit = pytest.mark.skipif(not UNIT, reason="the processor or this build has no unit for bfloat16")
pytestmark = needs_extension


# ---------------------------------------------------------------- one product


def rounded(value: Fraction) -> np.float32:
    """The nearest float32, of two the even one; denormal numbers are zero."""
    near = np.float32(float(value))
    around = [np.nextafter(near, np.float32(way)) for way in (-np.inf, np.inf)]
    best = min((near, *around), key=lambda f: (abs(Fraction(float(f)) - value), int(f.view(np.uint32)) & 1))
    return flushed(best)


def flushed(value: np.float32) -> np.float32:
    return value if abs(value) >= np.finfo(np.float32).tiny else np.float32(0)


def pair_added(total, a, b) -> np.float32:
    """What one unit gives: the second product is added first, each sum rounded once."""
    total = flushed(np.float32(total))
    for i in (1, 0):
        x, y = (flushed(np.float32(float(t[i]))) for t in (a, b))
        total = rounded(Fraction(float(total)) + Fraction(float(x)) * Fraction(float(y)))
    return total


def numbers(count: int, spread: float) -> torch.Tensor:
    return torch.randn(count) * torch.exp2(torch.randint(-1, 2, (count,)) * spread)


@needs_unit
@pytest.mark.parametrize("spread", [0.0, 12.0, 62.0])
def test_a_product_rounds_as_defined(spread):
    """Against exact fractions: products are not rounded, sums are, and denormal numbers are zero."""
    a, b = numbers(6000, spread).bfloat16(), numbers(6000, spread).bfloat16()
    total = numbers(3000, 2 * spread)
    found = torch.ops.cnnlstm_fast.bfloat16_dot(a, b, total)
    pairs = zip(total, a.view(-1, 2), b.view(-1, 2), strict=True)
    true = torch.tensor([float(pair_added(*pair)) for pair in pairs])
    assert torch.equal(found, true)


@needs_unit
@pytest.mark.parametrize("count", [1, 15, 16, 33])
def test_infinities_and_nans(count):
    a, b = torch.ones(2 * count).bfloat16(), torch.ones(2 * count).bfloat16()
    total = torch.zeros(count)
    a[0], b[-1] = float("inf"), float("nan")
    found = torch.ops.cnnlstm_fast.bfloat16_dot(a, b, total)
    assert found[-1].isnan()
    if count > 1:
        assert found[0] == float("inf") and (found[1:-1] == 2).all()
    a[0], b[0] = float("inf"), 0
    assert torch.ops.cnnlstm_fast.bfloat16_dot(a, b, total)[0].isnan()


@needs_unit
@pytest.mark.parametrize("wrong", ["short", "float32", "strided"])
def test_wrong_products_are_refused(wrong):
    a, b, total = torch.ones(8).bfloat16(), torch.ones(8).bfloat16(), torch.zeros(4)
    a = {"short": a[:6], "float32": a.float(), "strided": torch.ones(16).bfloat16()[::2]}[wrong]
    with pytest.raises(RuntimeError, match="bfloat16_dot: a does not fit"):
        torch.ops.cnnlstm_fast.bfloat16_dot(a, b, total)


_PRODUCTS = """
import sys, torch, cnnlstm_fast as cf
given = torch.load(sys.argv[1])
found = {"dot": torch.ops.cnnlstm_fast.bfloat16_dot(*given["dot"])}
for kind, weights, x, reset in given["layers"]:
    function = getattr(cf.functional, kind.lower())
    found[kind] = function(x, None, weights, reset=reset, plan="fused")[0]
torch.save((torch.ops.cnnlstm_fast.bfloat16_unit(), found), sys.argv[2])
"""


def _in_emulation(given: dict, tmp_path: Path) -> dict:
    files = [str(tmp_path / "given"), str(tmp_path / "found")]
    torch.save(given, files[0])
    ran = run_python(f"import sys; sys.argv[1:] = {files!r}\n{_PRODUCTS}", CNNLSTM_FAST_BFLOAT16="emulated")
    assert ran.returncode == 0, ran.stderr[-2000:]
    unit, found = torch.load(files[1])
    assert unit == "emulated"
    return found


def test_the_emulation_rounds_as_defined(tmp_path):
    """So that what CI tests on any processor is the arithmetic of the unit."""
    a, b, total = numbers(2000, 50).bfloat16(), numbers(2000, 50).bfloat16(), numbers(1000, 90)
    found = _in_emulation({"dot": (a, b, total), "layers": []}, tmp_path)["dot"]
    pairs = zip(total, a.view(-1, 2), b.view(-1, 2), strict=True)
    assert torch.equal(found, torch.tensor([float(pair_added(*pair)) for pair in pairs]))


@needs_unit
def test_the_unit_and_its_emulation_give_the_same(tmp_path):
    """Products to the bit; layers but for the roundings of their gates, which can turn one of an output."""
    a, b, total = numbers(4000, 30).bfloat16(), numbers(4000, 30).bfloat16(), numbers(2000, 60)
    layers = []
    for kind in ("LSTM", "GRU"):
        layer = getattr(nn, kind)(9, 21).bfloat16()
        reset = torch.rand(7, 13) < 0.2
        layers.append(
            (kind, [p.detach() for p in layer.parameters()], torch.randn(7, 13, 9).bfloat16(), reset)
        )
    emulated = _in_emulation({"dot": (a, b, total), "layers": layers}, tmp_path)
    assert torch.equal(emulated["dot"], torch.ops.cnnlstm_fast.bfloat16_dot(a, b, total))
    for kind, weights, x, reset in layers:
        function = getattr(cf.functional, kind.lower())
        ours = function(x, None, weights, reset=reset, plan="fused")[0]
        apart = (ours.float() - emulated[kind].float()).abs() > 2**-8 * ours.float().abs() + 1e-6
        assert apart.float().mean() < 0.01


def test_the_peak_of_products():
    assert (torch.ops.cnnlstm_fast.bfloat16_peak(0.01) > 0) == bool(UNIT)


# ---------------------------------------------------------------- whole layers


@random_cases(12, bias=True, proj_size=0)
def test_layers(case):
    """Forward and gradients by the numbers rule, of any sizes, resets, lengths, layouts."""
    drawn = case.draw(torch.bfloat16)
    assert_case(drawn, drawn.ours, {n: g.bfloat16() for n, g in result_gradients(drawn).items()})


@random_cases(3, bias=True, proj_size=0, inputs=1101, hidden=17, time=3, batch=9, layers=1)
def test_inputs_that_are_projected_ahead(case):
    drawn = case.draw(torch.bfloat16)
    assert_case(drawn, drawn.ours, {n: g.bfloat16() for n, g in result_gradients(drawn).items()})


@random_cases(3, bias=True, proj_size=0, hidden=65, time=4, batch=70, layers=1)
def test_many_sequences(case):
    drawn = case.draw(torch.bfloat16)
    assert_case(drawn, drawn.ours, {n: g.bfloat16() for n, g in result_gradients(drawn).items()})


@pytest.mark.first
def test_layers_by_the_emulation():
    """The tests above, and those of bfloat16 elsewhere, where the kernels are the emulation."""
    if os.environ.get("CNNLSTM_FAST_BFLOAT16"):
        pytest.skip("this run is itself in emulation")
    root = Path(cf.__file__).parents[1]
    env = os.environ | {
        "CNNLSTM_FAST_BFLOAT16": "emulated", "PYTHONPATH": str(root), "MALLOC_PERTURB_": "128",
        "CNNLSTM_FAST_SHARE": os.environ.get("CNNLSTM_FAST_SHARE", "3"),
    }  # fmt: skip
    files = ("tests/test_bfloat16.py", "tests/test_recurrent.py", "tests/test_recurrent_ops.py")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider",
         "-k", "layers or ahead or many_sequences or test_bfloat16 or as_exact", *files],
        env=env, cwd=root, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, f"{ran.stdout[-4000:]}{ran.stderr[-2000:]}"


@needs_unit
@kinds
@pytest.mark.parametrize("inputs", [6, 7])
def test_strided_inputs(kind, inputs):
    """Rows that are no whole words, or that begin between two, are copied: the same bits as of a copy."""
    layer = getattr(cf, kind)(inputs, 5).bfloat16()
    wide = torch.randn(9, 4, 2 * inputs + 1).bfloat16()
    for x in (
        wide[..., 1 : inputs + 1],
        wide[..., ::2][..., :inputs],
        wide[..., :inputs],
        wide[::2, ..., -inputs:],
    ):
        assert torch.equal(layer(x)[0], layer(x.clone(memory_format=torch.contiguous_format))[0])


@needs_unit
@kinds
def test_a_sequence_alone_has_the_bits_that_it_has_in_a_batch(kind):
    layer = getattr(cf, kind)(11, 19, 2, bidirectional=True).bfloat16()
    x = torch.randn(6, 75, 11).bfloat16()
    out = layer(x)[0]
    for i in (0, 37, 74):
        assert torch.equal(layer(x[:, i : i + 1])[0], out[:, i : i + 1])


@needs_unit
@kinds
def test_a_nan_stays_in_its_sequence(kind):
    layer = getattr(cf, kind)(7, 9).bfloat16()
    x = torch.randn(5, 14, 7).bfloat16()
    clean = layer(x)[0]
    x[2, 3, 6] = float("nan")
    out = layer(x)[0]
    assert out[2:, 3].isnan().all() and torch.equal(out[:2], clean[:2])
    others = [i for i in range(14) if i != 3]
    assert torch.equal(out[:, others], clean[:, others])


# ---------------------------------------------------------------- autocast


@pytest.fixture
def at_any_size(monkeypatch):
    """Layers of any size are rounded under autocast."""
    monkeypatch.setattr(planning, "_ROUNDING_ROWS", 0)
    monkeypatch.setattr(planning, "_ROUNDING_PRODUCTS", 0)


@needs_unit
@kinds
@pytest.mark.parametrize("packed", [False, True])
def test_autocast_is_as_exact_as_pytorchs(kind, packed, at_any_size):
    """Errors against float64 at most twice PyTorch's own; the dtypes of results and gradients are its own."""
    layer = getattr(nn, kind)(24, 40, 2, bidirectional=True)
    fast = getattr(cf, kind)(24, 40, 2, bidirectional=True)
    fast.load_state_dict(layer.state_dict())
    true = copy.deepcopy(layer).double()
    x, weight = torch.randn(9, 16, 24), torch.randn(9, 16, 80)
    lengths = [9] * 8 + [5] * 8
    results = []
    for module, low in ((true, False), (layer, True), (fast, True)):
        dtype = torch.float32 if low else torch.float64
        given = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            if packed:
                out, last = module(nn.utils.rnn.pack_padded_sequence(given, lengths))
                out = nn.utils.rnn.pad_packed_sequence(out)[0]
            else:
                out, last = module(given)
        last = last if isinstance(last, tuple) else (last,)
        grads = torch.autograd.grad((out.to(dtype) * weight.to(dtype)).sum(), [given, *module.parameters()])
        results.append([out, *last, *grads])
    for exact, own, ours in zip(*results, strict=True):
        assert ours.dtype == own.dtype
        error, most = ((t.double() - exact).norm() for t in (ours, own))
        assert error <= 2 * most


@needs_unit
def test_small_layers_are_not_rounded():
    """Rounding weights costs more than it saves there: float32 comes out, in the dtype that PyTorch gives."""
    layer = cf.LSTM(8, 8)
    x = torch.randn(3, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)[0]
    assert out.dtype == torch.bfloat16 and torch.equal(out, layer(x)[0].bfloat16())


def test_a_lower_set_has_no_unit():
    """``CNNLSTM_FAST_ISA`` forbids it as the sets above that it names."""
    code = "import torch, cnnlstm_fast; print(repr(torch.ops.cnnlstm_fast.bfloat16_unit()))"
    for isa in ("avx512", "avx2", "baseline"):
        assert run_python(code, CNNLSTM_FAST_ISA=isa, CNNLSTM_FAST_BFLOAT16="").stdout.strip() == "''"
