"""Video: which digit moves? Run as `python examples/video.py`.

Clips of 10 frames in which a real handwritten digit (of scikit-learn's 1,797 scans) moves over the
canvas and bounces off its edges. Two convolution blocks see every frame, a GRU sees the frames.
"""

from __future__ import annotations

from collections.abc import Iterator

import side_by_side
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnlstm_fast as cf
from cnnlstm_fast.demo import data


class Frames(nn.Module):
    """``cf.TimeDistributed`` in plain PyTorch: (B, T, C, H, W) -> (B, T, F)."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.flatten(0, 1)).flatten(1).unflatten(0, x.shape[:2])


class VideoNet(nn.Module):
    """(B, T, 3, 28, 28) -> scores (B, 10); plain from ``nn`` and ``Frames``, or fast from ``cf``."""

    def __init__(self, parts, time_distributed):
        super().__init__()
        self.frames = time_distributed(
            parts.Sequential(
                nn.Conv2d(data.CHANNELS, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            )
        )  # fmt: skip
        self.rnn = parts.GRU(64 * 7 * 7, 128, batch_first=True)
        self.fc = nn.Linear(128, data.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.rnn(self.frames(x))
        return self.fc(steps[:, -1])


def loss_of(model: nn.Module, clips: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(clips), labels)


def main() -> None:
    options = side_by_side.options(__doc__.splitlines()[0])
    train, test = data.load(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    steps, batch, tests = (3, 2, 8) if options.tiny else (150, 32, 360)

    def batches() -> Iterator[tuple[Tensor, ...]]:
        for _ in range(steps):
            chosen = torch.randint(len(train), (batch,), generator=generator)
            yield data.clips(train.scans[chosen], generator), train.labels[chosen]

    plain, fast = VideoNet(nn, Frames), VideoNet(cf, cf.TimeDistributed)
    sides = side_by_side.train(plain, fast, batches(), loss_of, learning_rate=1e-3)
    clips, labels = data.clips(test.scans[:tests], generator), test.labels[:tests]
    side_by_side.report(
        sides,
        accuracy_on_moving_digits=lambda model: (model(clips).argmax(1) == labels).float().mean().item(),
        ms_per_inference=side_by_side.milliseconds(clips[:64]),
    )


if __name__ == "__main__":
    main()
