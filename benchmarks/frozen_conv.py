"""Convolutions and products on packed weights against the library's, for the shapes of the field's models.

``python -m benchmarks.frozen_conv [REGEX]``: one line per shape, with the share of the multiply-add peak that
packed weights reach, the rate at which they are read, and the library's time over theirs. The library gets
weights that it packed beforehand and channels-last inputs (``mkldnn::_convolution_pointwise``); its pool is a
call of its own.

With ``OMP_NUM_THREADS=1`` processor time is measured, so that others on the machine count for little; shares
are of the peak of that thread. Both run in turn, and the shortest of many calls counts.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnlstm_fast.ops import frozen_conv as frozen

SECONDS = 0.7
FIRST, LAST = [0, 1, 2, 3], [0, 2, 3, 1]
RELU = 1


@dataclass(frozen=True)
class Shape:
    """One convolution; its input is channels-first if it is a model's first."""

    name: str
    n: int
    c: int
    size: tuple[int, int]
    co: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    pool: tuple[int, ...] = ()  # kernel, stride, padding
    first: bool = False

    def conv_args(self) -> list[int]:
        return [*self.stride, *self.padding, 1, 1, 1]

    def pool_args(self) -> list[int]:
        return [*self.pool, 1, 1, 0] if self.pool else []

    def flops(self) -> int:
        out = [
            (s + 2 * p - k) // t + 1
            for s, p, k, t in zip(self.size, self.padding, self.kernel, self.stride, strict=True)
        ]
        return 2 * self.n * self.co * self.c * self.kernel[0] * self.kernel[1] * out[0] * out[1]


_SQUARE, _TALL = (2, 2, 2, 2, 0, 0), (2, 2, 2, 1, 0, 1)
_SAME = dict(kernel=(3, 3), padding=(1, 1))


def _batches(batches: tuple[int, ...], shapes: list[Shape]) -> list[Shape]:
    return [replace(s, n=n, name=f"{s.name} x{n}") for n in batches for s in shapes]


SHAPES = [
    *_batches((1, 32), [
        Shape("simple 1", 0, 1, (28, 28), 32, **_SAME, pool=_SQUARE, first=True),
        Shape("simple 2", 0, 32, (14, 14), 64, **_SAME, pool=_SQUARE),
        Shape("1DConv 1", 0, 1, (1, 128), 64, (1, 3), padding=(0, 1), pool=(1, 2, 1, 2, 0, 0), first=True),
        Shape("1DConv 2", 0, 64, (1, 64), 128, (1, 3), padding=(0, 1), pool=(1, 2, 1, 2, 0, 0)),
        Shape("frames 1", 0, 3, (28, 28), 64, **_SAME, pool=_SQUARE, first=True),
        Shape("sensors 2", 0, 64, (1, 124), 64, (1, 5)),
    ]),
    *_batches((1, 64), [
        Shape("OCR 1", 0, 1, (32, 100), 64, **_SAME, pool=_SQUARE, first=True),
        Shape("OCR 2", 0, 64, (16, 50), 128, **_SAME, pool=_SQUARE),
        Shape("OCR 3", 0, 128, (8, 25), 256, **_SAME),
        Shape("OCR 4", 0, 256, (8, 25), 256, **_SAME, pool=_TALL),
        Shape("OCR 5", 0, 256, (4, 26), 512, **_SAME),
        Shape("OCR 6", 0, 512, (4, 26), 512, **_SAME, pool=_TALL),
        Shape("OCR 7", 0, 512, (2, 27), 512, (2, 2)),
    ]),
    *_batches((1, 28), [
        Shape("video 1", 0, 3, (256, 342), 32, (5, 5), (2, 2), first=True),
        Shape("video 2", 0, 32, (126, 169), 64, (3, 3), (2, 2)),
        Shape("video 3", 0, 64, (62, 84), 128, (3, 3), (2, 2)),
        Shape("video 4", 0, 128, (30, 41), 256, (3, 3), (2, 2)),
    ]),
    *_batches((1, 4), [
        Shape("speech 1", 0, 1, (161, 400), 32, (41, 11), (2, 2), (20, 5), first=True),
        Shape("speech 2", 0, 32, (81, 200), 32, (21, 11), (2, 1), (10, 5)),
    ]),
    *_batches((1, 32), [
        Shape("agent 1", 0, 1, (84, 84), 32, (8, 8), (4, 4), first=True),
        Shape("agent 1, 4 frames", 0, 4, (84, 84), 32, (8, 8), (4, 4), first=True),
        Shape("agent 2", 0, 32, (20, 20), 64, (4, 4), (2, 2)),
        Shape("agent 3", 0, 64, (9, 9), 64, (3, 3)),
    ]),
    Shape("pointwise 256 to 64", 1, 256, (56, 56), 64, (1, 1)),
    Shape("pointwise 512 to 2048", 8, 512, (7, 7), 2048, (1, 1)),
    Shape("pointwise by 2, 512 to 1024", 4, 512, (28, 28), 1024, (1, 1), (2, 2)),
    *(Shape(f"rows of 512 to 2048: {n}", 1, 512, (1, n), 2048, (1, 1)) for n in (1, 16, 32, 800, 3000)),
    *(Shape(f"rows of 3136 to 512: {n}", 1, 3136, (1, n), 512, (1, 1)) for n in (1, 32)),
    *(Shape(f"rows of 71680 to 1024: {n}", 1, 71680, (1, n), 1024, (1, 1)) for n in (1, 28)),
]  # fmt: skip


