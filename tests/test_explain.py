"""The report from image to scores."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

import cnnlstm_fast as cf
from cnnlstm_fast import _ext
from cnnlstm_fast.fusion.plan import FusionPlan
from cnnlstm_fast.nn import time_distributed
from cnnlstm_fast.planning import observer
from cnnlstm_fast.planning.choose import PLANS


def names(report):
    return [stage.name for stage in report.stages]


def stage(report, name):
    (found,) = [s for s in report.stages if s.name == name]
    return found


@pytest.fixture(autouse=True)
def _leaves_nothing_behind():
    yield
    assert observer.current is None
    assert not _has_any_global_hook()


def test_every_stage_of_a_fast_model():
    model = cf.CNN_LSTM_TimeDistributed(3, 16, 2, 5, image_size=(8, 10))
    report = cf.explain(model, torch.randn(2, 4, 3, 8, 10))
    assert names(report) == ["input", "-> cnn.0", "cnn.0", "-> lstm", "lstm", "-> fc", "fc"]
    assert [s.shape for s in report.stages] == [
        (2, 4, 3, 8, 10), (8, 3, 8, 10), (8, 64 * 4 * 5), (2, 4, 1280), (2, 4, 16), (2, 16), (2, 5),
    ]  # fmt: skip
    block = stage(report, "cnn.0")
    assert block.op == "Conv2d+ReLU+MaxPool2d"
    assert block.layout == "features"
    assert block.plan in PLANS and block.reason
    assert block.bytes == 8 * 1280 * 4
    assert 0 < block.ms < report.ms
    assert stage(report, "-> lstm").plan == "view" and stage(report, "-> lstm").bytes == 0
    lstm = stage(report, "lstm")
    assert lstm.op == "LSTM" and lstm.plan == ("fused" if _ext.loaded else "library") and lstm.reason
    assert report.error is None and report.mend is None


def test_a_plain_model_shows_its_bridges():
    report = cf.explain(cf.reference.CNN_LSTM_Simple(3, 8, 1, 2), torch.randn(2, 3, 6, 8))
    assert names(report) == ["input", "cnn", "relu", "pool", "-> lstm", "lstm", "-> fc", "fc"]
    assert stage(report, "pool").shape == (2, 64, 3, 4)
    bridge = stage(report, "-> lstm")
    assert (bridge.shape, bridge.layout, bridge.plan) == ((2, 12, 64), "strided", "view")
    assert "cf.accelerate" in stage(report, "cnn").reason
    assert stage(report, "relu").plan == "PyTorch"
    assert stage(report, "lstm").plan == "PyTorch" and "cf.LSTM" in stage(report, "lstm").reason


def test_recurrent_layers_name_their_plans():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = cf.GRU(5, 6, batch_first=True), cf.LSTM(6, 3, batch_first=True).double()

        def forward(self, x):
            y, _ = self.one(x, lengths=[3, 4])
            return self.other(y.double())[0]

    report = cf.explain(Two(), torch.randn(2, 4, 5))
    one, other = stage(report, "one"), stage(report, "other")
    assert one.plan == ("fused" if _ext.loaded else "reference") and other.plan == "library"
    assert "float64" in other.reason


def test_copies_show():
    class Copying(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 2, 1), nn.Linear(6, 1)

        def forward(self, x):
            return self.second(self.first(x).transpose(-1, -2).contiguous()) + 1

    report = cf.explain(Copying(), torch.randn(3, 1, 6, 4))
    assert names(report) == ["input", "first", "-> second", "second", "-> result"]
    assert stage(report, "-> second").plan == "copy"
    assert stage(report, "-> second").bytes == 3 * 2 * 4 * 6 * 4


def test_reasons_why_not():
    model = cf.Sequential(
        nn.Conv2d(3, 4, 3), nn.Softsign(), nn.ReLU(), nn.ConvTranspose2d(4, 4, 1), nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(),
    )  # fmt: skip
    handle = model[4].register_forward_hook(lambda *_: None)
    report = cf.explain(model, torch.randn(2, 3, 7, 8))
    handle.remove()
    assert names(report) == ["input", "0", "1", "2", "3", "4", "5", "6", "7"]
    assert "Softsign is not fused" in stage(report, "1").reason
    assert "belongs to no convolution" in stage(report, "2").reason
    assert "hooks" in stage(report, "4").reason
    assert "drops values" in stage(report, "6").reason


def test_the_table():
    text = str(cf.explain(cf.CNN_LSTM_Simple(3, 8, 1, 2), torch.randn(2, 3, 6, 8)))
    lines = text.splitlines()
    assert lines[0].split() == ["stage", "what", "shape", "layout", "plan", "ms", "MiB", "reason"]
    assert any("cnn" in line and "2 x 12 x 64" in line and "locations" in line for line in lines)
    assert lines[-1].startswith("total ") and lines[-1].endswith(" ms")


class Mismatched(nn.Module):
    """The seed tutorial's mistake: the LSTM made for 7x7 maps, the pool leaves 14x14."""

    def __init__(self, cnn):
        super().__init__()
        self.cnn = cnn
        self.lstm = nn.LSTM(64 * 7 * 7, 8, batch_first=True)

    def forward(self, x):
        y = self.cnn(x.flatten(0, 1)).reshape(*x.shape[:2], -1)
        return self.lstm(y)[0]


