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
from forked import run_forked
from helpers import UNIT, needs_extension
from sequences import assert_case, kinds, random_cases, result_gradients
from torch import nn

import cnnlstm_fast as cf
from cnnlstm_fast.planning import recurrent as planning

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


def multiplied_and_added(total: np.float32, x: float, y: float) -> np.float32:
    x, y = (flushed(np.float32(f)) for f in (x, y))
    return rounded(Fraction(float(total)) + Fraction(float(x)) * Fraction(float(y)))


def by_pairs(total: float, a: list[float], b: list[float]) -> np.float32:
    """AVX512_BF16's VDPBF16PS: of a pair the second product is added first, each sum rounded once."""
    result = np.float32(0)
    for k in range(0, len(a), 2):
        result = multiplied_and_added(result, a[k + 1], b[k + 1])
        result = multiplied_and_added(result, a[k], b[k])
    return result + np.float32(total)


def by_tiles(total: float, a: list[float], b: list[float]) -> np.float32:
    """AMX's TDPBF16PS: for 32 products at a time, those of even and of odd places are summed apart."""
    result = flushed(np.float32(total))
    for begin in range(0, len(a), 32):
        halves = [np.float32(0), np.float32(0)]
        for k in range(begin, min(begin + 32, len(a))):
            halves[k % 2] = multiplied_and_added(halves[k % 2], a[k], b[k])
        result = flushed(np.float32(result + flushed(np.float32(halves[0] + halves[1]))))
    return result


BY_DEFINITION = {"avx512_bf16": by_pairs, "emulated": by_pairs, "amx": by_tiles, "emulated_amx": by_tiles}


def numbers(shape: tuple[int, ...], spread: float) -> torch.Tensor:
    return torch.randn(shape) * torch.exp2(torch.randint(-1, 2, shape) * spread)


def draw_product(shape: tuple[int, int, int], spread: float) -> tuple[torch.Tensor, ...]:
    """a (M, K), b (K, N) and sums (M, N) for ``shape`` (M, K, N)."""
    m, k, n = shape
    return numbers((m, k), spread).bfloat16(), numbers((k, n), spread).bfloat16(), numbers((m, n), 2 * spread)


def assert_as_defined(unit: str, a: torch.Tensor, b: torch.Tensor, sums: torch.Tensor, found: torch.Tensor):
    """Against exact fractions: products are not rounded, sums are, and denormal numbers are zero."""
    rows, columns = a.tolist(), b.T.tolist()
    true = [
        [float(BY_DEFINITION[unit](float(sums[m, n]), row, column)) for n, column in enumerate(columns)]
        for m, row in enumerate(rows)
    ]
    assert torch.equal(found, torch.tensor(true))


#: Rows, products of a sum and columns: of parts of a tile, of whole ones and of both.
PRODUCTS = [(1, 2, 16), (19, 34, 21), (16, 64, 16), (3, 70, 5), (70, 6, 3)]


@needs_unit
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
@pytest.mark.parametrize("spread", [0.0, 12.0, 62.0])
def test_products_round_as_defined(shape, spread):
    given = draw_product(shape, spread)
    assert_as_defined(UNIT, *given, torch.ops.cnnlstm_fast.bfloat16_product(*given))


@needs_unit
def test_infinities_and_nans():
    a, b, sums = torch.ones(17, 34).bfloat16(), torch.ones(34, 18).bfloat16(), torch.zeros(17, 18)
    a[0, 0], a[16, 33] = float("inf"), float("nan")
    found = torch.ops.cnnlstm_fast.bfloat16_product(a, b, sums)
    assert (found[0] == float("inf")).all() and found[16].isnan().all() and (found[1:16] == 34).all()
    b[0, 3] = 0
    found = torch.ops.cnnlstm_fast.bfloat16_product(a, b, sums)
    assert found[0, 3].isnan() and found[0, 4] == float("inf")


@needs_unit
@pytest.mark.parametrize("wrong", ["short", "odd", "float32", "strided"])
def test_wrong_products_are_refused(wrong):
    a, b, sums = draw_product((3, 8, 5), 0.0)
    a = {"short": a[:, :6].clone(), "odd": a[:, :5].clone(), "float32": a.float(), "strided": a[:, ::2]}[
        wrong
    ]
    with pytest.raises(RuntimeError, match="bfloat16_product: "):
        torch.ops.cnnlstm_fast.bfloat16_product(a, b, sums)


