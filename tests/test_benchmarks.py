"""The measuring core itself: ratios, the gate before the clock, result files, and what it watches."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import needs_extension, run_python
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import cnnlstm_fast as cf
from benchmarks import __main__ as command_line
from benchmarks import blocks, field, growth, memory, plot, race, results, roofline, trace
from benchmarks.cases import CASES, INPUT_STEP, WEIGHT_STEP, Case, conv_flops, on_grid, recurrent, system
from benchmarks.dispatch import Dispatch, Step, measure_step
from benchmarks.peers import PEERS, Peer
from benchmarks.race import OURS, PEER_ERROR, Spread, WrongResult
from benchmarks.recurrent import recurrent_flops
from cnnlstm_fast.nn.stream import Stream


def quick() -> dict:
    """A short race on inputs of this test's own seed (conftest.py seeds ``random``)."""
    return {"rounds": 2, "turn_s": 0.0, "seed": random.randrange(10**6)}


@pytest.fixture(autouse=True)
def _one_thread(_fresh_state):
    """Nothing here is large enough for two."""
    torch.set_num_threads(1)


def small(kind: str = "Simple", mode: str = "inference", **options) -> Case:
    case = system(kind, mode=mode, batch=3, frames=7, size=(8, 10), hidden=4, **options)
    return dataclasses.replace(case, peers=("eager", "chunked 16"))


def with_fast(case: Case, change) -> Case:
    """The case with its fast model changed by ``change(model)``."""

    def build():
        reference, fast = case.build()
        change(fast)
        return reference, fast

    return dataclasses.replace(case, build=build)


# ---------------------------------------------------------------- ratios


def test_spread_is_the_20th_50th_and_80th_percentile():
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == Spread(2.0, 3.5, 5.0)


def test_a_ratio_is_paired_within_its_round():
    """A round in which the whole machine was ten times slower must not move the ratio."""
    ours, theirs = [1.0, 10.0, 1.0, 2.0, 1.0], [3.0, 30.0, 3.0, 6.0, 3.0]
    assert race.paired_ratio(theirs, ours) == Spread(3.0, 3.0, 3.0)


def test_a_ratio_is_the_median_over_rounds():
    assert race.paired_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]).p50 == 2.0


def test_ratios_need_one_turn_of_each_per_round():
    with pytest.raises(ValueError, match="got 2 and 1 turns"):
        race.paired_ratio([1.0, 2.0], [1.0])


def test_the_best_peer_has_the_lowest_median():
    """One lucky call does not make a peer the best, one disturbed call does not unmake it."""
    assert race.best_peer({"lucky": [1.0, 9.0, 9.0], "steady": [4.0, 4.0, 400.0]}) == "steady"


def test_flops_of_a_convolution():
    """Counted by hand: 2 images of 4 x 5, 3 channels to 7, kernel 3x2, one multiply and one add each."""
    assert conv_flops(2 * 7 * 4 * 5, 3, (3, 2)) == 2 * (2 * 7 * 4 * 5) * (3 * 3 * 2)
    assert CASES["TimeDistributed/features/inference"].flops == 3_468_165_120


