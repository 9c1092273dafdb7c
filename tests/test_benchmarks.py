"""The command line of the benchmarks, and what it watches: memory, traces, the roofline."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import run_python
from racing import scale_weight, small, with_fast
from torch import nn
from typer.testing import CliRunner

from benchmarks import __main__ as command_line
from benchmarks import memory, results, roofline, trace
from benchmarks.cases import system

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_latency_of_frozen_models(monkeypatch, tmp_path):
    latencies = command_line.latencies
    serve = partial(latencies.serve, threads=(1, 2), seconds=0.1)
    monkeypatch.setattr(latencies, "serve", serve)
    monkeypatch.setattr(command_line.roofline, "measure", lambda: roofline.Roofline(1.0, "fma loop", 1.0))
    target = tmp_path / "latency.json"
    arguments = ["latency", "--model", "Simple", "--engine", "cnnlstm_fast"]
    more = ["--engine", "eager", "--batch", "2", "--calls", "10", "--output", str(target)]
    done = CliRunner().invoke(command_line.app, [*arguments, *more])
    assert done.exit_code == 0, done.output
    found = results.read(target).latencies
    assert [one.engine for one in found] == ["cnnlstm_fast", "eager"]
    assert all(0 < one.p50 <= one.p99 and one.batch == 2 and one.calls == 10 for one in found)
    assert "cnnlstm_fast" in done.stdout
    done = CliRunner().invoke(
        command_line.app, [*arguments[:3], "--bfloat16", "--batch", "2", "--calls", "10"]
    )
    assert done.exit_code == 0 and "cnnlstm_fast, bfloat16" in done.stdout and "OpenVINO" in done.stdout
    done = CliRunner().invoke(command_line.app, [*arguments, "--serve", "--json"])
    served = json.loads(done.stdout)
    assert [(one["threads"], one["calls_per_second"] > 0) for one in served] == [(1, True), (2, True)]
    assert CliRunner().invoke(command_line.app, ["latency", "--model", "nobody's"]).exit_code == 2
    assert latencies.batches_of("video frames") == [1, 4]


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
