"""The GPU part of the benchmarks, its logic run on the CPU."""

from __future__ import annotations

import dataclasses
import json
import random
from functools import partial

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from benchmarks import __main__ as command_line
from benchmarks import gpu, gpu_works
from benchmarks.race import OURS, Spread, WrongResult


def block(
    training: bool = False, dtype: str = "float32", needs_x: bool = False, normed: bool = False
) -> gpu_works.Work:
    conv = partial(nn.Conv2d, 3, 8, 3, padding=1, bias=not normed)
    pair = partial(gpu_works._pair_of_blocks, conv, nn.MaxPool2d(2), "locations", normed)
    mode = "training" if training else "inference"
    return gpu_works.Work(
        f"block/small/{mode}/{dtype}", pair, (2, 3, 8, 10), dtype, training, needs_x, 1000, 2000
    )


def layer(kind: str, masked: str, training: bool = False) -> gpu_works.Work:
    pair = partial(
        gpu_works._pair_of_layers, kind, (5, 3, 4), 6, {"bidirectional": masked == "lengths"}, masked
    )
    return gpu_works.Work(f"layer/{kind}", pair, (5, 3, 4), "float32", training, images=False)


def quickly(work: gpu_works.Work, **options) -> gpu.Result:
    seed = random.randrange(10**6)
    return gpu.race(work, "cpu", seed=seed, rounds=2, turn_ms=0.0, slow_peers=False, **options)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", gpu_works.DTYPES)
@pytest.mark.parametrize("normed", [False, True], ids=["no norm", "norm"])
def test_a_block_races(dtype, training, normed):
    result = quickly(block(training, dtype, needs_x=training, normed=normed))
    assert [s.name for s in result.standings] == [OURS, "eager", "channels_last"]
    assert set(result.left_out) == {"max-autotune", gpu.OURS_COMPILED}
    assert result.standing(OURS).ratio == Spread(1.0, 1.0, 1.0)
    assert all(s.ms.p50 > 0 and s.peak_bytes is None for s in result.standings)
    assert result.standing(OURS).error < max(0.1, 2 * result.standing("eager").error)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", ["reset", "lengths"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_layer_races(kind, masked, training):
    """PyTorch's loop and packed sequences compute what our masks do, or nothing would be timed."""
    result = quickly(layer(kind, masked, training))
    assert [s.name for s in result.standings] == [OURS, "eager"]
    assert result.standing("eager").error < 1e-5
    assert "no batch of images" in result.left_out["channels_last"]


@pytest.mark.parametrize("training", [False, True])
def test_a_wrong_result_is_not_timed(training, monkeypatch):
    def build():
        reference, fast = block(training).build()
        with torch.no_grad():
            fast.conv.weight *= 1 + 1e-3
        return reference, fast

    monkeypatch.setattr(gpu, "_take_turns", lambda *args: pytest.fail("timed behind a red gate"))
    with pytest.raises(WrongResult, match=r"block/small.*output is off"):
        quickly(dataclasses.replace(block(training), build=build))


def test_a_wrong_gradient_is_not_timed():
    def build():
        reference, fast = block(True).build()
        right = fast.function
        # the bias as it is, with a gradient that is off
        fast.function = lambda x, w, b, **options: right(x, w, b + 1e-3 * (b - b.detach()), **options)
        return reference, fast

    with pytest.raises(WrongResult, match=r"gradient of conv\.bias"):
        quickly(dataclasses.replace(block(True), build=build))


def test_a_peer_that_fails_is_left_out_and_ours_is_not(monkeypatch):
    def broken(module):
        raise RuntimeError("no kernel image\nand much more")

    monkeypatch.setitem(gpu.CONTESTANTS, "eager", (False, gpu._eager, False))
    monkeypatch.setitem(gpu.CONTESTANTS, "channels_last", (False, broken, False))
    assert quickly(block()).left_out["channels_last"] == "RuntimeError: no kernel image"
    monkeypatch.setitem(gpu.CONTESTANTS, OURS, (True, broken, False))
    with pytest.raises(RuntimeError, match="no kernel image"):
        quickly(block())