def test_flops_of_layers():
    """By hand: 3 sequences of 5 steps; the second layer of two directions reads both."""
    first = 3 * 5 * 2 * 4 * 7 * (2 + 7) * 2
    second = 3 * 5 * 2 * 4 * 7 * (14 + 7) * 2
    assert recurrent_flops("LSTM", (3, 5), 2, 7, layers=2, directions=2) == first + second
    assert recurrent_flops("GRU", (3, 5), 2, 7) == 3 * 5 * 2 * 3 * 7 * (2 + 7)
    assert round(CASES["Simple/model/inference"].flops / 1e9, 1) == 11.9


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("given", ["plain", "resets", "lengths"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_cases_race(kind, given, mode):
    """Loops and packed sequences compute what one call does; a wrong one is not timed."""
    case = recurrent(kind, (4, 6), 5, 7, given=given, mode=mode, layers=2)
    case = dataclasses.replace(case, peers=("eager",))
    result = race.race(case, **quick())
    assert [s.name for s in result.standings] == [OURS, "eager"] and result.left_out == {}

    def build_wrong():
        plain, fast = case.build()
        with torch.no_grad():
            fast.layer.weight_hh_l1 *= 1 + 1e-3
        return plain, fast

    with pytest.raises(WrongResult):
        race.race(dataclasses.replace(case, build=build_wrong), **quick())


# ---------------------------------------------------------------- the gate


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("stage", ["features", "model"])
@pytest.mark.parametrize("kind", ["Simple", "1DConv", "TimeDistributed"])
def test_a_right_case_races(kind, stage, mode):
    case = small(kind, mode, stage=stage)
    result = race.race(case, **quick())
    assert [s.name for s in result.standings] == [OURS, "eager", "chunked 16"]
    assert result.left_out == {}
    assert result.best in ("eager", "chunked 16")
    assert result.standing(OURS).ratio == Spread(1.0, 1.0, 1.0)
    used = case.build()[0] if stage == "model" else case.build()[0].cnn
    if kind != "1DConv":
        assert result.parameter_bytes == 4 * sum(p.numel() for p in used.parameters())
    assert all(0 < s.ms.p20 <= s.ms.p50 <= s.ms.p80 and s.error < PEER_ERROR for s in result.standings)
    assert (result.gflops is not None) == (mode == "inference")


def no_clock(*args, **kwargs):
    pytest.fail("something was timed behind a red gate")


def scale_weight(model: nn.Module) -> None:
    conv = model.cnn if isinstance(model.cnn, nn.Conv2d) else model.cnn[0]
    with torch.no_grad():
        conv.weight *= 1 + 1e-4


def scale_gradient(model: nn.Module) -> None:
    conv = model.cnn if isinstance(model.cnn, nn.Conv2d) else model.cnn[0]
    conv.bias.register_hook(lambda grad: grad * (1 + 1e-4))


def drop_gradient(model: nn.Module) -> None:
    (model.cnn if isinstance(model.cnn, nn.Conv2d) else model.cnn[0]).bias.requires_grad_(False)


def give_nan(model: nn.Module) -> None:
    right = model.features
    model.features = lambda x: right(x) * float("nan")


def give_another_shape(model: nn.Module) -> None:
    right = model.features
    model.features = lambda x: right(x)[:, :-1]


@pytest.mark.parametrize(
    ("mode", "fault", "said"),
    [
        ("inference", scale_weight, "the output is off"),
        ("inference", give_nan, "the output is off"),
        ("inference", give_another_shape, "the output is off"),
        ("training", scale_gradient, r"the gradient of cnn.*bias is off"),
        ("training", drop_gradient, r"the gradient of cnn.*bias is off"),
    ],
)
@pytest.mark.parametrize("kind", ["Simple", "TimeDistributed"])
def test_a_wrong_result_is_never_timed(monkeypatch, kind, mode, fault, said):
    monkeypatch.setattr(race, "turn", no_clock)
    with pytest.raises(WrongResult, match=said) as error:
        race.race(with_fast(small(kind, mode), fault), **(quick() | {"seed": 5}))
    assert "seed 5" in str(error.value) and kind in str(error.value)


def wrong_peer(case, model, x):
    return lambda x: case.forward(model, x.bfloat16().float())


def broken_peer(case, model, x):
    raise RuntimeError("no such operator\nand a long tail")


@pytest.mark.parametrize(
    ("prepare", "why"), [(wrong_peer, "the output is off"), (broken_peer, "no such operator")]
)
def test_a_wrong_or_broken_peer_is_left_out_by_name(monkeypatch, prepare, why):
    monkeypatch.setitem(PEERS, "bad", Peer("bad", prepare))
    result = race.race(dataclasses.replace(small(), peers=("bad", "eager")), **quick())
    assert [s.name for s in result.standings] == [OURS, "eager"]
    assert why in result.left_out["bad"] and "\n" not in result.left_out["bad"]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(PEERS, "absent", Peer("absent", broken_peer, package="no_such_package"))
    result = race.race(dataclasses.replace(small(), peers=("eager", "absent")), **quick())
    assert "pip install no_such_package" in result.left_out["absent"]


def test_a_lent_output_is_shown_but_never_the_best(monkeypatch):
    reference = system("Simple").build()[0]

    def lent(case, model, x):
        out = case.forward(reference, x)
        return lambda x: out

    fast_and_lent = Peer("lent", lent, lent=True)
    monkeypatch.setattr(race, "exceeding", lambda found, limits: None)
    monkeypatch.setitem(PEERS, "lent", fast_and_lent)
    result = race.race(dataclasses.replace(small(), peers=("eager", "lent")), **quick())
    assert result.standing("lent").lent and result.best == "eager"


def test_training_is_verified_where_sums_are_exact():
    """On the grid a float32 convolution equals float64's, so that no winner hangs on rounding."""
    reference, _ = system("TimeDistributed", size=(8, 8)).build()
    x = on_grid(torch.randn(4, 3, 8, 8), INPUT_STEP)
    conv = reference.cnn[0]
    exact = copy.deepcopy(conv).double()(x.double())
    assert torch.equal(conv(x).double(), exact)
    assert torch.equal(conv.weight, on_grid(conv.weight, WEIGHT_STEP)) and conv.weight.unique().numel() > 100


def test_turns_count_only_after_an_uncounted_call():
    seen = []
    times = race.turn(lambda batch: seen.append(batch), ["a", "b", "c"], seconds=10.0)
    assert len(times) == 20 and seen == ["c", *("a", "b", "c") * 6, "a", "b"]


# ---------------------------------------------------------------- peers


@pytest.mark.parametrize("name", ["channels_last", "chunked 16", "chunked 8"])
@pytest.mark.parametrize("stage", ["features", "model"])
@pytest.mark.parametrize(("kind", "batch"), [("Simple", 19), ("1DConv", 17), ("TimeDistributed", 5)])
def test_plain_peers_compute_the_model(name, stage, kind, batch):
    """Batches that chunks do not divide."""
    case = dataclasses.replace(small(kind, stage=stage), shape=(batch, *small(kind).shape[1:]))
    reference, _ = case.build()
    x = torch.randn(case.shape)
    with torch.no_grad():
        found = PEERS[name].prepare(case, copy.deepcopy(reference), x)(x)
        torch.testing.assert_close(found, case.forward(reference, x), rtol=1e-5, atol=1e-5)


def test_peers_that_do_not_train_say_so():
    case = small(mode="training")
    assert PEERS["OpenVINO"].why_not(case) == "OpenVINO does not train"
    assert PEERS["eager"].why_not(case) is None


def test_every_case_names_known_peers():
    for case in CASES.values():
        assert set(case.peers) <= set(PEERS) and set(case.targets) <= {"best", *case.peers}
        assert all(PEERS[name].trains for name in case.peers) or not case.training


def test_a_step_of_a_stream_is_checked_and_timed(monkeypatch):
    found = measure_step("LSTM", 5, 6, 2, 3, rounds=3, calls=2)
    assert found.layer == "LSTM 5-6x2" and found.batch == 3 and found.eager_us > 0 and found.ours_us > 0
    right = Stream.__call__
    monkeypatch.setattr(Stream, "__call__", lambda self, x: right(self, x) + 1e-3)
    with pytest.raises(WrongResult, match="a stream of GRU is off by 1"):
        measure_step("GRU", 5, 6, 1, 1, rounds=3, calls=2)


# ---------------------------------------------------------------- result files


def a_report() -> results.Report:
    report = results.Report.begin("quick")
    report.roofline.append(roofline.Roofline(228.0, "fma loop", 20.0))
    report.races.append(race.race(small(), **quick()))
    report.memory.extend(memory.Memory("Simple/features/training", s, "kept", 5, 7) for s in memory.SIDES)
    report.dispatch.append(Dispatch(8, "inference", 10.0, 20.0, Spread(9.0, 10.0, 11.0)))
    report.steps.append(Step("LSTM 4-5", 2, 20.0, 10.0, Spread(1.9, 2.0, 2.1)))
    report.traces.append(trace.Trace("Simple", "inference", ["cnnlstm_fast::conv_block"], [], 9))
    report.blocks.append(
        blocks.BlockResult(
            "1x3x8x8", "image", "inference", "direct", "direct", "default", 2.0, 1.0, Spread(1, 2, 3), 9
        )
    )
    for n in (1, 2, 3):
        s = Spread(n, n + 0.1, n + 0.2)
        report.growth.append(
            growth.Point("batch", n, 10**6 * n, 10**4 * n, 10**3, s, s, Spread(1, 1, 1), 10 * n, 3 * n, 0.0)
        )
    report.failures.append("Simple: off")
    return report


def test_a_report_survives_its_file(tmp_path):
    report = a_report()
    path = tmp_path / "new folder" / "report.json"
    report.write(path)
    assert results.read(path) == report
    text = path.read_text()
    for key in ("cpu", "cores", "our_isa", "commit", "date", "versions", "torch"):
        assert f'"{key}"' in text


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: d.update(schema=0), "has schema 0, expected 1: run the benchmarks again"),
        (lambda d: d.pop("commit"), "expected the fields"),
        (lambda d: d["races"][0].update(extra=1), r"races\[0\]: expected the fields"),
        (
            lambda d: d["races"][0]["standings"][0]["ms"].update(p50="fast"),
            r"ms.p50: expected .*float.*got 'fast'",
        ),
        (lambda d: d.update(races={}), "races: expected"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, said):
    path = tmp_path / "report.json"
    a_report().write(path)
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=said):
        results.read(path)


