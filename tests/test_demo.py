"""The demo, in its quick form: it runs, its two sides agree, and what it writes is complete."""

import json

import torch

from cnnlstm_fast.demo import QUICK, data, run


def test_demo(tmp_path):
    report = run(tmp_path, QUICK)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "demo.json").read_text())
    assert [s["name"] for s in written["systems"]] == [
        "CNN_LSTM_Simple",
        "CNN_LSTM_1DConv",
        "CNN_LSTM_TimeDistributed",
    ]
    for system in report.systems:
        assert len(system.curves["fast"]) == QUICK.steps
        assert system.loss_difference < 1e-3
        assert system.kept_features.ratio > 5


def test_digits_and_clips():
    train, test = data.load(seed=3)
    assert len(train) + len(test) == 1797 and len(test) == 360
    assert not set(map(bytes, train.pixels.numpy())) & set(map(bytes, test.pixels.numpy()))
    clip = data.clips(train.pixels[:5], torch.Generator().manual_seed(1))
    assert clip.shape == (5, 10, 3, 28, 28)
    assert all(not torch.equal(c[0], c[5]) for c in clip)