def test_every_contestant_gets_its_turn_first():
    """The order rotates, and a turn is timed after a call that is not."""
    log = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def given(self, x):
            return x

        def run(self, x, grad):
            log.append((self.name, x))

    runners = [Fake("a"), Fake("b")]
    times = gpu._take_turns(runners, [(1, None), (2, None)], gpu.Clock("cpu"), rounds=2, turn_ms=0.0)
    assert {name: len(ms) for name, ms in times.items()} == {"a": 2, "b": 2}
    names = [name for name, _ in log]
    warm_up = ["a"] * 4 + ["b"] * 4
    assert names == [*warm_up, "a", "a", "b", "b", "b", "b", "a", "a"]
    assert {x for _, x in log} == {1, 2}


def test_bytes_and_operations_of_the_tutorials_block():
    """Counted by hand: 1280 images of 3x28x28, 64 maps of 28x28, pooled to 14x14."""
    work = gpu_works.works()["block/TimeDistributed/inference/float32"]
    assert work.bytes == 4 * (1280 * 3 * 28 * 28 + 1280 * 64 * 14 * 14)
    assert work.flops == 2 * 1280 * 64 * 28 * 28 * 27
    inner = gpu_works.works()["block/CRNN 2/training/bfloat16"]
    x, out = 64 * 64 * 16 * 50, 64 * 128 * 8 * 25
    assert inner.needs_x and inner.bytes == 2 * (3 * x + 2 * out)
    assert inner.flops == 3 * 2 * 64 * 128 * 16 * 50 * 64 * 9
    normed = gpu_works.works()["block/CRNN BN/training/bfloat16"]
    x, out = 64 * 256 * 8 * 25, 64 * 512 * 4 * 26
    assert normed.needs_x and normed.bytes == 2 * (4 * x + 2 * out)
    assert normed.flops == 3 * 2 * 64 * 512 * 8 * 25 * 256 * 9
    assert gpu_works.works()["block/CRNN BN/inference/bfloat16"].bytes == 2 * (x + out)


def test_every_work_can_be_built():
    every = gpu_works.works()
    assert len(every) == 4 * (8 + 6 + 3)
    for name, work in every.items():
        if name.endswith("inference/float32"):
            reference, fast = work.build()
            assert [n for n, _ in reference.named_parameters()] == [n for n, _ in fast.named_parameters()]


def test_rates_of_this_machine():
    found = gpu.rates("cpu", copy_bytes=1 << 16, size=32, repeats=2)
    assert found.copy_gbs > 0 and set(found.matmul_tflops) == {"float32", "tf32", "bfloat16"}
    assert torch.backends.cuda.matmul.fp32_precision in ("none", "ieee", "tf32")


def test_a_run_leaves_a_file_that_can_be_read_and_drawn(tmp_path, monkeypatch):
    small = {w.name: w for w in (block(), layer("GRU", "reset"))}
    monkeypatch.setattr(gpu_works, "works", lambda: small)
    arguments = ["gpu", "--device", "cpu", "--folder", str(tmp_path), "--seconds", "0", "--rounds", "2"]
    done = CliRunner().invoke(command_line.app, arguments)
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("*.json")
    report = gpu.read(path)
    assert [r.work for r in report.results] == list(small) and len(report.rates) == 2
    assert report.results[0].left_out["max-autotune"] == "no time left to prepare it"
    assert "% of a copy" in done.output and f"written: {path}" in done.output
    assert path.with_suffix(".png").stat().st_size > 1000
    table = gpu.predictions(report.rates[0], list(small.values()))
    assert table.count("\n") == 3 and "block/small/inference/float32 | 0.0 | 0.00" in table

    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"schema": 0}))
    with pytest.raises(ValueError, match="schema 0, expected"):
        gpu.read(path)
    del data["rates"][0]["copy_gbs"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"rates\[0\]"):
        gpu.read(path)


def test_a_failure_ends_neither_the_run_nor_in_silence(tmp_path, monkeypatch):
    def build():
        raise RuntimeError("out of memory")

    works = {"bad": dataclasses.replace(block(), name="bad", build=build), "good": block()}
    monkeypatch.setattr(gpu_works, "works", lambda: works)
    arguments = ["gpu", "--device", "cpu", "--folder", str(tmp_path), "--seconds", "0", "--rounds", "2"]
    done = CliRunner().invoke(command_line.app, arguments)
    assert done.exit_code == 1 and "bad: RuntimeError: out of memory" in done.output
    (path,) = tmp_path.glob("*.json")
    assert len(gpu.read(path).results) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_device_it_says_so():
    done = CliRunner().invoke(command_line.app, ["gpu"])
    assert done.exit_code == 2 and "no CUDA device" in done.output
