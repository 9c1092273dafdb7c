"""Shapes of public models whose blocks are not a convolution, a norm, an activation and a pool in this order.

Written from their descriptions: sums and branches end blocks, activations stand before norms, weights are
computed, maps have three dimensions. As in ``field_models``, every class has ``small`` arguments and
``inputs`` at two sizes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


class BasicBlock(nn.Module):
    """Two convolutions and a sum, as residual networks have them."""

    def __init__(self, channels: int, out: int, stride: tuple[int, int] = (1, 1)):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != (1, 1) or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += residual
        return self.relu(out)


class ResidualRecogniser(nn.Module):
    """Text recognition: residual blocks down to a height of 1, then a bidirectional LSTM over the width."""

    def __init__(self, width: int = 64, hidden: int = 256, classes: int = 38):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        strides = ((2, 2), (2, 2), (2, 1), (2, 1))
        channels = [width, width, width * 2, width * 4, width * 8]
        self.blocks = nn.Sequential(*map(BasicBlock, channels[:-1], channels[1:], strides))
        self.rnn = nn.LSTM(channels[-1] * 2, hidden, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(self.stem(x))
        y = y.permute(0, 3, 1, 2).flatten(2)
        return self.fc(self.rnn(y)[0])

    # (Fewer channels crash PyTorch's own channels-last: see csrc/library_limits.h.)
    small: ClassVar = dict(width=16, hidden=5, classes=6)
    inputs = ((3, 1, 32, 24), (2, 1, 32, 36))


class OrderBook(nn.Module):
    """Prices from order books: activations before norms, three branches side by side, an LSTM."""

    def __init__(self, width: int = 32, hidden: int = 64):
        super().__init__()

        def block(channels: int, levels: int, stride: int, activation: nn.Module) -> nn.Sequential:
            layers: list[nn.Module] = []
            for c, kernel, step in (
                (channels, (1, levels), (1, stride)),
                (width, (4, 1), 1),
                (width, (4, 1), 1),
            ):
                layers += [nn.Conv2d(c, width, kernel, step), activation, nn.BatchNorm2d(width)]
            return nn.Sequential(*layers)

        self.conv1 = block(1, 2, 2, nn.LeakyReLU(0.01))
        self.conv2 = block(width, 2, 2, nn.Tanh())
        self.conv3 = block(width, 10, 1, nn.LeakyReLU(0.01))

        def branch(*kernels: tuple[int, int]) -> nn.Sequential:
            layers: list[nn.Module] = []
            for i, kernel in enumerate(kernels):
                c = width if i == 0 else width * 2
                layers += [nn.Conv2d(c, width * 2, kernel, padding="same"), nn.LeakyReLU(0.01)]
                layers.append(nn.BatchNorm2d(width * 2))
            return nn.Sequential(*layers)

        self.inp1, self.inp2 = branch((1, 1), (3, 1)), branch((1, 1), (5, 1))
        self.inp3 = nn.Sequential(nn.MaxPool2d((3, 1), (1, 1), (1, 0)), *branch((1, 1)))
        self.lstm = nn.LSTM(width * 6, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(self.conv2(self.conv1(x)))
        y = torch.cat((self.inp1(y), self.inp2(y), self.inp3(y)), dim=1)
        y = y.permute(0, 2, 1, 3)
        y, _ = self.lstm(torch.reshape(y, (-1, y.shape[1], y.shape[2])))
        return torch.softmax(self.fc(y[:, -1, :]), dim=1)

    small: ClassVar = dict(width=8, hidden=5)
    inputs = ((3, 1, 26, 40), (2, 1, 31, 40))


class SqueezeExcitation(nn.Module):
    """A factor for every channel, from the means of all."""

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        squeezed = max(1, channels // reduction)
        self.fc = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, squeezed, 1), nn.SiLU(),
            nn.Conv2d(squeezed, channels, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x)


class SqueezeExcitationTagger(nn.Module):
    """Sounds: blocks with squeeze-and-excitation before the sum, a GRU over the frames."""

    def __init__(self, width: int = 32, hidden: int = 64):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU())
        self.expand = nn.Sequential(nn.Conv2d(width, width * 2, 1), nn.BatchNorm2d(width * 2), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(width * 2, width * 2, 3, padding=1, groups=width * 2), nn.BatchNorm2d(width * 2),
            nn.Hardswish(),
        )  # fmt: skip
        self.scale = SqueezeExcitation(width * 2)
        self.project = nn.Sequential(nn.Conv2d(width * 2, width, 1), nn.BatchNorm2d(width))
        self.gru = nn.GRU(width, hidden, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(2 * hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + self.project(self.scale(self.depthwise(self.expand(y))))
        y = y.mean(3).transpose(1, 2)
        return torch.sigmoid(self.fc(self.gru(y)[0])).mean(1)

    small: ClassVar = dict(width=4, hidden=5)
    inputs = ((3, 1, 20, 16), (2, 1, 27, 16))


class LipReading(nn.Module):
    """Lip reading: a 3-d front end, a residual block for every frame, a bidirectional GRU."""

    def __init__(self, width: int = 64, hidden: int = 256, classes: int = 30):
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv3d(1, width, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False), nn.BatchNorm3d(width),
            nn.PReLU(width), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )  # fmt: skip
        self.block = BasicBlock(width, width * 2, (2, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gru = nn.GRU(width * 2, hidden, 2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.front(x)
        b, c, t, h, w = y.shape
        y = y.transpose(1, 2).reshape(b * t, c, h, w)
        y = self.pool(self.block(y)).view(b, t, -1)
        return self.fc(self.gru(y)[0].mean(1))

    small: ClassVar = dict(width=4, hidden=5, classes=6)
    inputs = ((2, 1, 4, 24, 20), (1, 1, 6, 24, 28))


class WeightNormEncoder(nn.Module):
    """Sound coding: weight-normed strided 1-d convolutions with residual units, an LSTM with a skip."""

    def __init__(self, width: int = 32, hidden: int = 128):
        super().__init__()
        self.first = weight_norm(nn.Conv1d(1, width, 7, padding=3))
        self.unit = nn.Sequential(
            nn.ELU(), weight_norm(nn.Conv1d(width, width // 2, 3, padding=1)), nn.ELU(),
            weight_norm(nn.Conv1d(width // 2, width, 1)),
        )  # fmt: skip
        self.down = nn.Sequential(nn.ELU(), weight_norm(nn.Conv1d(width, hidden, 8, 4, 2)))
        self.lstm = nn.LSTM(hidden, hidden, 2)
        self.last = spectral_norm(nn.Conv1d(hidden, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y + self.unit(y)
        y = self.down(y).permute(2, 0, 1)
        y = (self.lstm(y)[0] + y).permute(1, 2, 0)
        return self.last(F.elu(y))

    small: ClassVar = dict(width=6, hidden=5)
    inputs = ((3, 1, 48), (2, 1, 60))


class SpectrogramTagger(nn.Module):
    """Sound events: pairs of convolutions of many channels and average pools, means and maxima over time."""

    def __init__(self, width: int = 64, hidden: int = 512, classes: int = 50):
        super().__init__()
        layers, previous = [], 1
        for out in (width, width * 2, width * 4):
            for c in (previous, out):
                layers += [nn.Conv2d(c, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            layers += [nn.AvgPool2d(2), nn.Dropout(0.2)]
            previous = out
        self.norm = nn.BatchNorm2d(16)
        self.layers = nn.Sequential(*layers)
        self.gru = nn.GRU(previous, hidden, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.transpose(1, 3)).transpose(1, 3)
        y = torch.mean(self.layers(x), dim=3)
        y = F.max_pool1d(y, 3, 1, 1) + F.avg_pool1d(y, 3, 1, 1)
        return torch.sigmoid(self.fc(self.gru(y.transpose(1, 2))[0]))

    small: ClassVar = dict(width=4, hidden=5, classes=6)
    inputs = ((3, 1, 24, 16), (2, 1, 33, 16))


class DenseRecogniser(nn.Module):
    """Text recognition: norm and activation before convolutions, whose results are concatenated."""

    def __init__(self, growth: int = 12, hidden: int = 64, classes: int = 38):
        super().__init__()
        self.first = nn.Conv2d(1, growth * 2, 5, (1, 2), 2)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.Conv2d(c, growth * 4, 1, bias=False),
                nn.BatchNorm2d(growth * 4), nn.ReLU(inplace=True),
                nn.Conv2d(growth * 4, growth, 3, padding=1, bias=False),
            )
            for c in range(growth * 2, growth * 5, growth)
        )  # fmt: skip
        self.transition = nn.Sequential(
            nn.BatchNorm2d(growth * 5), nn.ReLU(inplace=True),
            nn.Conv2d(growth * 5, growth * 2, 1, bias=False), nn.AvgPool2d(2),
        )  # fmt: skip
        self.lstm = nn.LSTM(growth * 2 * 8, hidden, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for layer in self.layers:
            y = torch.cat([y, layer(y)], 1)
        y = self.transition(y)
        return self.fc(self.lstm(y.permute(0, 3, 1, 2).flatten(2))[0])

    small: ClassVar = dict(growth=3, hidden=5, classes=6)
    inputs = ((3, 1, 16, 24), (2, 1, 16, 32))


PUBLIC = {
    "residual_recogniser": ResidualRecogniser,
    "order_book": OrderBook,
    "squeeze_excitation": SqueezeExcitationTagger,
    "lip_reading": LipReading,
    "weight_norm": WeightNormEncoder,
    "spectrogram_tagger": SpectrogramTagger,
    "dense": DenseRecogniser,
}
