"""Result files, and the tables and plots that are made of them."""

from __future__ import annotations

import functools
import json

import pytest
from racing import quick, small
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from benchmarks import __main__ as command_line
from benchmarks import blocks, growth, memory, models, plot, race, results, roofline, trace
from benchmarks.dispatch import Dispatch, Step
from benchmarks.race import OURS, Spread

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def a_race() -> race.Result:
    return race.race(small(), **quick())


def a_report() -> results.Report:
    report = results.Report.begin("quick")
    report.roofline.append(roofline.Roofline(228.0, "fma loop", 20.0))
    report.races.append(a_race())
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
    kinds = found.races, found.blocks, found.memory, found.dispatch, found.regrets, found.latencies
    assert any(kinds) and not found.failures


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_model_races_against_all_ways_of_eager(monkeypatch, mode, autocast, tuning):
    made = []

    def make():
        made.append(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 4, 3)))
        return made[-1]

    monkeypatch.setitem(models.MODELS, "small", (make, (2, 3, 9, 8)))
    ticks = iter(range(10**6))
    found = models.race_model(
        "small", mode, seed=1, rounds=3, tune=True, autocast=autocast, clock=lambda: 1e-3 * next(ticks)
    )
    assert (found.ratio.p20, found.ratio.p80) == pytest.approx((1.0, 1.0))
    assert found.tuned and len(made) == 1
    assert found.eager_ms == found.channels_last_ms == found.fast_ms == pytest.approx(1.0)
    assert found.float32_ms == (pytest.approx(1.0) if autocast else None)
    assert ("float32 (1.0 ms)" in found.describe()) == autocast
    assert any("Conv2d+ReLU" in line for line in found.lines)
    assert all(weight.is_contiguous() for weight in made[0].parameters())
