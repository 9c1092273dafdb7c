"""``frozen.stream``: chunks of a sequence, as the whole."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import needs_extension
from torch import nn
from torch.nn import functional as F

import cnnlstm_fast as cf

pytestmark = needs_extension


class Causal(nn.Module):
    """(B, 4, T) -> (B, T, 3): convolutions that see what came before only."""

    time, result = 2, 1

    def __init__(self, rng):
        super().__init__()
        self.k, self.d = rng.choice([1, 2, 5]), rng.choice([1, 3])
        self.conv = nn.Conv1d(4, 8, self.k, dilation=self.d)
        self.norm = nn.BatchNorm1d(8)
        kind = rng.choice([nn.LSTM, nn.GRU])
        self.rnn = kind(8, 5, rng.choice([1, 2]), batch_first=True)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        y = self.norm(self.conv(F.pad(x, (self.d * (self.k - 1), 0)))).relu()
        return self.fc(self.rnn(y.transpose(1, 2))[0])


class Valid(Causal):
    """The same without padding: the first results come late."""

    def forward(self, x):
        return self.fc(self.rnn(torch.tanh(self.conv(x)).transpose(1, 2))[0])


class LastStep(Valid):
    """The result of the last step only."""

    result = None

    def forward(self, x):
        return super().forward(x)[:, -1]


class TimeMajor(nn.Module):
    """(T, B, 2, 6, 5) -> two results: a CNN on every frame, time first."""

    time, result = 0, 0

    def __init__(self, rng):
        super().__init__()
        self.cnn = cf.TimeDistributed(
            cf.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2)), batch_first=False
        )
        self.rnn = cf.LSTM(6, 7, proj_size=rng.choice([0, 3]))

    def forward(self, x):
        return self.rnn(self.cnn(x))[0]


SHAPES = {Causal: (4, None), Valid: (4, None), LastStep: (4, None)}


@pytest.mark.some(4)
@pytest.mark.parametrize("kind", [Causal, Valid, LastStep, TimeMajor])
@pytest.mark.parametrize("draw", range(2))
@torch.no_grad()
def test_chunks_as_the_whole_sequence(kind, draw):
    rng = random.Random(torch.initial_seed() + draw)
    model, batch, steps = kind(rng).eval(), rng.choice([1, 3]), rng.randint(40, 70)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d):
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    shape = [steps, batch, 2, 6, 5] if kind is TimeMajor else [batch, 4, steps]
    example = [17, 1, 2, 6, 5] if kind is TimeMajor else [1, 4, 33]
    frozen = cf.freeze(model, torch.randn(example))
    stream = frozen.stream(batch)
    for _ in range(2):
        x, results, at = torch.randn(shape), [], 0
        while at < steps:
            count = min(rng.choice([1, 1, 2, 3, 11]), steps - at)
            found = stream(x.narrow(model.time, at, count))
            at += count
            if found is not None:
                results.append(found.clone())
        assert stream.steps == steps
        whole = model(x)
        got = results[-1] if model.result is None else torch.cat(results, model.result)
        assert got.shape == whole.shape
        assert (got - whole).abs().max() <= 1e-6 * max(1, whole.abs().max())
        stream.reset()
        assert stream.steps == 0


@torch.no_grad()
def test_streams_keep_to_themselves_and_take_new_weights():
    model = nn.LSTM(3, 4).eval()
    frozen = cf.freeze(model, torch.randn(5, 1, 3))
    one, other = frozen.stream(2), frozen.stream(2)
    x = torch.randn(6, 2, 3)
    whole, (h, _) = model(x)
    for xt in x[:3].split(1):
        out, _ = one(xt)
    kept = out.clone()
    got, (h2, _) = other(x)
    assert torch.allclose(got, whole, atol=1e-6) and torch.allclose(h2, h, atol=1e-6)
    assert torch.equal(out, kept)
    assert torch.allclose(one(x[3:])[0], whole[3:], atol=1e-6)
    for p in model.parameters():
        p.mul_(0.5)
    frozen.refresh()
    one.reset()
    assert torch.allclose(one(x)[0], model(x)[0], atol=1e-6)


class MeanOverTime(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4)

    def forward(self, x):
        return self.rnn(x)[0].mean(0)


class Softmax(MeanOverTime):
    def forward(self, x):
        return self.rnn(x)[0].softmax(0)


@pytest.mark.parametrize(
    "model, example, why",
    [
        (nn.LSTM(3, 4, bidirectional=True), (7, 1, 3), "two directions"),
        (nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU()), (1, 3, 20), "padded at its end"),
        (nn.Sequential(nn.Conv1d(3, 4, 3, stride=2), nn.ReLU()), (1, 3, 20), "stride or a pool"),
        (nn.Linear(3, 4), (2, 3), "neither a recurrent layer"),
        (MeanOverTime(), (7, 1, 3), "looks at all steps at once"),
        (Softmax(), (7, 1, 3), "looks at all steps at once"),
    ],
)
@torch.no_grad()
def test_what_cannot_stream_says_why(model, example, why):
    with pytest.raises(ValueError, match=f"cannot run as a stream: .*{why}"):
        cf.freeze(model.eval(), torch.randn(example)).stream(2)


@torch.no_grad()
def test_wrong_chunks():
    stream = cf.freeze(nn.LSTM(3, 4).eval(), torch.randn(5, 1, 3)).stream(2)
    for shape in ((2, 3), (4, 3, 3), (0, 2, 3), (4, 2, 4)):
        with pytest.raises(ValueError, match=r"expected \(T, 2, 3\)"):
            stream(torch.randn(shape))
    with pytest.raises(TypeError, match="float64"):
        stream(torch.randn(4, 2, 3).double())
    with pytest.raises(TypeError, match="expected a tensor"):
        stream([1.0])
    with pytest.raises(ValueError, match="batch=0"):
        cf.freeze(nn.LSTM(3, 4).eval(), torch.randn(5, 1, 3)).stream(0)