_PRODUCTS = """
import sys, torch, cnnlstm_fast as cf
given = torch.load(sys.argv[1])
found = {"products": [torch.ops.cnnlstm_fast.bfloat16_product(*product) for product in given["products"]]}
for kind, weights, x, reset in given["layers"]:
    function = getattr(cf.functional, kind.lower())
    found[kind] = function(x, None, weights, reset=reset, plan="fused")[0]
torch.save((torch.ops.cnnlstm_fast.bfloat16_unit(), found), sys.argv[2])
"""


def _by(unit: str, given: dict, tmp_path: Path) -> dict:
    files = [str(tmp_path / "given"), str(tmp_path / "found")]
    torch.save(given, files[0])
    ran = run_forked(f"import sys; sys.argv[1:] = {files!r}\n{_PRODUCTS}", CNNLSTM_FAST_BFLOAT16=unit)
    assert ran.returncode == 0, ran.stderr[-2000:]
    used, found = torch.load(files[1])
    assert used == unit
    return found


@pytest.mark.parametrize("unit", ["emulated", "emulated_amx"])
def test_emulations_round_as_defined(unit, tmp_path):
    """So that what CI tests on any processor is the arithmetic of the unit."""
    given = [draw_product(shape, 50) for shape in PRODUCTS]
    found = _by(unit, {"products": given, "layers": []}, tmp_path)["products"]
    for product, result in zip(given, found, strict=True):
        assert_as_defined(unit, *product, result)


#: The units of the processor, and what emulates them.
EMULATIONS = {"avx512_bf16": "emulated", "amx": "emulated_amx"}
UNITS = [unit for unit in EMULATIONS if unit == UNIT or UNIT == "amx"]


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_and_its_emulation_give_the_same(unit, tmp_path):
    """Products to the bit; layers but for the roundings of their gates, which can turn one of an output."""
    products = [draw_product(shape, 30) for shape in PRODUCTS]
    layers = []
    for kind in ("LSTM", "GRU"):
        layer = getattr(nn, kind)(9, 21).bfloat16()
        reset = torch.rand(7, 13) < 0.2
        layers.append(
            (kind, [p.detach() for p in layer.parameters()], torch.randn(7, 13, 9).bfloat16(), reset)
        )
    given = {"products": products, "layers": layers}
    native, emulated = (_by(name, given, tmp_path) for name in (unit, EMULATIONS[unit]))
    for ours, expected in zip(native["products"], emulated["products"], strict=True):
        assert torch.equal(ours, expected)
    for kind, *_ in layers:
        ours, expected = native[kind].float(), emulated[kind].float()
        apart = (ours - expected).abs() > 2**-8 * ours.abs() + 1e-6
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


#: What stands for the units that this process does not use: themselves, where the processor has them.
OTHERS = [unit if unit in UNITS else emulation for unit, emulation in EMULATIONS.items() if unit != UNIT]


@pytest.mark.first
@pytest.mark.parametrize("unit", OTHERS)
def test_layers_by_other_units(unit):
    """The tests above, and those of bfloat16 elsewhere, by the kernels that this process does not use.

    Not those that choose a unit themselves.
    """
    if os.environ.get("CNNLSTM_FAST_BFLOAT16"):
        pytest.skip("this run is itself by another unit")
    root = Path(cf.__file__).parents[1]
    env = os.environ | {
        "CNNLSTM_FAST_BFLOAT16": unit, "PYTHONPATH": str(root), "MALLOC_PERTURB_": "128",
        "CNNLSTM_FAST_SHARE": os.environ.get("CNNLSTM_FAST_SHARE", "6"),
    }  # fmt: skip
    among = "layers or ahead or many_sequences or test_bfloat16 or as_exact"
    files = ("tests/test_bfloat16.py", "tests/test_recurrent.py", "tests/test_recurrent_ops.py")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider",
         "-k", f"({among}) and not emulation and not lower_set", *files],
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
def test_small_layers_are_not_rounded(monkeypatch):
    """Rounding weights costs more than it saves there: float32 comes out, in the dtype that PyTorch gives."""
    monkeypatch.setattr(planning, "_LIBRARY_HAS_AMX", False)  # it would be oneDNN's beside a lower unit
    layer = cf.LSTM(8, 8)
    x = torch.randn(3, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)[0]
    assert out.dtype == torch.bfloat16 and torch.equal(out, layer(x)[0].bfloat16())


def test_a_lower_set_has_no_unit():
    """``CNNLSTM_FAST_ISA`` forbids it as the sets above that it names."""
    code = "import torch, cnnlstm_fast; print(repr(torch.ops.cnnlstm_fast.bfloat16_unit()))"
    for isa in ("avx512", "avx2", "baseline"):
        assert run_forked(code, CNNLSTM_FAST_ISA=isa, CNNLSTM_FAST_BFLOAT16="").stdout.strip() == "''"
