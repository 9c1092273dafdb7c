"""How plans are chosen: costs from counts and rates, rates from races, and plans that are timed."""

from __future__ import annotations

import ast
import copy
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import run_forked
from helpers import needs_extension
from torch import nn
from torch._dynamo.testing import CompileCounter

import cnnlstm_fast as cf
from benchmarks import calibrate, calibrate_epilogue
from cnnlstm_fast import planning
from cnnlstm_fast.functional import conv_block
from cnnlstm_fast.functional.conv_block import plan_call
from cnnlstm_fast.ops import conv_fft
from cnnlstm_fast.planning import choose, costs, rates, tuner
from cnnlstm_fast.planning.choose import PLANS, least

FOLDER = Path(planning.__file__).parent
RATES = sorted(path.stem for path in (FOLDER / "rates").glob("*.json"))
files = pytest.mark.parametrize("name", RATES)


def problems(count: int, dtype: str = "float32"):
    """Random problems of all kinds in all modes, up to 300 ms large."""
    for block, channels_last in calibrate.draw(count, random.randrange(2**31), ms=(0.02, 300)):
        for mode, needs_x in (("inference", False), ("training", False), ("training", True)):
            race = calibrate.Race(block, mode, channels_last, needs_x, dtype, {}, {})
            yield race.problem()


# ---------------------------------------------------------------- costs


def test_no_rule_is_a_list_of_thresholds():
    """Numbers stand in the rates, and in a few named constants."""
    named, bare, units = 0, [], (1e3, 1e9, 100)

    def numbers(node):
        powers = [n for n in ast.walk(node) if isinstance(n, ast.BinOp) and isinstance(n.left, ast.Constant)]
        bases = {id(n.left) for n in powers if isinstance(n.right, ast.Constant)}  # 1 << 20 is one number
        found = [n for n in ast.walk(node) if isinstance(n, ast.Constant) and type(n.value) in (int, float)]
        return [n for n in found if n.value not in units and id(n) not in bases]

    for path in FOLDER.glob("*.py"):
        tree = ast.parse(path.read_text())
        named += sum(len(numbers(node)) for node in tree.body if isinstance(node, ast.Assign))
        compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
        bare += [f"{path.name}:{n.lineno}" for node in compared for n in numbers(node) if abs(n.value) > 4]
    assert named < 40 and not bare, (named, bare)


@files
def test_every_term_has_a_rate(name):
    given = rates.read(name)
    assert given.plans.keys() == given.epilogues.keys() >= {"float32", "bfloat16"}
    for kind, plans in given.plans.items():
        for plan, ways in plans.items():
            for terms in ways.values():
                assert all(rate >= 0 and math.isfinite(rate) for rate in terms.values()), plan
        for kinds in (("norm", "activation"), ("norm", "sum", "slow curve"), ("norm", "curve")):
            for way, count in costs.PASSES.items():
                for of_batch in (False, True):
                    for rate in given.epilogues[kind][way].values():
                        assert count(1e7, 4, kinds, of_batch, True).keys() <= rate.keys()
        for problem in problems(100, kind.partition(" ")[0]):
            for plan, ways in plans.items():
                for rate, counts in zip(ways.values(), costs.COUNTS[plan], strict=True):
                    assert counts(problem).keys() <= rate.keys()


def test_bfloat16_by_amx_has_rates_of_its_own(monkeypatch):
    """Where oneDNN has it; a file without them has those of bfloat16."""
    given = rates.read("avx512-intel")
    both = [given.plans[kind]["reference"]["forward"] for kind in ("bfloat16", "bfloat16 by amx")]
    for amx in (False, True):
        monkeypatch.setattr(rates, "library_has_amx", lambda amx=amx: amx)
        assert given.of(torch.bfloat16, "reference")[0] is both[amx]
        assert given.of(torch.float32, "reference")[0] is given.plans["float32"]["reference"]["forward"]
        other = rates.read("avx512-amd")
        assert other.of(torch.bfloat16, "direct")[0] is other.plans["bfloat16"]["direct"]["forward"]
    assert both[0] != both[1]


@files
def test_more_images_never_cost_less(name):
    given = rates.read(name)
    for problem in problems(100):
        more = problem._replace(batch=2 * problem.batch)
        if costs._kind(more) != costs._kind(problem):  # PyTorch computes small inputs in another way
            continue
        twice = costs.predict(more, given, costs.COUNTS)
        for plan, once in costs.predict(problem, given, costs.COUNTS).items():
            assert 0 < once <= twice[plan] * (1 + 1e-12), plan


