"""The demo: its data, its training, its measures, and a short run of the whole."""

import io
import json
import math
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from cnnlstm_fast import measure, reference
from cnnlstm_fast.demo import Settings, data, denormals, main, run
from cnnlstm_fast.demo.denormals import are_flushed
from cnnlstm_fast.demo.main import SYSTEMS, compare
from cnnlstm_fast.demo.report import SystemReport
from cnnlstm_fast.demo.training import Learner, accuracy, initialise, nudge, scores
from cnnlstm_fast.measure import Comparison


@pytest.fixture(autouse=True)
def _one_thread(_fresh_state):
    """An LSTM's small steps gain nothing from two."""
    torch.set_num_threads(1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def some(digits, count):
    chosen = torch.randperm(len(digits))[:count]
    return data.Digits(digits.scans[chosen], digits.labels[chosen])


# ---------------------------------------------------------------- data


def test_train_and_test_share_no_scan():
    train, test = data.load(seed=3)
    assert len(train) + len(test) == 1797 and len(test) == 360
    assert not set(map(bytes, train.scans.numpy())) & set(map(bytes, test.scans.numpy()))
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(10))
    again, other = data.load(seed=3)[1], data.load(seed=4)[1]
    assert torch.equal(test.scans, again.scans) and not torch.equal(test.scans, other.scans)


def enlarged(scan, side):
    return F.interpolate(scan[None, None], size=(side, side), mode="bicubic").clamp(0, 1)[0, 0].numpy()


def unscaled(channels, scale):
    """Channels (..., 3, 28, 28) before they were standardised."""
    mean, deviation = (np.array(values)[:, None, None] for values in scale)
    return channels.numpy() * deviation + mean


def test_images_are_the_scans_and_their_slopes():
    train, _ = data.load()
    image = unscaled(data.images(train.scans), data.IMAGE_SCALE)
    assert image.shape == (1437, 3, 28, 28)
    one = int(torch.randint(len(train), ()))
    digit = enlarged(train.scans[one], 28)
    for channel, expected in zip(image[one], (digit, *np.gradient(digit)), strict=True):
        np.testing.assert_allclose(channel, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["images", "clips"])
def test_inputs_are_standardised(kind):
    train, _ = data.load()
    x = data.images(train.scans) if kind == "images" else data.clips(train.scans[:300], generator(1))
    channels = x.movedim(-3, 0).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(3), atol=0.03, rtol=0)
    torch.testing.assert_close(channels.std(1), torch.ones(3), atol=0.03, rtol=0)


def test_clips_move_whole_digits():
    train, _ = data.load()
    digits = some(train, 6)
    clips = unscaled(data.clips(digits.scans, generator(7)), data.CLIP_SCALE)
    assert clips.shape == (6, 10, 3, 28, 28)
    for scan, clip in zip(digits.scans, clips, strict=True):
        digit, places = enlarged(scan, 20), []
        for frame in clip[:, 0]:
            windows = np.lib.stride_tricks.sliding_window_view(frame, (20, 20))
            places.append(np.argwhere(np.abs(windows - digit).max((-1, -2)) < 1e-5)[0])
            assert frame.sum() == pytest.approx(digit.sum(), rel=1e-4), "something beside the digit"
        moves = np.abs(np.diff(places, axis=0))
        assert moves.max() <= math.ceil(data.SPEED) and moves.any()