def test_device_slugs_are_file_names():
    device = results.Device("Some (R) CPU @ 2.0GHz", 2, "AVX512", "avx512", 4.0, "Linux")
    assert device.slug == "some-r-cpu-2-0ghz-2-cores-avx512"


def test_tables_name_everything_that_matters():
    console = Console(width=160, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as captured:
        command_line.show(a_report(), console)
    text = captured.get()
    for part in (
        OURS,
        "chunked 16",
        "(best)",
        "seed",
        "GFLOP/s",
        "wrong: Simple: off",
        "eager + 25 us",
        "direct",
    ):
        assert part in text


def test_plots_are_written_where_there_is_something_to_draw(tmp_path):
    report = a_report()
    report.write(tmp_path / "here.json")
    done = CliRunner().invoke(command_line.app, ["plot", str(tmp_path / "here.json")])
    assert done.exit_code == 0, done.output
    for name in ("ratios", "growth", "roofline"):
        assert (tmp_path / f"here-{name}.png").read_bytes().startswith(b"\x89PNG")
    report.growth.clear()
    assert len(plot.plot_all(report, tmp_path / "there")) == 2


@pytest.mark.parametrize("draw", [plot.plot_ratios, plot.plot_growth, plot.plot_roofline])
def test_plots_say_when_there_is_nothing_to_draw(draw, tmp_path):
    empty = results.Report.begin("quick")
    with pytest.raises(ValueError, match="holds no"):
        draw(empty, tmp_path / "ratios.png")
    empty.write(tmp_path / "empty.json")
    done = CliRunner().invoke(command_line.app, ["plot", str(tmp_path / "empty.json")])
    assert done.exit_code == 1 and "nothing to draw" in done.output


def test_a_file_without_younger_fields_is_read(tmp_path):
    path = tmp_path / "report.json"
    report = a_report()
    report.write(path)
    data = json.loads(path.read_text())
    del data["growth"], data["races"][0]["bytes"]
    path.write_text(json.dumps(data))
    found = results.read(path)
    assert found.growth == [] and found.races[0].bytes is None
    assert found.races[0].standings == report.races[0].standings


@pytest.mark.parametrize("path", sorted(results.FOLDER.glob("[!d]*.json")), ids=lambda p: p.name)
def test_committed_results_are_read(path):
    found = results.read(path)
    assert (found.races or found.blocks or found.memory or found.dispatch) and not found.failures


# ---------------------------------------------------------------- growth


def test_a_straight_line_is_found_whatever_its_sizes():
    work = [1e6 * 2**i for i in range(12)]
    line = growth.fit(work, [0.05 + 3e-9 * w for w in work])
    assert line.fixed == pytest.approx(0.05) and line.per_unit == pytest.approx(3e-9)
    assert abs(line.worst) < 1e-9


@pytest.mark.parametrize("at", [3, 11])
@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_bend_is_named_with_its_place_and_sign(at, factor):
    work = [1e6 * 2**i for i in range(12)]
    cost = [0.05 + 3e-9 * w for w in work]
    cost[at] *= factor
    line = growth.fit(work, cost)
    assert line.at == at and abs(line.worst) > growth.STRAIGHT_MS and (line.worst > 0) == (factor > 1)


def test_growth_that_is_not_straight_is_seen():
    work = [1e6 * 2**i for i in range(12)]
    for cost in ([w**1.3 for w in work], [w**0.7 for w in work]):
        assert abs(growth.fit(work, cost).worst) > growth.STRAIGHT_MS


def test_straight_stretches_end_where_the_rate_changes():
    work = [1e6 * 2**i for i in range(12)]
    cost = [0.05 + 3e-9 * w if i < 8 else 6e-9 * w for i, w in enumerate(work)]
    first, second = growth.stretches(work, cost)
    assert (first.begin, first.end, second.begin, second.end) == (0, 8, 8, 12)
    assert first.line.per_unit == pytest.approx(3e-9) and second.line.per_unit == pytest.approx(6e-9)
    assert len(growth.stretches(work[:8], cost[:8])) == 1
    last = growth.stretches([*work[:8], 8 * work[7]], [*cost[:8], 24 * cost[7]])[1]
    assert last == growth.Stretch(8, 9, None)


@pytest.mark.parametrize(("work", "cost"), [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, 2.0], [0.0, 1.0])])
def test_a_line_needs_points(work, cost):
    with pytest.raises(ValueError, match="at least two"):
        growth.fit(work, cost)