@pytest.mark.parametrize("container", [nn.Sequential, cf.Sequential])
def test_where_dimensions_do_not_match(container):
    cnn = container(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    report = cf.explain(Mismatched(cnn), torch.randn(2, 3, 3, 28, 28))
    assert names(report)[0] == "input" and names(report)[-2:] == ["-> lstm", "lstm"]
    assert stage(report, "cnn.0").plan != "failed"
    assert report.stages[-1].plan == "failed" and report.stages[-1].shape == (2, 3, 12544)
    assert report.error.startswith("RuntimeError")
    expected = "'lstm' expects 3136 features but gets 12544"
    assert report.mend.startswith(expected) and "input_size=12544" in report.mend
    if container is cf.Sequential:
        assert f"{expected} = 64 x 14 x 14" in report.mend
    assert report.mend in str(report)


def test_transposed_features_and_other_mends():
    def mend(module, *shape):
        return cf.explain(nn.Sequential(module), torch.randn(*shape)).mend

    assert "x.transpose(1, -1)" in mend(nn.LSTM(64, 8, batch_first=True), 2, 64, 9)
    assert "what a step is" in mend(nn.GRU(8, 8), 2, 3, 4, 8)
    assert "in_features=9" in mend(nn.Linear(8, 3), 2, 9)
    assert "cf.TimeDistributed" in mend(nn.Conv2d(3, 4, 3), 2, 5, 3, 8, 8)
    assert "in_channels=1" in mend(nn.Conv2d(3, 4, 3), 2, 1, 8, 8)
    model = cf.CNN_LSTM_TimeDistributed(3, 8, 1, 2)
    report = cf.explain(model, torch.zeros(2, 3, 3, 32, 32))
    assert "pass image_size=(32, 32)" in report.mend
    assert str(report).count("pass image_size") == 1


def test_watching_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU()).train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    state = torch.get_rng_state()
    cf.explain(model, torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert model.training and all(p.grad is None for p in model.parameters())


def test_loops_and_chunks_are_counted(monkeypatch):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn = cf.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())

        def forward(self, x):
            return torch.stack([self.cnn(frame) for frame in x.unbind(1)], 1)

    report = cf.explain(Loop(), torch.randn(2, 5, 1, 6, 6))
    block = stage(report, "cnn.0")
    assert (block.calls, block.shape, block.bytes) == (5, (2, 2, 4, 4), 5 * 2 * 2 * 4 * 4 * 4)
    assert "cnn.0 (x5)" in str(report)
    monkeypatch.setattr(time_distributed, "CHUNK_BYTES", 4 * 2 * 36 * 4)
    chunked = cf.TimeDistributed(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Softsign()))
    with torch.no_grad():
        assert stage(cf.explain(chunked, torch.randn(2, 5, 1, 6, 6)), "module.1").calls == 3