def test_counted_by_hand():
    """The tutorial's block: 2 x 3x8x8 to 64 channels by 3x3 taps, ReLU, pooled by 2, into features."""
    block = calibrate.Block(
        "", 2, 3, (8, 8), 64, (3, 3), (1, 1), (1, 1), pool=("Max", (2, 2), (2, 2), (0, 0)), layout="features"
    )
    problem = calibrate.Race(block, "inference", False, False, "float32", {}, {}).problem()
    places, taps, x, out = 2 * 64, 27, 2 * 3 * 64, 2 * 64 * 16
    assert costs.direct_forward(problem) == {
        "products dense": places * 4 * taps, "broadcasts": places * taps, "tiles": 2 * 8 * 2 * 4 * taps,
        "weights": 64 * taps, "x first": x, "x again": 2 * x, "out": out, "out across": out,
        "windows": 4 * out, "calls": 1,
    }  # fmt: skip
    seen = taps * (22 / 24) ** 2  # rows and columns at the edge see two of three
    assert costs.reference_forward(problem) == pytest.approx({
        "products image": places * 4 * seen, "broadcasts": places * seen, "tiles": 2 * 8 * 2 * 4 * seen,
        "weights": 64 * taps, "library calls": 1, "x first": x, "map first": 64 * places,
        "activation": 64 * places, "windows first": 4 * out, "out first": out, "calls": 2,
    })  # fmt: skip


