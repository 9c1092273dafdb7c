"""Models as people build them: what stands before the RNN in OCR, sensors, sound events and agents.

Each is written once, over ``parts``: ``torch.nn`` makes the plain model, ``cnnlstm_fast`` the fast one,
with the same keys. Sizes are those of public models of their kind; batches are such that a call takes
tens of milliseconds.
"""

from __future__ import annotations

from torch import Tensor, nn


class CRNN(nn.Module):
    """OCR: lines of text (B, 1, 32, W) -> scores (W/4 + 1, B, classes); the image's width is time."""

    def __init__(self, parts, classes: int = 37, hidden: int = 256):
        super().__init__()
        layers: list[nn.Module] = []
        channels = (1, 64, 128, 256, 256, 512, 512, 512)
        for i in range(7):
            k, padding = (2, 0) if i == 6 else (3, 1)
            layers.append(nn.Conv2d(channels[i], channels[i + 1], k, padding=padding))
            if i in (2, 4, 6):
                layers.append(nn.BatchNorm2d(channels[i + 1]))
            layers.append(nn.ReLU())
            if i in (0, 1):
                layers.append(nn.MaxPool2d(2))
            elif i in (3, 5):
                layers.append(nn.MaxPool2d(2, (2, 1), (0, 1)))
        self.cnn = parts.Sequential(*layers)
        self.rnn = parts.LSTM(512, hidden, 2, bidirectional=True)
        self.fc = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.rnn(self.cnn(x).squeeze(2).permute(2, 0, 1))
        return self.fc(steps)


class DeepConvLSTM(nn.Module):
    """Sensors: windows (B, channels, L) -> scores (B, classes); four convolutions along time, two LSTMs."""

    def __init__(self, parts, channels: int = 9, classes: int = 6, hidden: int = 128):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(4):
            layers += [nn.Conv1d(channels if i == 0 else 64, 64, 5), nn.ReLU()]
        self.cnn = parts.Sequential(*layers)
        self.rnn = parts.LSTM(64, hidden, 2, batch_first=True)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.rnn(self.cnn(x).transpose(1, 2))
        return self.fc(steps[:, -1])


class SoundEvents(nn.Module):
    """Sound: spectrograms (B, 1, T, 40 bands) -> events per frame (B, T, classes); bands are pooled away."""

    def __init__(self, parts, classes: int = 6, channels: int = 128, hidden: int = 32):
        super().__init__()
        layers: list[nn.Module] = []
        for i, pool in enumerate((5, 2, 2)):
            layers += [
                nn.Conv2d(channels if i else 1, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.MaxPool2d((1, pool)),
                nn.Dropout(0.0),
            ]
        self.cnn = parts.Sequential(*layers)
        self.rnn = parts.GRU(2 * channels, hidden, 2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.rnn(self.cnn(x).transpose(1, 2).flatten(2))
        return self.fc(steps)


class Agent(nn.Module):
    """Games: clips (B, T, 4, 84, 84) of frames -> policy and value (B, T, actions + 1)."""

    def __init__(self, parts, actions: int = 6, hidden: int = 128):
        super().__init__()
        self.cnn = parts.Sequential(
            nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
            nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU(),
        )  # fmt: skip
        self.rnn = parts.LSTM(512, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, actions + 1)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.cnn(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        steps, _ = self.rnn(frames)
        return self.fc(steps)


#: By name: the model and the shape of its input.
MODELS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "CRNN": (CRNN, (8, 1, 32, 100)),
    "DeepConvLSTM": (DeepConvLSTM, (64, 9, 128)),
    "SoundEvents": (SoundEvents, (4, 1, 256, 40)),
    "Agent": (Agent, (4, 32, 4, 84, 84)),
}
