"""What :func:`cnnlstm_fast.explain` returns: a row per stage of a model's call."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Report", "Stage", "layout_of"]


@dataclass
class Stage:
    """One row of a :class:`cnnlstm_fast.explain.Report`.

    Attributes:
        name: the module's name in the model; ``-> name`` (or ``-> result``) for what the model does to
            a tensor on its way there.
        op: the operations, as ``Conv2d+ReLU+MaxPool2d``.
        shape: shape of the result of the first call; of the input where the stage failed.
        layout: how the result lies in memory: for a block a name that ``conv_block(layout=...)`` takes,
            else ``contiguous``, ``channels_last`` or ``strided``.
        plan: ``direct``, ``chunked``, ``winograd``, ``fft`` or ``reference`` for a block; ``fused``,
            ``library`` or ``reference`` for a ``cf.LSTM`` or ``cf.GRU``; ``PyTorch`` for a module that runs
            as it is; ``view`` or ``copy`` on the way into a module; ``failed``.
        reason: why this plan.
        ms: milliseconds, all calls together.
        bytes: memory of the result, all calls together; 0 for views.
        calls: how often it ran, in a loop over time or chunk by chunk.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    layout: str
    plan: str
    reason: str = ""
    ms: float = 0.0
    bytes: int = 0
    calls: int = 1


@dataclass
class Report:
    """What :func:`cnnlstm_fast.explain` saw; ``str()`` is a table.

    Attributes:
        stages: in the order of their first call.
        ms: milliseconds of the whole forward, watching included.
        error: what the forward raised, or None.
        mend: what to change then, or None.
    """

    stages: list[Stage] = field(default_factory=list)
    ms: float = 0.0
    error: str | None = None
    mend: str | None = None

    def __str__(self) -> str:
        header = ("stage", "what", "shape", "layout", "plan", "ms", "MiB", "reason")
        rows = [
            (
                s.name + (f" (x{s.calls})" if s.calls > 1 else ""),
                s.op,
                " x ".join(map(str, s.shape)) or "scalar",
                s.layout,
                s.plan,
                f"{s.ms:.2f}" if s.ms else "",
                f"{s.bytes / 2**20:.2f}" if s.bytes else "",
                s.reason,
            )
            for s in self.stages
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = []
        for row in (header, tuple("-" * w for w in widths), *rows):
            cells = [
                cell.rjust(w) if name in ("ms", "MiB") else cell.ljust(w)
                for cell, w, name in zip(row, widths, header, strict=True)
            ]
            lines.append("  ".join(cells).rstrip())
        if self.error is None:
            lines.append(f"total {self.ms:.2f} ms")
        else:
            lines.append(f"stopped by {self.error}")
            if self.mend is not None and self.mend not in self.error:
                lines.append(f"to mend it: {self.mend}")
        return "\n".join(lines)


def layout_of(x: Tensor) -> str:
    """How a tensor lies in memory, in a word."""
    if x.layout is not torch.strided:
        return str(x.layout)[6:]
    if x.is_contiguous():
        return "contiguous"
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"
    return "strided"