def kind_of(batch, channels, size, out_channels, kernel, *, groups=1, stride=1, last=False, mode="inference"):
    """The kind of convolution that the library is taken to run, by one thread."""
    padding = tuple(k // 2 for k in kernel)
    block = calibrate.Block(
        "", batch, channels, size, out_channels, kernel, (stride, stride), padding, groups=groups
    )
    race = calibrate.Race(block, mode, last, mode == "training", "float32", {}, {}, threads=1)
    return costs._kind(race.problem())


def test_kinds_of_the_library():
    """As oneDNN's own log names what runs (ONEDNN_VERBOSE)."""
    assert kind_of(4, 32, (11, 71), 24, (4, 4), groups=4) == "columns"  # 8 and 6 channels of a group
    assert kind_of(4, 32, (11, 71), 24, (4, 4), groups=4, last=True) == "narrow groups"
    assert kind_of(4, 64, (11, 71), 64, (3, 3), groups=4) == "groups"
    assert kind_of(4, 32, (11, 71), 64, (3, 3), groups=32) == "columns"
    assert kind_of(4, 32, (11, 71), 32, (3, 3), groups=32) == "depthwise"
    assert kind_of(4, 12, (11, 71), 20, (3, 3)) == "image"
    assert kind_of(4, 12, (11, 71), 20, (3, 3), stride=2) == "strided image"
    assert kind_of(4, 32, (28, 63), 48, (5, 15)) == "columns"
    assert (
        kind_of(4, 32, (28, 63), 48, (5, 14)) == kind_of(4, 32, (28, 63), 48, (5, 15), last=True) == "dense"
    )
    assert kind_of(1, 32, (8, 8), 48, (3, 3)) == "columns"  # a small input is PyTorch's own affair
    assert kind_of(2, 32, (8, 8), 48, (3, 3)) == "dense"


@files
def test_wide_kernels_are_not_trained_channels_last(name):
    """The library has only loops over single elements for the gradient of such weights."""
    block = calibrate.Block("", 2, 16, (28, 63), 40, (5, 31), (1, 1), (2, 15))
    found = {}
    for last in (False, True):
        race = calibrate.Race(block, "training", last, True, "float32", {}, {}, threads=1)
        found[last] = costs.predict(race.problem(), rates.read(name), ("reference", "direct", "chunked"))
    assert found[False]["chunked"] > 2 * found[False]["direct"]
    assert found[True]["reference"] > 2 * found[False]["reference"]


@files
def test_an_epilogue_saves_passes_and_costs_a_call(name):
    args = torch.float32, ("norm", "sum", "activation"), True
    for training in (False, True):
        saved = [costs.epilogue_saves(n, *args, training, rates.read(name), 1) for n in (100, 3 * 10**6)]
        assert saved[0] < 0.1 * saved[1], saved
        assert saved[1] > 0


def test_epilogues_are_raced():
    rows = calibrate_epilogue.race_epilogues(6, 5, torch.float32)
    assert {*rows} == {*costs.PASSES} and all(len(raced) == 6 for raced in rows.values())
    found = calibrate_epilogue.fit_epilogues(rows)
    given = rates.read(RATES[0]).epilogues["float32"]
    for name, ways in found.items():
        for way, terms in ways.items():
            assert terms.keys() == given[name][way].keys() and all(rate >= 0 for rate in terms.values())


def test_rates_are_found_again():
    """Races of a machine whose rates are known, disturbed here and there."""
    true = rates.read(RATES[0])
    rng = random.Random(7)
    races = []
    for block, channels_last in calibrate.draw(300, seed=11):
        for mode in ("inference", "training"):
            kinds = channels_last, mode == "training", "float32"
            race = calibrate.Race(block, mode, *kinds, {}, {}, threads=true.threads)
            problem, forward, backward = race.problem(), {}, {}
            for plan in true.plans["float32"]:
                noise = rng.lognormvariate(0, 0.05) * (3 if rng.random() < 0.03 else 1)
                ways = [
                    noise * costs.nanoseconds(counts(problem), given) / 1e6
                    for counts, given in zip(costs.COUNTS[plan], true.of(problem.dtype, plan), strict=True)
                ]
                forward[plan], backward[plan] = ways[0], ways[1] if problem.training else 0.0
            races.append(replace(race, forward=forward, backward=backward))
    found = true._replace(plans={"float32": calibrate.fit_plans(races, {}, true.threads)})
    errors = []
    for problem in problems(100):
        expected = costs.predict(problem, true, costs.COUNTS)
        nearly = costs.predict(problem, found, costs.COUNTS)
        errors += [abs(math.log(nearly[plan] / ns)) for plan, ns in expected.items()]
    errors.sort()
    assert errors[len(errors) // 2] < 0.05 and errors[9 * len(errors) // 10] < 0.25


@needs_extension
def test_tilings_are_cut_by_the_rates_under_which_they_are_fastest():
    """Where only products take time, or only copies, other cuts are the fastest."""
    given = rates.read(RATES[0]).tilings
    before = conv_fft.rates
    races = calibrate.race_tilings(8, seed=3, clock=iter(range(10**6)).__next__)
    assert conv_fft.rates is before and sum(map(len, races)) > 16

    for term in given:
        timed = [[(counts, counts[term]) for counts, _ in cuts] for cuts in races]
        found = calibrate.fit_tilings(timed, given)
        chosen = [min(cuts, key=lambda cut: costs.nanoseconds(cut[0], found)) for cuts in timed]
        usual = [min(cuts, key=lambda cut: costs.nanoseconds(cut[0], given)) for cuts in timed]
        least = [min(seconds for _, seconds in cuts) for cuts in timed]
        over, usually = (
            sum(cut[1] / seconds for cut, seconds in zip(cuts, least, strict=True))
            for cuts in (chosen, usual)
        )
        assert over <= usually
    assert all(set(rates.read(name).tilings) == set(races[0][0][0]) for name in RATES)


def test_calls_do_not_divide_among_threads():
    counts = {"calls": 3.0, "products dense": 8.0, "library calls": 2.0}
    assert costs.shared(counts, 0.25) == {"calls": 3.0, "products dense": 2.0, "library calls": 2.0}
    given = rates.read(RATES[0])
    for problem in problems(30):
        one, many = (
            costs.predict(problem._replace(threads=threads), given, costs.COUNTS) for threads in (1, 64)
        )
        assert all(many[plan] <= one[plan] for plan in one)


def test_races_are_read_again(tmp_path):
    block, channels_last = calibrate.draw(1, seed=1)[0]
    races = [
        calibrate.Race(block, "training", channels_last, True, "float32", {"direct": 1.5}, {"direct": 2.0})
    ]
    calibrate.write_races(tmp_path / "races", races)
    assert calibrate.read_races(tmp_path / "races") == races


@needs_extension
def test_a_race_has_every_plan(tuning):
    block = calibrate.Block("", 2, 12, (9, 11), 16, (3, 3), (1, 1), (1, 1), norm=True)
    for mode in ("inference", "training"):
        race = calibrate.race(block, mode, True, seed=3, tune=True)
        assert set(race.forward) == set(PLANS) - {"fft"} and race.tuned in race.forward
        assert all(race.forward[plan] > 0 for plan in race.forward)
        assert all((race.backward[plan] > 0) == (mode == "training") for plan in race.backward)
        found = calibrate.regret([race], rates.read(RATES[0]))
        assert found.mean == found.worst == race.total(race.tuned) / min(map(race.total, race.forward))


# ---------------------------------------------------------------- the choice


def test_ours_must_promise_a_tenth():
    assert least({"reference": 1e6, "direct": 0.91e6, "chunked": 2e6})[:2] == ("reference", "reference")
    choice = least({"reference": 4.3e6, "direct": 1.9e6, "chunked": 2e6})
    assert choice == (
        "direct",
        "direct",
        "1.9 ms by direct, 4.3 ms by PyTorch",
        pytest.approx(1900),
        pytest.approx(2400),
        False,
    )
    assert "62 us by direct" in least({"reference": 6e4, "direct": 6.2e4}).reason


@needs_extension
def test_more_threads_or_fewer_choose_too():
    x, weight = torch.randn(4, 3, 16, 16), torch.randn(8, 3, 3, 3)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert conv_block(x, weight, padding=1).shape == (4, 8, 16, 16)
    finally:
        torch.set_num_threads(before)


@needs_extension
def test_every_size_of_an_extreme_block_is_chosen_for():
    """What no race had: nothing raises, whatever the sizes."""
    for shape, weight, keywords in (
        ((1, 1, 1, 1), (1, 1, 1, 1), {}),
        ((0, 3, 8, 8), (4, 3, 3, 3), {}),
        ((1, 2048, 1, 1), (2048, 2048, 1, 1), {}),
        ((1, 1, 1, 30000), (2, 1, 1, 999), {}),
        ((2, 512, 3, 3), (512, 1, 3, 3), {"groups": 512, "padding": 1}),
        ((3, 6, 9, 9), (9, 2, 3, 3), {"groups": 3, "stride": 3, "dilation": 2}),
    ):
        x, w = torch.randn(shape), torch.randn(weight)
        torch.testing.assert_close(
            conv_block(x, w, **keywords), cf.reference.conv_block(x, w, **keywords), rtol=1e-4, atol=1e-3
        )


@needs_extension
def test_a_compiled_program_serves_any_batch():
    """The choice asks no size that varies: one program, whatever the batch and the length."""
    counter = CompileCounter()
    weight = torch.randn(16, 8, 3)

    @torch.compile(backend=counter, dynamic=True, fullgraph=True)
    def program(x):
        return conv_block(x, weight, padding=1, layout="locations")

    for batch, length in ((2, 20), (33, 70), (700, 100)):
        x = torch.randn(batch, 8, length)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 2)
        expected = cf.reference.conv_block(x, weight, padding=1, layout="locations")
        torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


# ---------------------------------------------------------------- the tuner


BLOCK = dict(padding=1, pool=nn.MaxPool2d(2))


def tensors(requires_grad: bool = True):
    x, weight, bias = torch.randn(5, 3, 12, 14), torch.randn(24, 3, 3, 3), torch.randn(24)
    return x, weight.requires_grad_(requires_grad), bias.requires_grad_(requires_grad)


def slow(monkeypatch, seconds: dict[str, float]) -> list[list[str]]:
    """A clock by which plans take these seconds; what it was asked."""
    asked: list[list[str]] = []

    def in_turn(plans, run):
        asked.append(list(plans))
        for plan in plans:
            run(plan)
        return [seconds[plan] for plan in plans]

    monkeypatch.setattr(tuner, "_in_turn", in_turn)
    monkeypatch.setattr(tuner, "shortlist", lambda predicted: ["reference", "direct", "chunked"])
    return asked


def planned(x, weight, bias) -> choose.Choice:
    """What runs ``conv_block(x, weight, bias, **BLOCK)``."""
    args = 1, BLOCK["padding"], 1, 1, None, "relu", BLOCK["pool"], "channels_first"
    return plan_call(x, weight, bias, *args).choice


@needs_extension
@pytest.mark.parametrize("fastest", ["direct", "chunked", "reference"])
def test_the_fastest_runs_and_is_kept(tuning, monkeypatch, fastest):
    asked = slow(monkeypatch, {"reference": 3e-3, "direct": 3e-3, "chunked": 3e-3} | {fastest: 1e-3})
    x, weight, bias = tensors()
    before = planned(x, weight, bias)
    assert not asked and "timed" not in before.reason
    with cf.tune():
        choice = planned(x, weight, bias)
        assert choice.forward == fastest and choice.reason.startswith("timed: ")
        assert planned(x, weight, bias) == choice and len(asked) == 1
        tuner._known.clear()  # another process
        assert planned(x, weight, bias) == choice and len(asked) == 1
        with torch.no_grad():
            planned(x, weight, bias)
        planned(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
        assert len(asked) == 3 == len(list(tuning.iterdir()))
    assert planned(x, weight, bias) == before


@needs_extension
def test_a_tie_is_pytorchs(tuning, monkeypatch):
    slow(monkeypatch, {"reference": 1e-3, "direct": 0.98e-3, "chunked": 2e-3})
    with cf.tune():
        assert planned(*tensors()).forward == "reference"
    assert cf.tune(True) and tuner.enabled and not cf.tune(False).__exit__() and tuner.enabled
    cf.tune(False)
    assert not tuner.enabled


@needs_extension
@pytest.mark.parametrize("training", [False, True])
def test_timing_leaves_no_trace(tuning, monkeypatch, training):
    slow(monkeypatch, {"reference": 3e-3, "direct": 1e-3, "chunked": 3e-3})
    x, weight, bias = tensors()
    x.requires_grad_()
    norm = nn.BatchNorm2d(24).train(training)
    twin = copy.deepcopy(norm)
    state = torch.get_rng_state()
    with cf.tune():
        y = conv_block(x, weight, bias, norm=norm, **BLOCK)
    assert torch.equal(torch.get_rng_state(), state) and x.grad is None and weight.grad is None
    expected = cf.reference.conv_block(x, weight, bias, norm=twin, **BLOCK)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(norm.named_buffers()), dict(twin.named_buffers()), rtol=1e-4, atol=1e-4)
    versions = [t._version for t in (x, weight, bias)]
    assert versions == [0, 0, 0]


@needs_extension
def test_nothing_is_timed_while_others_watch(tuning, monkeypatch):
    asked = slow(monkeypatch, {"reference": 3e-3, "direct": 1e-3, "chunked": 3e-3})
    x, weight, bias = tensors(requires_grad=False)

    def call(x):
        return conv_block(x, weight, bias, **BLOCK)

    with cf.tune():
        torch.compile(call, backend="eager")(x)
        torch.jit.trace(call, x, check_trace=False)
        torch.func.vmap(lambda one: call(one))(x)
        torch.func.jvp(call, (x,), (x,))
        torch.export.export(cf.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), (x,))
        torch.utils.checkpoint.checkpoint(
            call, x.clone().requires_grad_(), use_reentrant=False
        ).sum().backward()
    assert not asked


