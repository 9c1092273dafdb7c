"""What the machine can do: float32 multiply-adds per second, and copied bytes per second."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch

from cnnlstm_fast import _ext

COPY_BYTES = 256 << 20
SGEMM_SIZE = 2048


@dataclass(frozen=True)
class Roofline:
    """Rates over all of torch's threads.

    Attributes:
        gflops: float32 GFLOP/s.
        source: ``"fma loop"`` for the package's compiled loop of fused multiply-adds, or
            ``"sgemm 2048"`` for PyTorch's matrix product, a lower bound, where nothing is compiled.
        copy_gbs: GB/s, read and written bytes together, of a copy of 256 MiB into a reused tensor.
    """

    gflops: float
    source: str
    copy_gbs: float


def measure(seconds: float = 1.0) -> Roofline:
    """Measure both rates in about ``seconds`` seconds."""
    if _ext.loaded:
        gflops, source = torch.ops.cnnlstm_fast.fma_peak(seconds / 2), "fma loop"
    else:
        gflops, source = _sgemm(seconds / 2), f"sgemm {SGEMM_SIZE}"
    return Roofline(float(gflops), source, _copy(seconds / 2))


def _sgemm(seconds: float) -> float:
    a = torch.randn(SGEMM_SIZE, SGEMM_SIZE)
    b = torch.randn(SGEMM_SIZE, SGEMM_SIZE)
    out = torch.empty_like(a)
    return 2 * SGEMM_SIZE**3 / _median_seconds(lambda: torch.mm(a, b, out=out), seconds) / 1e9


def _copy(seconds: float) -> float:
    a = torch.ones(COPY_BYTES // 4)
    out = torch.zeros_like(a)
    return 2 * COPY_BYTES / _median_seconds(lambda: out.copy_(a), seconds) / 1e9


def _median_seconds(run, seconds: float) -> float:
    run()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return median(times)