@pytest.mark.parametrize("name", list(growth.SERIES))
def test_a_series_measures_its_ends(name):
    series = growth.SERIES[name]
    assert set(series.quick) <= set(series.values) and list(series.values) == sorted(series.values)
    first, second = (
        growth.measure(series, value, rounds=1, turn_s=0.0, seed=random.randrange(10**6))
        for value in series.values[:2]
    )
    assert second.flops > first.flops and second.data > first.data
    assert second.ours_bytes > first.ours_bytes and second.eager_bytes > first.eager_bytes
    assert first.ours_ms.p50 > 0 and first.ratio.p50 > 0
    assert growth.by_series([second, first]) == {name: [first, second]}


def test_what_a_growth_point_keeps_is_counted_by_hand():
    """Simple: the input and half a byte per pooled output."""
    point = growth.measure(growth.SERIES["batch"], 2, rounds=1, turn_s=0.0, seed=1)
    assert point.data == 2 * (3 * 28 * 28 + 196 * 64) * 4
    assert point.flops == 2 * 2 * 64 * 28 * 28 * 27
    assert point.ours_bytes == 2 * 3 * 28 * 28 * 4 + 2 * 196 * 64 // 2
    assert point.parameters == (64 * 27 + 64) * 4  # the LSTM's are not used