@needs_extension
def test_two_processes_take_the_same_plan(tuning):
    """The first one times, whatever it finds; the second one reads it."""
    code = """
import torch, cnnlstm_fast as cf
from cnnlstm_fast.planning import tuner
torch.manual_seed(0)
if {reads}:
    tuner._in_turn = None
x, weight = torch.randn(4, 8, 20, 20), torch.randn(16, 8, 3, 3)
y = cf.functional.conv_block(x, weight, padding=1)
print(tuner.enabled, float(y.double().sum()).hex())
"""
    env = {"CNNLSTM_FAST_TUNE": "1", "CNNLSTM_FAST_CACHE": str(tuning)}
    first, second = (run_forked(code.replace("{reads}", reads), **env) for reads in ("False", "True"))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout and first.stdout.startswith("True")
    (path,) = tuning.iterdir()
    kept = json.loads(path.read_text())
    assert kept["schema"] == tuner.SCHEMA and kept["choices"][0] == "reference"


def test_the_shortlist():
    predicted = {"reference": 5.0, "direct": 1.0, "chunked": 1.5, "winograd": 1.7, "fft": 1.9}
    assert tuner.shortlist(predicted) == ["reference", "direct", "chunked", "winograd"]
    assert tuner.shortlist({"reference": 1.0, "direct": 2.0}) == ["reference"]
    assert set(PLANS) == set(costs.COUNTS)


def test_taps_beyond_the_image_are_not_counted():
    """As often as a kernel of ones sees the image of ones."""
    for _ in range(50):
        kernel = random.choice((1, 2, 3, 7, 31)), random.choice((1, 3, 5))
        stride, padding = random.choice(((1, 1), (2, 1))), random.choice(((0, 0), (3, 1), (15, 2)))
        block = calibrate.Block("", 1, 16, (9, 8), 16, kernel, stride, padding)
        if min(block.conv_size) < 1:
            continue
        p = calibrate.Race(block, "inference", False, False, "float32", {}, {}, threads=1).problem()
        ones = torch.ones(1, 1, *kernel)
        seen = torch.conv2d(torch.ones(1, 1, 9, 8), ones, stride=stride, padding=padding).mean() / ones.sum()
        assert costs._seen(p, 0) * costs._seen(p, 1) == pytest.approx(seen.item())