def test_clips_follow_their_generator():
    scans = data.load()[0].scans[:4]
    first, again, other = (data.clips(scans, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("steps", [10, 196])
def test_cells_remember_for_as_long_as_the_sequence(steps):
    model = reference.CNN_LSTM_Simple(3, 128, 2, 10)
    initialise(model, steps)
    state = torch.randn(2, 1, 128), torch.ones(2, 1, 128)  # the recurrent weights must be 0
    _, (_, kept) = model.lstm(torch.zeros(1, 1, 64), state)
    lifetime = 1 / (1 - kept[0])
    assert lifetime.min() >= 2 - 1e-3 and lifetime.max() <= steps * (1 + 1e-3)
    assert lifetime.max() > 0.8 * steps
    for layer in ("l0", "l1"):
        bias = model.lstm.get_parameter(f"bias_ih_{layer}") + model.lstm.get_parameter(f"bias_hh_{layer}")
        write, keep, rest = bias.split((128, 128, 256))
        assert torch.equal(write, -keep) and keep.min() >= 0 and not rest.any()


def test_learner_learns_then_stands_still():
    train, _ = data.load()
    digits = some(train, 64)
    x, y = data.images(digits.scans)[..., ::4, ::4], digits.labels
    model = reference.CNN_LSTM_Simple(3, 16, 1, 10)
    initialise(model, 9)
    learner = Learner(model, steps=60)
    losses = [learner.step(x, y) for _ in range(60)]
    assert losses[-1] < 0.6 * losses[0]
    assert accuracy(scores(model, x), y) > 0.5
    before = [p.clone() for p in model.parameters()]
    learner.step(x, y)
    assert all(map(torch.equal, before, model.parameters()))


def test_wide_lstm_inputs_learn_slower():
    wide = Learner(reference.CNN_LSTM_TimeDistributed(3, 8, 1, 10), 100).model.lstm.weight_ih_l0
    assert wide.shape[1] == 12544
    moved = {}
    for model in (reference.CNN_LSTM_Simple(1, 8, 1, 2), reference.CNN_LSTM_TimeDistributed(1, 8, 1, 2)):
        learner, before = Learner(model, 100), model.lstm.weight_ih_l0.detach().clone()
        shape = (2, 1, 28, 28) if isinstance(model, reference.CNN_LSTM_Simple) else (2, 3, 1, 28, 28)
        learner.step(torch.randn(shape), torch.tensor([0, 1]))
        moved[type(model).__name__] = (model.lstm.weight_ih_l0 - before).abs().max().item()
    ratio = moved["CNN_LSTM_Simple"] / moved["CNN_LSTM_TimeDistributed"]
    assert ratio == pytest.approx(math.sqrt(12544 / 64), rel=0.05)


def test_nudge_moves_the_last_bit():
    model = reference.CNN_LSTM_Simple(3, 8, 1, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    nudge(model)
    for name, p in model.named_parameters():
        steps = (p.detach().numpy().view(np.int32) - before[name].numpy().view(np.int32)).astype(np.int64)
        assert (np.abs(steps) == (name == "cnn.weight")).all()


# ---------------------------------------------------------------- denormals


def can_flush() -> bool:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.set_flush_denormal, True).result()


@pytest.mark.parametrize("threads", [1, 2])
def test_denormals_are_flushed_in_all_threads_of_the_work_alone(threads):
    torch.set_num_threads(threads)
    assert not are_flushed()
    stopped = threading.Event()
    found = denormals.aside(lambda: (are_flushed(), torch.get_num_threads()), stopped, flush=True)
    assert found == (can_flush(), threads)
    assert not denormals.aside(are_flushed, stopped, flush=False)
    assert not are_flushed() and not stopped.is_set()
    (gradient,) = torch.autograd.grad((x := torch.full((2**16,), 1e-20, requires_grad=True)).prod(), x)
    assert not gradient.any() and not are_flushed()


def test_an_interrupt_ends_the_work():
    stopped, steps = threading.Event(), []

    def work():
        while not stopped.is_set() and len(steps) < 20000:
            steps.append(1)
            time.sleep(0.001)
            if len(steps) == 20:
                os.kill(os.getpid(), signal.SIGINT)
        return "ended"

    with pytest.raises(KeyboardInterrupt):
        denormals.aside(work, stopped, flush=True)
    assert stopped.is_set() and 20 <= len(steps) < 20000
    with pytest.raises(ZeroDivisionError):
        denormals.aside(lambda: 1 / 0, stopped, flush=False)


def test_an_epoch_by_the_median_step(monkeypatch):
    train, now = some(data.load()[0], 90), [0.0]
    seconds = iter([50.0, 3.0, 2.0, 9.0])

    def step(self, x, y):
        assert len(x) == 30
        now[0] += next(seconds)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(Learner, "step", step)
    settings = Settings(steps=5, rounds=1, batch=4, train_batch=30, unflushed_steps=3)
    assert main.unflushed_epoch_s(SYSTEMS[0], train, settings, torch.device("cpu"), 0) == 9.0


def test_losses_are_compared_over_the_steps_that_all_sides_made():
    curves = {"reference": [3.0, 2.0, 1.0], "fast": [3.0, 2.5, 9.0], "nudged": [3.1, 2.0]}
    c = Comparison(1.0, 1.0, 1.0)
    found = SystemReport("any", curves, {}, 0.0, c, c, c, c, c)
    assert found.compared_steps == 2
    assert found.loss_difference("fast") == 0.5 and found.loss_difference("nudged") == pytest.approx(0.1)


# ---------------------------------------------------------------- measures


def test_ratio_is_the_median_of_pairs():
    assert Comparison.of([2.0, 4.0, 9.0], [1.0, 4.0, 3.0]) == Comparison(4.0, 3.0, 2.0)


def test_sides_take_turns_on_the_same_batches(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def side(name, costs):
        def run(x):
            calls.append((name, int(x)))
            now[0] += costs[int(x)]

        return run

    found = measure.compare_ms(
        side("reference", [99.0, 4.0, 6.0, 8.0]),
        side("fast", [99.0, 1.0, 2.0, 1.0]),
        [(torch.tensor(i),) for i in range(4)],
    )
    assert found == Comparison(6000.0, 1000.0, 4.0), "the first round must not count"
    assert [batch for _, batch in calls] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [name for name, _ in calls[::2]] == ["fast", "reference", "fast", "reference"]


def test_kept_bytes_counts_storages_once():
    x, weight = torch.randn(6, 10), nn.Parameter(torch.randn(10, 3))
    kept = measure.kept_bytes

    def two_layers(x):
        hidden = (x @ weight).relu()  # x for the weight, the ReLU's result, and no weight
        return hidden[1:] * hidden[:-1]  # two views of that result

    assert kept(two_layers, x, [weight]) == x.nbytes + 6 * 3 * 4
    assert kept(lambda x: x @ weight + 1, x.requires_grad_(), []) == x.nbytes + weight.nbytes
    assert kept(lambda x: x * 2, x, []) == 0


# ---------------------------------------------------------------- the whole


def test_run_writes_table_json_and_picture(tmp_path, monkeypatch):
    few = some(data.load()[0], 40), some(data.load()[1], 9)
    monkeypatch.setattr(data, "load", lambda seed: few)
    settings = Settings(steps=3, rounds=1, batch=4, train_batch=5, nudged_steps=2, unflushed_steps=1)
    flush, modes = [], []
    compared, unflushed = main.compare, main.unflushed_epoch_s
    monkeypatch.setattr(main, "compare", lambda *args: (flush.append(are_flushed()), compared(*args))[1])
    monkeypatch.setattr(
        main, "unflushed_epoch_s", lambda *args: (modes.append(are_flushed()), unflushed(*args))[1]
    )
    text = io.StringIO()
    report = run(tmp_path / "new" / "folder", settings, Console(file=text, width=110))
    names = [system.name for system in SYSTEMS]
    assert (tmp_path / "new" / "folder" / "demo.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "new" / "folder" / "demo.json").read_text())
    assert [s["name"] for s in written["systems"]] == names
    assert abs((datetime.now(timezone.utc) - datetime.fromisoformat(written["date"])).total_seconds()) < 600
    assert flush == [can_flush()] * 3 and modes == [False] * 3 and not are_flushed()
    assert written["denormals_flushed"] == can_flush() and written["settings"]["unflushed_steps"] == 1
    assert f"denormal numbers {'' if can_flush() else 'not '}flushed" in " ".join(text.getvalue().split())
    assert written["versions"]["torch"] == torch.__version__ and written["device"]
    for system, record in zip(report.systems, written["systems"], strict=True):
        assert [len(curve) for curve in system.curves.values()] == [3, 3, 2]
        assert (
            set(system.epoch_s) == {"reference", "fast", "as it comes"} and min(system.epoch_s.values()) > 0
        )
        assert record["loss_difference"]["fast"] == system.loss_difference("fast") < 1e-3
        assert system.score_difference < 1e-4
        assert system.name in text.getvalue()
    assert all(name in text.getvalue() for name, _ in report.systems[0].measures)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
@helpers.needs_extension
def test_features_stage_keeps_half_a_byte_per_output(system):
    train, test = data.load()
    told = []
    found = compare(
        system,
        some(train, 40),
        some(test, 5),
        Settings(steps=1, rounds=1, batch=7, train_batch=2),
        torch.device("cpu"),
        11,
        told.append,
    )
    frames = 7 * (10 if system.name == "CNN_LSTM_TimeDistributed" else 1)
    x, pooled = frames * 3 * 28 * 28 * 4, frames * 64 * 14 * 14
    second_input = pooled * 4 if system.name == "CNN_LSTM_1DConv" else 0  # what its Conv1d reads
    assert found.kept_features.fast == x + pooled / 2 + second_input
    eager = x + 4 * pooled * 4 + pooled * 8 + second_input
    assert found.kept_features.reference == eager
    assert found.kept_features.ratio == eager / found.kept_features.fast
    assert len(told) == 1 + 3 * 1


@pytest.mark.gpu
def test_run_uses_the_gpu(tmp_path):
    report = run(tmp_path, Settings(steps=2, rounds=1, batch=4), Console(file=io.StringIO()))
    assert report.device == torch.cuda.get_device_name()
    assert all(system.loss_difference("fast") < 1e-2 for system in report.systems)