# ---------------------------------------------------------------- whole models


SMALL_INPUTS = {
    "OCR": (2, 1, 32, 24),
    "OCR by rectangular pools": (2, 1, 32, 24),
    "video frames": (1, 2, 3, 71, 43),
    "speech front end": (2, 1, 161, 60),
    "sensors": (2, 9, 24),
    "sound events": (2, 1, 6, 40),
    "agent": (2, 1, 1, 84, 84),
}


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", field.MODELS)
def test_a_model_of_the_field_races(name, mode):
    case = CASES[f"field/{name}/{mode}"]
    case = dataclasses.replace(case, shape=SMALL_INPUTS[name], peers=("eager", "channels_last"))
    result = race.race(case, **quick())
    assert result.left_out == {} and len(result.standings) == 3


def test_a_gradient_that_is_zero_counts_as_itself():
    """Of a bias before a batch norm only rounding is left, which has no digits to compare."""
    true = {"output": torch.ones(4).double(), "bias": torch.full((4,), 1e-17).double()}
    found = race.errors({"output": torch.ones(4), "bias": torch.full((4,), 1e-6)}, true)
    assert found["output"] == 0 and found["bias"] == pytest.approx(2e-6)


# ---------------------------------------------------------------- the command line


def test_run_writes_what_it_measured(monkeypatch, tmp_path):
    case = small()
    monkeypatch.setattr(command_line, "CASES", {case.name: case})
    monkeypatch.setattr(command_line.roofline, "measure", lambda: roofline.Roofline(1.0, "fma loop", 1.0))
    target = tmp_path / "out.json"
    arguments = ["run", "--part", "races", "--rounds", "1", "--seed", "7", "--output", str(target)]
    done = CliRunner().invoke(command_line.app, arguments)
    assert done.exit_code == 0, done.output
    (result,) = results.read(target).races
    assert (result.case, result.seed, result.rounds) == (case.name, 7, 1)
    printed = CliRunner().invoke(command_line.app, [*arguments, "--json"]).stdout
    assert json.loads(printed)["races"][0]["seed"] == 7


