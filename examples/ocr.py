"""OCR: a CRNN with CTC reads strips of real handwritten digits. Run as `python examples/ocr.py`.

The digits are the 1,797 scans inside scikit-learn. A strip is 32 pixels high and holds three to five
of them at random places; the network is told which digits, not where. The image's width becomes time:
each column of the last map is a step of a bidirectional LSTM.
"""

from __future__ import annotations

from collections.abc import Iterator

import side_by_side
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import cnnlstm_fast as cf

HEIGHT, WIDTH, SIDE, MOST = 32, 128, 22, 5
BLANK, CLASSES = 0, 11


class CRNN(nn.Module):
    """(B, 1, 32, W) -> log probabilities (W / 4, B, 11); ``parts`` is ``torch.nn`` or ``cnnlstm_fast``."""

    def __init__(self, parts):
        super().__init__()
        self.cnn = parts.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d((4, 1)),
        )  # fmt: skip
        self.rnn = parts.LSTM(64 * 2, 64, bidirectional=True)
        self.fc = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.cnn(x).permute(3, 0, 1, 2).flatten(2)  # (W, B, C*H)
        steps, _ = self.rnn(columns)
        return self.fc(steps).log_softmax(-1)


def load(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Scans (N, 22, 22) in 0..1 and labels: 1,437 that train and 360 that test."""
    found = load_digits()
    scans, labels = torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)
    scans = F.interpolate(scans[:, None], size=(SIDE, SIDE), mode="bilinear")[:, 0]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order[:360], order[360:]
    return (scans[train], labels[train]), (scans[test], labels[test])


def strips(scans: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Random strips (count, 1, 32, 128), their labels (count, 5) behind each other, and how many each has."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    images = torch.zeros(count, 1, HEIGHT, WIDTH)
    targets, lengths = torch.zeros(count, MOST, dtype=torch.long), torch.zeros(count, dtype=torch.long)
    for i in range(count):
        lengths[i] = digits = draw(3, MOST)
        free = WIDTH - digits * SIDE
        left = 0
        for k in range(digits):
            gap = draw(0, free // (digits - k))
            free, left = free - gap, left + gap
            at, top = draw(0, len(labels) - 1), draw(0, HEIGHT - SIDE)
            images[i, 0, top : top + SIDE, left : left + SIDE] = scans[at]
            targets[i, k] = labels[at] + 1
            left += SIDE
    return images, targets, lengths


def loss_of(model: nn.Module, images: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    scores = model(images)
    steps = torch.full((len(images),), len(scores), dtype=torch.long)
    return F.ctc_loss(scores, targets, steps, lengths, BLANK)


def read(scores: Tensor) -> list[list[int]]:
    """The best path: repeats merged, blanks dropped."""
    lines = []
    for path in scores.argmax(-1).T:
        merged = torch.unique_consecutive(path)
        lines.append((merged[merged != BLANK] - 1).tolist())
    return lines


def main() -> None:
    options = side_by_side.options(__doc__.splitlines()[0])
    train, test = load(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    steps, batch, tests = (3, 4, 8) if options.tiny else (700, 32, 256)

    def batches() -> Iterator[tuple[Tensor, ...]]:
        for _ in range(steps):
            yield strips(*train, batch, generator)

    sides = side_by_side.train(CRNN(nn), CRNN(cf), batches(), loss_of, learning_rate=3e-3)
    images, targets, lengths = strips(*test, tests, generator)
    truth = [(row[:n] - 1).tolist() for row, n in zip(targets, lengths.tolist(), strict=True)]

    def right(model: nn.Module) -> float:
        return sum(a == b for a, b in zip(read(model(images)), truth, strict=True)) / tests

    side_by_side.report(
        sides, strips_read_without_a_mistake=right, ms_per_inference=side_by_side.milliseconds(images)
    )
    with torch.inference_mode():
        for line, told in list(zip(read(sides["fast"].model(images[:3])), truth, strict=False)):
            print(f"read {''.join(map(str, line)):6} is {''.join(map(str, told))}")


if __name__ == "__main__":
    main()
