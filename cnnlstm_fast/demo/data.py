"""Real handwritten digits as images and as clips.

The 1,797 scans of 8x8 pixels come inside scikit-learn, so nothing is downloaded. An image is a scan
enlarged to the whole 28x28 canvas; in a clip it is 20x20 pixels large, MNIST's proportions, and moves.
The tutorial's models take three channels; a grey scan has one, so the other two are its derivatives
down and across.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CANVAS = 28
CHANNELS = 3
CLASSES = 10
FRAMES = 10
#: Side of a digit that moves, and how many pixels per frame it moves at most in each direction.
MOVING = 20
SPEED = 3.0
TEST_SCANS = 360

#: Mean and deviation of the three channels over the images that train.
IMAGE_SCALE = ((0.312, 0.0, 0.0), (0.356, 0.076, 0.111))
#: The same over clips.
CLIP_SCALE = ((0.159, 0.0, 0.0), (0.298, 0.107, 0.106))


@dataclass(frozen=True)
class Digits:
    """Scans (N, 8, 8) in 0..1 and their labels (N,)."""

    scans: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load(seed: int = 0) -> tuple[Digits, Digits]:
    """The scans that train and the 360 that test; ``seed`` decides which are which."""
    from sklearn.datasets import load_digits

    found = load_digits()
    scans, labels = torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST_SCANS], order[TEST_SCANS:]
    return Digits(scans[train], labels[train]), Digits(scans[test], labels[test])


def images(scans: Tensor) -> Tensor:
    """Scans (N, 8, 8) over the whole canvas: (N, 3, 28, 28)."""
    return _channels(_enlarge(scans, CANVAS), IMAGE_SCALE)


def clips(scans: Tensor, generator: torch.Generator) -> Tensor:
    """Scans (N, 8, 8) that move over the canvas and bounce off its edges: (N, 10, 3, 28, 28).

    Each starts anywhere at a random velocity, both drawn from ``generator``.
    """
    n, room = len(scans), CANVAS - MOVING
    start = torch.rand(n, 1, 2, generator=generator) * room
    velocity = (2 * torch.rand(n, 1, 2, generator=generator) - 1) * SPEED
    way = start + velocity * torch.arange(FRAMES)[:, None]
    corner = (room - (way.remainder(2 * room) - room).abs()).round().long()
    rows, columns = (corner[..., None] + torch.arange(MOVING)).unbind(-2)  # (N, FRAMES, MOVING) each
    canvas = torch.zeros(n, FRAMES, CANVAS, CANVAS)
    clip, frame = torch.arange(n)[:, None, None, None], torch.arange(FRAMES)[:, None, None]
    canvas[clip, frame, rows[..., None], columns[..., None, :]] = _enlarge(scans, MOVING)[:, None]
    return _channels(canvas, CLIP_SCALE)


def _enlarge(scans: Tensor, side: int) -> Tensor:
    return F.interpolate(scans[:, None], size=(side, side), mode="bicubic").clamp(0, 1)[:, 0]


def _channels(canvas: Tensor, scale: tuple) -> Tensor:
    """(..., H, W) -> (..., 3, H, W): intensity and its derivatives down and across, standardised."""
    channels = torch.stack([canvas, *torch.gradient(canvas, dim=(-2, -1))], dim=-3)
    mean, deviation = torch.tensor(scale)[..., None, None]
    return (channels - mean) / deviation