def test_a_run_cut_short_leaves_what_it_has(monkeypatch, tmp_path):
    cases = [dataclasses.replace(small(), name=name) for name in ("first", "second")]
    monkeypatch.setattr(command_line, "CASES", {case.name: case for case in cases})
    monkeypatch.setattr(command_line.roofline, "measure", lambda: roofline.Roofline(1.0, "fma loop", 1.0))
    right = command_line.race

    def race_once(case, **options):
        if case.name == "second":
            raise KeyboardInterrupt
        return right(case, **options)

    monkeypatch.setattr(command_line, "race", race_once)
    target = tmp_path / "out.json"
    arguments = ["run", "--part", "races", "--rounds", "1", "--output", str(target)]
    assert CliRunner().invoke(command_line.app, arguments).exit_code != 0
    assert [r.case for r in results.read(target).races] == ["first"]


def test_run_fails_on_a_wrong_result(monkeypatch, tmp_path):
    case = with_fast(small(), scale_weight)
    monkeypatch.setattr(command_line, "CASES", {case.name: case})
    monkeypatch.setattr(command_line.roofline, "measure", lambda: roofline.Roofline(1.0, "fma loop", 1.0))
    target = tmp_path / "out.json"
    done = CliRunner().invoke(command_line.app, ["run", "--part", "races", "--output", str(target)])
    assert done.exit_code == 1
    report = results.read(target)
    assert report.races == [] and "the output is off" in report.failures[0]


def test_run_names_the_cases_there_are():
    done = CliRunner().invoke(command_line.app, ["run", "--case", "nothing"])
    assert done.exit_code == 2 and "Simple/features/inference" in done.output.replace("\n", "")


# ---------------------------------------------------------------- memory, traces, roofline


needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc")


@needs_linux
def test_memory_growth_is_what_stays():
    def make():
        del_at_return = torch.ones(8 << 20)  # 32 MiB that do not stay
        return torch.ones(16 << 20) + del_at_return[0]

    grown, held = memory.growth(make)
    assert held.numel() == 16 << 20
    assert grown == pytest.approx(64 << 20, rel=0.03)