def _calls(s: Shape):
    """Ours, the library's, and the bytes of the weights."""
    x, bias = torch.randn(s.n, s.c, *s.size), torch.randn(s.co)
    weight = torch.randn(s.co, s.c, *s.kernel) * 0.05
    last = x.contiguous(memory_format=torch.channels_last)
    mine, order = (x, FIRST) if s.first else (last, LAST)
    packed = frozen.pack_op(weight, bias, s.conv_args(), s.pool_args(), order, LAST)

    def ours() -> Tensor:
        return frozen.op(
            mine, packed, None, list(weight.shape), s.conv_args(), RELU, [], s.pool_args(), order, LAST
        )

    args = list(s.padding), list(s.stride), [1, 1], 1
    if s.kernel == (1, 1) and s.size[0] == 1:
        rows, matrix = last.permute(0, 2, 3, 1).reshape(-1, s.c), weight.view(s.co, s.c)
        theirs_packed = torch.ops.mkldnn._reorder_linear_weight(matrix, rows.shape[0])

        def library() -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(rows, theirs_packed, bias, "relu", [], "")

        return ours, library, weight.numel() * 4
    theirs_packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *args, list(x.shape))

    def library() -> Tensor:
        y = torch.ops.mkldnn._convolution_pointwise(last, theirs_packed, bias, *args, "relu", [], "")
        return F.max_pool2d(y, s.pool[0:2], s.pool[2:4], s.pool[4:6]) if s.pool else y

    return ours, library, weight.numel() * 4


def _peak(clock) -> float:
    found = 0.0
    for _ in range(8):
        begin, begin_wall = clock(), time.perf_counter()
        rate = torch.ops.cnnlstm_fast.fma_peak(0.1)
        found = max(found, rate * (time.perf_counter() - begin_wall) / (clock() - begin))
    return found * 1e9


def main(pattern: str = "") -> None:
    """Print the table of the shapes whose name matches."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    peak = _peak(clock)
    print(f"{torch.get_num_threads()} threads, {peak / 1e9:.0f} GFLOP/s")
    print(f"{'':34}{'us':>9}{'of peak':>9}{'weights GB/s':>14}{'library/ours':>14}")
    for shape in SHAPES:
        if not re.search(pattern, shape.name):
            continue
        *calls, weight_bytes = _calls(shape)
        least = [float("inf")] * 2
        end, rounds = time.perf_counter() + SECONDS, 0
        while time.perf_counter() < end or rounds < 5:
            for i, call in enumerate(calls):
                begin = clock()
                call()
                least[i] = min(least[i], clock() - begin)
            rounds += 1
        us, rate = least[0] * 1e6, weight_bytes / least[0] / 1e9
        share, ratio = shape.flops() / least[0] / peak, least[1] / least[0]
        print(f"{shape.name:34}{us:9.1f}{share:9.2f}{rate:14.1f}{ratio:14.2f}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:2])
