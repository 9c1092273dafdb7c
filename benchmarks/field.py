"""Models as people wrote them, as they stand against ``cf.accelerate`` of them: real sizes of the field.

Most are those of ``tests/field_models.py``; here each takes one tensor, so that exporters can follow.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import cnnlstm_fast as cf
from tests.field_models import CRNN, VGGOCR, Atari, Speech, VideoLSTM

__all__ = ["MODELS", "build"]


class Frames(nn.Module):
    """The CNN of the video model on every frame, in its own loop: (B, T, 3, H, W) -> (B, T, F)."""

    def __init__(self):
        super().__init__()
        model = VideoLSTM()
        self.conv1, self.conv2, self.conv3, self.conv4 = model.conv1, model.conv2, model.conv3, model.conv4

    def forward(self, x: Tensor) -> Tensor:
        steps = []
        for t in range(x.size(1)):
            y = self.conv4(self.conv3(self.conv2(self.conv1(x[:, t]))))
            steps.append(y.flatten(1))
        return torch.stack(steps, 1)


class SpeechFront(nn.Module):
    """The convolutions of the speech model: (B, 1, F, T) -> (T', B, C * F')."""

    def __init__(self):
        super().__init__()
        self.conv = Speech(hidden=8, layers=1).conv

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        b, c, f, t = x.size()
        return x.reshape(b, c * f, t).transpose(1, 2).transpose(0, 1).contiguous()


class Played(nn.Module):
    """The agent on clips (T, B, 1, 84, 84), no episode ending."""

    def __init__(self):
        super().__init__()
        self.agent = Atari()

    def forward(self, x: Tensor) -> Tensor:
        return self.agent(x, x.new_zeros(x.shape[:2]))


class DeepConvLSTM(nn.Module):
    """Sensors: windows (B, channels, L) -> scores (B, classes); four convolutions along time, two LSTMs."""

    def __init__(self, channels: int = 9, classes: int = 6, hidden: int = 128):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(4):
            layers += [nn.Conv1d(64 if i else channels, 64, 5), nn.ReLU()]
        self.cnn = nn.Sequential(*layers)
        self.rnn = nn.LSTM(64, hidden, 2, batch_first=True)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.rnn(self.cnn(x).transpose(1, 2))
        return self.fc(steps[:, -1])


class SoundEvents(nn.Module):
    """Sound: spectrograms (B, 1, T, 40 bands) -> events per frame (B, T, classes); bands are pooled away."""

    def __init__(self, classes: int = 6, channels: int = 128, hidden: int = 32):
        super().__init__()
        layers: list[nn.Module] = []
        for i, pool in enumerate((5, 2, 2)):
            layers += [
                nn.Conv2d(channels if i else 1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
                nn.MaxPool2d((1, pool)), nn.Dropout(0.5),
            ]  # fmt: skip
        self.cnn = nn.Sequential(*layers)
        self.rnn = nn.GRU(2 * channels, hidden, 2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.rnn(self.cnn(x).transpose(1, 2).flatten(2))
        return self.fc(steps)


#: Name: how it is made, the shape of its input, and the ratios over the best peer aimed at (inference,
#: training).
MODELS: dict[str, tuple[type[nn.Module], tuple[int, ...], tuple[float, float]]] = {
    "OCR": (CRNN, (16, 1, 32, 100), (1.15, 1.25)),
    "OCR by rectangular pools": (VGGOCR, (16, 1, 32, 128), (1.5, 2.0)),
    "video frames": (Frames, (1, 28, 3, 256, 342), (1.5, 2.0)),
    "speech front end": (SpeechFront, (4, 1, 161, 400), (1.5, 2.0)),
    "sensors": (DeepConvLSTM, (64, 9, 128), (1.0, 1.0)),
    "sound events": (SoundEvents, (4, 1, 256, 40), (1.0, 1.0)),
    "agent": (Played, (32, 8, 1, 84, 84), (1.0, 1.0)),
}


def build(name: str) -> tuple[nn.Module, nn.Module]:
    """The model, and the accelerated copy of a twin, settled in both modes."""
    kind, _, _ = MODELS[name]
    reference = kind()
    for m in reference.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
        if isinstance(m, (nn.Dropout, nn.Dropout2d)):
            m.p = 0.0  # who draws which random numbers is not what is raced
    return reference, cf.accelerate(copy.deepcopy(reference))