_PEAK = """
import torch
from benchmarks import memory

def run():
    a = torch.ones(16 << 20)
    del a
    torch.ones(4 << 20)

# The system's high-water mark lags now and then, upwards.
print(min(memory.peak_growth(run) for _ in range(3)))
"""


@needs_linux
def test_peak_growth_counts_what_did_not_stay():
    ran = run_python(_PEAK)  # a process that has done much already may not give freed memory back
    assert int(ran.stdout) == pytest.approx(64 << 20, rel=0.03), ran.stderr


@needs_linux
def test_memory_is_measured_in_a_process_of_its_own():
    found = memory.measure("Simple/features/training", "eager")
    b, h, w, c = 128, 28, 28, 64
    pooled = b * c * (h // 2) * (w // 2)
    # input, ReLU's result and 8-byte pool indices; the output is counted apart
    assert found.bytes == pytest.approx(b * 3 * h * w * 4 + b * c * h * w * 4 + pooled * 8, rel=0.05)
    assert found.output_bytes == pooled * 4


def test_a_failed_measurement_shows_its_error(monkeypatch):
    failed = subprocess.CompletedProcess([], 2, "", "usage: ...\ninvalid choice: 'no/such/case'")
    monkeypatch.setattr(memory.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="invalid choice"):
        memory.measure("no/such/case", "eager")


def test_a_map_sized_copy_is_seen_and_a_small_one_is_not():
    x = torch.randn(8, 16, 12)
    calls = trace.watch(lambda: x.transpose(1, 2).contiguous() + x[:2].clone().sum())
    found = trace.map_copies(calls, map_elements=x.numel())
    assert found and all("8 x 12 x 16" in copied for copied in found)
    assert trace.map_copies(trace.watch(lambda: x.transpose(1, 2) + 1), x.numel()) == []


def test_watching_ends_where_the_lstm_begins():
    lstm, x = nn.LSTM(3, 4, batch_first=True), torch.randn(2, 5, 3)

    def run():
        lstm(x.relu())
        return x.sigmoid()

    names = [name for name, _ in trace.watch(run, until=trace.RECURRENT)]
    assert "aten::relu" in names and "aten::sigmoid" not in names
    with pytest.raises(RuntimeError, match=r"has no .*aten::lstm"):
        trace.watch(x.relu, until=trace.RECURRENT)


@pytest.mark.parametrize("kind", ["Simple", "1DConv", "TimeDistributed"])
def test_the_systems_are_traced_up_to_the_lstm(kind, monkeypatch):
    small_system = partial(system, batch=2, frames=3, size=(8, 8), hidden=4)
    monkeypatch.setattr(trace, "system", small_system)
    rows = trace.trace(kind)
    assert len(rows) == 3 and all(row.system == kind for row in rows)
    assert not any("recurrent" in name for name in rows[0].own_ops)


def test_own_ops_are_named_once_each():
    calls = [("aten::relu", []), ("cnnlstm_fast::conv_block", []), ("cnnlstm_fast::conv_block", [])]
    assert trace.own_ops(calls) == ["cnnlstm_fast::conv_block"]


def test_roofline_names_its_source_without_compiled_kernels(monkeypatch):
    monkeypatch.setattr(roofline._ext, "loaded", False)
    monkeypatch.setattr(roofline, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "SGEMM_SIZE", 64)
    found = roofline.measure(0.01)
    assert found.source == "sgemm 64" and found.gflops > 0 and found.copy_gbs > 0


# ---------------------------------------------------------------- blocks


def test_blocks_are_drawn_alike_from_a_seed():
    drawn = blocks.draw_blocks(200, seed=3)
    assert drawn == blocks.draw_blocks(200, seed=3) != blocks.draw_blocks(200, seed=4)
    assert len(set(drawn)) == 200 and {b.family for b in drawn} == set(blocks._FAMILIES)


@pytest.mark.parametrize("seed", range(3))
def test_drawn_blocks_are_valid_and_described(seed):
    for block in blocks.draw_blocks(60, seed):
        call = block.function(cf.reference.conv_block, training=False)
        meta = {n: w.to("meta") for n, w in block.weights(torch.Generator()).items()}
        if block.norm:
            call = partial(call.func, **(call.keywords | {"norm": call.keywords["norm"].to("meta")}))
        out = call(torch.empty(block.shape, device="meta"), **meta)
        assert out.numel() > 0
        conv = torch.nn.functional.conv1d if len(block.size) == 1 else torch.nn.functional.conv2d
        x = torch.empty(block.shape, device="meta")
        y = conv(x, **meta, stride=block.stride, padding=block.padding, groups=block.groups)
        assert tuple(y.shape[2:]) == block.conv_size, block.describe()


TINY = blocks.Block(
    "image", 2, 3, (9, 8), 10, (3, 3), (1, 1), (1, 1), pool=("Max", (2, 2), (2, 2), (0, 0)), layout="features"
)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize(
    "block",
    [TINY, dataclasses.replace(TINY, norm=True), dataclasses.replace(TINY, channels=12, groups=2)],
    ids=lambda b: b.describe(),
)
def test_a_block_races_and_names_its_plan(monkeypatch, never_ours, block, mode):
    monkeypatch.setattr(blocks, "ROUNDS", 3)
    monkeypatch.setattr(blocks, "FLOOR", 0.0)
    found = blocks.race_block(block, mode, seed=random.randrange(10**6), turn_s=0.0)
    assert found.rounds == blocks.ROUNDS and found.reason
    assert found.ratio.p50 == pytest.approx(found.eager_ms / found.ours_ms, rel=2)
    assert found.plan == "reference"


AVERAGED = next(b for b in blocks.draw_blocks(400, 0) if b.pool is not None and b.pool[0] == "Avg")


@needs_extension
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize(
    "block",
    [AVERAGED, *{b.family: b for b in blocks.draw_blocks(60, 1)}.values()],
    ids=lambda b: b.describe(),
)
def test_the_plan_that_is_named_is_the_one_that_runs(monkeypatch, block, mode):
    block, ran = dataclasses.replace(block, batch=min(block.batch, 4)), []
    for name, plan in (("_run", lambda decision, *_: decision.plan), ("_reference", lambda *_: "reference")):
        run = getattr(cf.functional, name)
        monkeypatch.setattr(
            cf.functional, name, lambda *args, run=run, plan=plan: (ran.append(plan(*args)), run(*args))[1]
        )
    monkeypatch.setattr(blocks, "ROUNDS", 1)
    monkeypatch.setattr(blocks, "FLOOR", 0.0)
    found = blocks.race_block(block, mode, seed=random.randrange(10**6), turn_s=0.0)
    assert set(ran) == {found.plan}
    if block.pool is not None and block.pool[0] == "Avg":
        assert found.plan != "reference" and "AvgPool2d is PyTorch's own" in found.reason


def test_a_slow_block_gets_more_rounds_and_loses_none(monkeypatch):
    monkeypatch.setattr(blocks, "FLOOR", float("inf"))
    monkeypatch.setattr(blocks, "MOST_ROUNDS", 20)
    monkeypatch.setattr(blocks, "turn", lambda run, batches, seconds: [1.0])
    assert blocks.race_block(TINY, "inference", seed=random.randrange(10**6)).rounds == 20


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_wrong_block_is_never_timed(monkeypatch, mode):
    right = cf.functional.conv_block
    monkeypatch.setattr(cf.functional, "conv_block", lambda *a, **k: right(*a, **k) * (1 + 1e-4))
    monkeypatch.setattr(blocks, "turn", no_clock)
    with pytest.raises(WrongResult, match="2x3x9x8 -> 10, k3x3"):
        blocks.race_block(TINY, mode, seed=random.randrange(10**6))
