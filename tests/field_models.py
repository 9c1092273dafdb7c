"""Models as people write them, built from the facts in the field: their habits are kept on purpose.

Every class has ``sizes``: constructor arguments for the real size and for a small one, and ``inputs``:
what its forward takes, at two sizes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class BidirectionalLSTM(nn.Module):
    """An LSTM and a Linear on (T*B, .), as CRNN has two of."""

    def __init__(self, features: int, hidden: int, out: int):
        super().__init__()
        self.rnn = nn.LSTM(features, hidden, bidirectional=True)
        self.embedding = nn.Linear(hidden * 2, out)

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        recurrent, _ = self.rnn(x)
        t, b, h = recurrent.size()
        return self.embedding(recurrent.view(t * b, h)).view(t, b, -1)


class CRNN(nn.Module):
    """OCR: seven convolutions, height down to 1, width as time, two bidirectional LSTMs."""

    def __init__(self, width: int = 64, hidden: int = 256, classes: int = 37):
        super().__init__()
        channels = [width, width * 2, width * 4, width * 4, width * 8, width * 8, width * 8]
        cnn, previous = nn.Sequential(), 1
        for i, out in enumerate(channels):
            last = i == 6
            cnn.add_module(f"conv{i}", nn.Conv2d(previous, out, 2 if last else 3, 1, 0 if last else 1))
            if i in (2, 4, 6):
                cnn.add_module(f"batchnorm{i}", nn.BatchNorm2d(out))
            cnn.add_module(f"relu{i}", nn.ReLU(True))
            if i in (0, 1):
                cnn.add_module(f"pooling{i}", nn.MaxPool2d(2, 2))
            elif i in (3, 5):
                cnn.add_module(f"pooling{i}", nn.MaxPool2d((2, 2), (2, 1), (0, 1)))
            previous = out
        self.cnn = cnn
        self.rnn = nn.Sequential(
            BidirectionalLSTM(previous, hidden, hidden), BidirectionalLSTM(hidden, hidden, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        conv = self.cnn(x)
        _, _, h, _ = conv.size()
        assert h == 1, "the height of conv must be 1"
        return self.rnn(conv.squeeze(2).permute(2, 0, 1))

    small: ClassVar = dict(width=4, hidden=6, classes=5)
    inputs = ((3, 1, 32, 40), (2, 1, 32, 56))


class VGGOCR(nn.Module):
    """OCR with rectangular pools: (B, W, C*H) into a bidirectional LSTM."""

    def __init__(self, width: int = 64, hidden: int = 128, classes: int = 80):
        super().__init__()
        blocks, previous = [], 1
        for out, pool in ((width, (2, 2)), (width * 2, (2, 2)), (width * 4, (2, 1)), (width * 4, (2, 1))):
            blocks += [
                nn.Conv2d(previous, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(True),
                nn.MaxPool2d(pool),
            ]  # fmt: skip
            previous = out
        self.features = nn.Sequential(*blocks, nn.Dropout2d(0.2))
        self.lstm = nn.LSTM(previous * 2, hidden, 2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        y = y.permute(0, 3, 1, 2).flatten(2)
        y, _ = self.lstm(y)
        return F.log_softmax(self.fc(y), -1)

    small: ClassVar = dict(width=6, hidden=5, classes=4)
    inputs = ((3, 1, 32, 24), (2, 1, 32, 36))


class VideoLSTM(nn.Module):
    """A CNN without pools on every frame, looped over T in its own forward, as the popular one does."""

    def __init__(
        self, size: tuple[int, int] = (256, 342), width: int = 32, hidden: int = 512, fc: int = 1024
    ):
        super().__init__()
        channels = [width, width * 2, width * 4, width * 8]
        previous = 3
        for i, out in enumerate(channels):
            kernel = 5 if i == 0 else 3
            setattr(
                self, f"conv{i + 1}",
                nn.Sequential(
                    nn.Conv2d(previous, out, kernel, stride=2), nn.BatchNorm2d(out, momentum=0.01),
                    nn.ReLU(inplace=True),
                ),
            )  # fmt: skip
            size = tuple((s - kernel) // 2 + 1 for s in size)
            previous = out
        self.fc1 = nn.Linear(previous * size[0] * size[1], fc)
        self.rnn = nn.LSTM(fc, hidden, 3, batch_first=True)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        embedded = []
        for t in range(x.size(1)):
            y = self.conv1(x[:, t])
            y = self.conv2(y)
            y = self.conv3(y)
            y = self.conv4(y)
            y = F.relu(self.fc1(y.view(y.size(0), -1)))
            embedded.append(y)
        out, _ = self.rnn(torch.stack(embedded, dim=0).transpose_(0, 1))
        return self.fc2(out[:, -1])

    small: ClassVar = dict(size=(39, 43), width=3, hidden=6, fc=7)
    inputs = ((4, 4, 3, 39, 43), (5, 9, 3, 39, 43))


class MaskConv(nn.Module):
    """Runs its children one after the other and masks what lies behind each sequence's end."""

    def __init__(self, seq_module: nn.Sequential):
        super().__init__()
        self.seq_module = seq_module

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        for module in self.seq_module:
            x = module(x)
            mask = torch.zeros(x.size(), dtype=torch.bool)
            for i, length in enumerate(lengths):
                length = length.item()
                if mask[i].size(2) - length > 0:
                    mask[i].narrow(2, length, mask[i].size(2) - length).fill_(1)
            x = x.masked_fill(mask, 0)
        return x, lengths


