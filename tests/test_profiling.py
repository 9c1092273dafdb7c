"""Profiling two models: times add up, ranges are named and closed, our operators show by name."""

import json

import pytest
import torch
from torch import nn

import cnnlstm_fast as cf
from cnnlstm_fast.planning import observer
from cnnlstm_fast.profiling import profile_models


@pytest.fixture
def twins():
    args = 3, 5, 1, 2
    reference, fast = cf.reference.CNN_LSTM_Simple(*args), cf.CNN_LSTM_Simple(*args)
    fast.load_state_dict(reference.state_dict())
    return reference, fast


def events(path) -> list[dict]:
    return json.loads(path.read_text())["traceEvents"]


@pytest.mark.parametrize("training", [False, True])
def test_stages_operators_and_trace(twins, training, tmp_path):
    path = tmp_path / "trace.json"
    found = profile_models(*twins, (torch.randn(2, 3, 12, 10),), training=training, rounds=3, trace=path)
    assert [s.op for s in found.before.stages[:3]] == ["Conv2d", "ReLU", "MaxPool2d"]
    block = found.after.stages[0]
    assert (block.name, block.op, block.shape) == ("cnn", "Conv2d+ReLU+MaxPool2d", (2, 30, 64))
    assert all(s.calls == 1 and s.ms >= 0 for s in (*found.before.stages, *found.after.stages))
    assert not any(o.own for o in found.before.operators)
    fused = block.plan != "reference"
    own = {o.name: o for o in found.after.operators if o.own}
    expected = {"cnnlstm_fast::conv_block"} | ({"cnnlstm_fast::conv_block_backward"} if training else set())
    assert (expected <= set(own)) == fused
    assert all(o.calls == 1 for o in own.values() if "conv_block" in o.name)
    convs = [o for o in found.after.operators if o.name == "aten::convolution"]
    assert bool(convs) == (block.plan in ("chunked", "reference"))  # which have the library's convolution

    ranges = [e for e in events(path) if e.get("cat") == "user_annotation"]
    (before,), (after,) = ([e for e in ranges if e["name"] == side] for side in ("before", "after"))
    assert before["ts"] + before["dur"] <= after["ts"]
    blocks = [e for e in ranges if e["name"] == f"cnn: Conv2d+ReLU+MaxPool2d [{block.plan}]"]
    assert len(blocks) == 3
    assert all(after["ts"] <= e["ts"] and e["ts"] + e["dur"] <= after["ts"] + after["dur"] for e in blocks)
    assert sum(e["name"] == "backward" for e in ranges) == (6 if training else 0)
    assert all(p.grad is None for model in twins for p in model.parameters())


def test_ranges_close_where_a_model_catches_what_a_part_raises(tmp_path):
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, x):
            try:
                return self.first(x)
            except RuntimeError:
                return self.second(x)

    path, model = tmp_path / "trace.json", Careful()
    profile_models(model, model, (torch.randn(2, 4),), rounds=2, trace=path)
    ranges = [e for e in events(path) if e.get("cat") == "user_annotation"]
    whole = [e for e in ranges if e["name"] == "Careful: Careful"]
    seconds = [e for e in ranges if e["name"] == "second: Linear"]
    assert len(whole) == len(seconds) == 4
    for outer, inner in zip(whole, seconds, strict=True):
        assert outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    assert observer.current is None


def test_what_cannot_be_profiled_is_said():
    linear, x = nn.Linear(2, 2).requires_grad_(False), torch.randn(1, 2)
    with pytest.raises(ValueError, match="profile it in inference"):
        profile_models(linear, linear, (x,), training=True, rounds=1)
    with pytest.raises(ValueError, match="rounds=0"):
        profile_models(linear, linear, (x,), rounds=0)