def test_a_block_on_the_reference_plan_is_one_stage():
    model = cf.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Softsign()).double()
    report = cf.explain(model, torch.randn(2, 3, 6, 6).double())
    assert names(report) == ["input", "0", "3"]
    block = stage(report, "0")
    assert (block.op, block.plan, block.shape) == ("Conv2d+ReLU+MaxPool2d", "reference", (2, 4, 2, 2))
    assert block.reason


def test_a_model_that_catches_its_own_errors():
    class Trying(nn.Module):
        def __init__(self, wrong, right=None):
            super().__init__()
            self.wrong, self.right = wrong, right

        def forward(self, x):
            try:
                return self.wrong(x)
            except (RuntimeError, ValueError):
                return self.right(x) if self.right else x * 2

    block = cf.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())  # larger than the image
    for wrong in (nn.Linear(3, 1), nn.Sequential(nn.Linear(3, 1)), block):
        report = cf.explain(nn.Sequential(Trying(wrong, nn.Linear(4, 1)), nn.ReLU()), torch.randn(5, 1, 2, 4))
        assert names(report) == ["input", "0.right", "1"] and report.error is None
        report = cf.explain(nn.Sequential(Trying(wrong), nn.ReLU()), torch.randn(5, 1, 2, 4))
        assert names(report) == ["input", "-> 1", "1"] and report.error is None


def test_inside_somebody_elses_global_hook():
    """Who listens to every module gets every module; the report says what then runs."""
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m)))
    try:
        report = cf.explain(cf.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), torch.randn(1, 1, 4, 4))
    finally:
        handle.remove()
    assert nn.ReLU in seen and names(report) == ["input", "0", "1"]


def test_compiled_models_are_watched_uncompiled():
    model = cf.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Tanh())
    compiled, x = torch.compile(model, fullgraph=True, backend="eager"), torch.randn(1, 1, 4, 4)
    for _ in range(2):
        report = cf.explain(compiled, x)
        assert report.error is None
        assert [s.op for s in report.stages] == ["", "Conv2d+ReLU", "Tanh"]
        torch.testing.assert_close(compiled(x), model(x))


def test_only_modules():
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        cf.explain(torch.relu, torch.zeros(2))


def test_blocks_called_by_hand_are_named_by_their_weights():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.front = nn.Conv2d(1, 4, 3)

        def forward(self, x):
            return cf.functional.conv_block(x, self.front.weight, self.front.bias, layout="columns")

    report = cf.explain(Functional(), torch.randn(2, 1, 6, 7))
    assert names(report) == ["input", "front"]
    assert stage(report, "front").layout == "columns"


class Plain(nn.Module):
    """Modules and functions, a loop, and a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn, self.pool = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.lstm = nn.LSTM(8 * 8 * 8, 4, batch_first=True)

    def forward(self, x):
        steps = []
        for frame in x.unbind(1):
            y = self.pool(torch.relu(self.bn(self.conv1(frame))))
            steps.append(torch.relu(self.conv2(y)).flatten(1))
        return self.lstm(torch.stack(steps, 1))[0]


def test_accelerated_models(monkeypatch):
    monkeypatch.setattr(FusionPlan, "_why_unfused", lambda *_: None)
    model = Plain().eval()
    fast, x = cf.accelerate(model), torch.randn(2, 3, 1, 16, 16)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            report = cf.explain(fast, x)
            assert report.error is None
            ops = {s.name: s.op for s in report.stages}
            assert ops["conv1"] == "Conv2d+BatchNorm2d+ReLU+MaxPool2d" and ops["conv2"] == "Conv2d+ReLU"
            block = stage(report, "conv1")
            assert (block.calls, block.shape) == (3, (2, 8, 8, 8)) and block.plan != "PyTorch"
            assert "bn" not in ops and "pool" not in ops and stage(report, "lstm").op == "LSTM"
    monkeypatch.undo()
    fast.conv2.register_forward_hook(lambda *_: None)
    report = cf.explain(fast, x)
    assert "hooks" in stage(report, "conv2").reason and stage(report, "conv2").plan == "PyTorch"
    assert "cf.accelerate" in stage(cf.explain(model, x), "conv1").reason