class Speech(nn.Module):
    """Spectrograms: two convolutions with Hardtanh(0, 20), then packed bidirectional LSTMs."""

    def __init__(self, frequencies: int = 161, width: int = 32, hidden: int = 1024, layers: int = 5,
                 masked: bool = False):  # fmt: skip
        super().__init__()
        front = nn.Sequential(
            nn.Conv2d(1, width, (41, 11), stride=(2, 2), padding=(20, 5)), nn.BatchNorm2d(width),
            nn.Hardtanh(0, 20, inplace=True),
            nn.Conv2d(width, width, (21, 11), stride=(2, 1), padding=(10, 5)), nn.BatchNorm2d(width),
            nn.Hardtanh(0, 20, inplace=True),
        )  # fmt: skip
        self.conv = MaskConv(front) if masked else front
        features = frequencies
        for kernel in (41, 21):
            features = (features + 2 * (kernel // 2) - kernel) // 2 + 1
        self.rnn = nn.LSTM(features * width, hidden, layers, bidirectional=True)
        self.fc = nn.Linear(2 * hidden, 29)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        lengths = (lengths + 1) // 2
        x = self.conv(x, lengths)[0] if isinstance(self.conv, MaskConv) else self.conv(x)
        b, c, f, t = x.size()
        x = x.view(b, c * f, t).transpose(1, 2).transpose(0, 1).contiguous()
        packed, _ = self.rnn(pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False))
        x, _ = pad_packed_sequence(packed)
        return self.fc(x)

    small: ClassVar = dict(frequencies=41, width=16, hidden=5, layers=2)
    inputs = ((3, 1, 41, 30), (2, 1, 41, 44))


class Atari(nn.Module):
    """An agent stepped in Python over T, its state multiplied by (1 - done)."""

    def __init__(self, width: int = 32, fc: int = 512, hidden: int = 128, actions: int = 4):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, width, 8, stride=4), nn.ReLU(), nn.Conv2d(width, width * 2, 4, stride=2), nn.ReLU(),
            nn.Conv2d(width * 2, width * 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 2 * 49, fc),
            nn.ReLU(),
        )  # fmt: skip
        self.lstm = nn.LSTM(fc, hidden)
        self.actor = nn.Linear(hidden, actions)

    def get_states(self, x: Tensor, state, done: Tensor):
        hidden = self.network(x)
        batch = state[0].shape[1]
        hidden = hidden.reshape((-1, batch, self.lstm.input_size))
        done = done.reshape((-1, batch))
        steps = []
        for h, d in zip(hidden, done, strict=True):
            keep = (1.0 - d).view(1, -1, 1)
            h, state = self.lstm(h.unsqueeze(0), (keep * state[0], keep * state[1]))
            steps += [h]
        return torch.flatten(torch.cat(steps), 0, 1), state

    def forward(self, x: Tensor, done: Tensor) -> Tensor:
        batch = done.shape[1]
        zeros = x.new_zeros(1, batch, self.lstm.hidden_size)
        y, _ = self.get_states(x.flatten(0, 1), (zeros, zeros), done.flatten())
        return self.actor(y)

    small: ClassVar = dict(width=4, fc=9, hidden=5)
    inputs = ((5, 2, 1, 84, 84), (3, 3, 1, 84, 84))


FIELD = {
    "crnn": (CRNN, {}),
    "vgg_ocr": (VGGOCR, {}),
    "video": (VideoLSTM, {}),
    "speech": (Speech, {}),
    "masked_speech": (Speech, {"masked": True}),
    "atari": (Atari, {}),
}


def more_inputs(kind: type[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """What a model's forward takes beside ``x``."""
    if kind is Speech:
        lengths = torch.randint(x.shape[3] // 2, x.shape[3] + 1, x.shape[:1])
        lengths[torch.randint(len(lengths), ())] = x.shape[3]
        return (lengths,)
    if kind is Atari:
        return ((torch.rand(x.shape[:2]) < 0.3).to(x.dtype),)
    return ()


@torch.no_grad()
def freshen(model: nn.Module) -> nn.Module:
    """Random norms: negative and zero scales among them, and statistics off 0 and 1; in place."""
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            m.weight.normal_()
            m.weight[torch.randperm(m.num_features)[: max(1, m.num_features // 8)]] = 0
            m.bias.normal_()
            m.running_mean.normal_()
            m.running_var.uniform_(0.3, 2)
    return model
