"""Sensors: which of four motions does a smart watch feel? Run as `python examples/sensors.py`.

BasicMotions: 40 recordings that train and 40 that test, each 10 seconds of a three-axis accelerometer
and gyroscope at 10 Hz, of standing, running, walking and badminton. The package aeon carries them;
only its data files are read (`pip install --no-deps aeon==1.6.0` is enough).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import side_by_side
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnlstm_fast as cf


class ConvLSTM(nn.Module):
    """(B, 6, L) -> scores (B, 4), in plain PyTorch; ``cf.accelerate`` makes the fast one of it."""

    def __init__(self, channels: int = 6, classes: int = 4):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv1d(channels, 64, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(64, 64, 5, padding=2), nn.ReLU(),
        )  # fmt: skip
        self.rnn = nn.LSTM(64, 64, 2, batch_first=True)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.rnn(self.cnn(x).transpose(1, 2))
        return self.fc(steps.mean(1))


def load(part: str) -> tuple[Tensor, Tensor]:
    """Recordings (N, 6, 100) and labels (N,) of ``TRAIN`` or ``TEST``."""
    spec = importlib.util.find_spec("aeon")
    if spec is None:
        sys.exit("the recordings come with the package aeon: pip install --no-deps aeon==1.6.0")
    folder = Path(spec.origin).parent / "datasets" / "data" / "BasicMotions"
    head, _, data = (folder / f"BasicMotions_{part}.ts").read_text().partition("@data\n")
    names = next(line for line in head.splitlines() if line.startswith("@classLabel")).split()[2:]
    recordings, labels = [], []
    for line in data.splitlines():
        *series, name = line.split(":")
        recordings.append([[float(v) for v in s.split(",")] for s in series])
        labels.append(names.index(name.strip()))
    return torch.tensor(recordings), torch.tensor(labels)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def main() -> None:
    options = side_by_side.options(__doc__.splitlines()[0])
    (x, y), (test_x, test_y) = load("TRAIN"), load("TEST")
    mean, deviation = x.mean((0, 2), keepdim=True), x.std((0, 2), keepdim=True)
    x, test_x = ((t - mean) / deviation for t in (x, test_x))
    generator = torch.Generator().manual_seed(options.seed)

    def batches() -> Iterator[tuple[Tensor, ...]]:
        for _ in range(3 if options.tiny else 150):
            chosen = torch.randint(len(y), (32,), generator=generator)
            shift = int(torch.randint(x.shape[-1], (), generator=generator))
            yield x[chosen].roll(shift, -1), y[chosen]  # a motion has no beginning

    sides = side_by_side.train(ConvLSTM(), cf.accelerate(ConvLSTM()), batches(), loss_of, learning_rate=2e-3)
    side_by_side.report(
        sides,
        accuracy_on_40_others=lambda model: (model(test_x).argmax(1) == test_y).float().mean().item(),
        ms_per_inference=side_by_side.milliseconds(test_x),
    )


if __name__ == "__main__":
    main()
