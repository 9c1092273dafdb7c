"""The question to the planner: one convolution block, its sizes, and which gradients are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cnnlstm_fast.spec import BlockSpec

#: Sizes that are assumed under a compiler where the true ones vary: images of a batch, and rows or columns.
#: Asking for the true ones would compile for just those.
NOMINAL_BATCH, NOMINAL_EXTENT = 16, 64
#: As in csrc/library_limits.cpp.
_SHORT_KERNEL = 3


class Sizes(NamedTuple):
    """What decides whether a plan can run a block.

    Attributes:
        spec: the block.
        shape: of the input (N, C, H, W).
        weight_shape: (Cout, C / groups, KH, KW).
        dtype: of input, parameters and result.
        device: the type of their device.
        norm: None; ``"folded"`` (running statistics, folded into the weights), ``"given"`` (running
            statistics, where the norm's weight needs a gradient) or ``"batch"`` (statistics of the batch).
    """

    spec: BlockSpec
    shape: Sequence[int]
    weight_shape: Sequence[int]
    dtype: torch.dtype
    device: str
    norm: str | None


class ConvProblem(NamedTuple):
    """One block on one input, as far as its cost depends on it.

    Attributes:
        spec: the block.
        batch, channels, height, width: of the input (N, C, H, W).
        out_channels, kernel: of the weight (Cout, C / groups, *kernel).
        conv, pooled: (H, W) of the convolution's map and after the pool.
        dtype, norm: as in :class:`Sizes`.
        training: some tensor needs a gradient.
        needs_x: the input does.
        channels_last: the input's channels are contiguous.
        threads: how many the kernels may use.
    """

    spec: BlockSpec
    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    kernel: tuple[int, int]
    conv: tuple[int, int]
    pooled: tuple[int, int]
    dtype: torch.dtype
    norm: str | None
    training: bool
    needs_x: bool
    channels_last: bool
    threads: int

    @property
    def taps(self) -> int:
        """Multiply-adds of one element of the map."""
        return self.channels // self.spec.groups * self.kernel[0] * self.kernel[1]

    @property
    def faulty(self) -> bool:
        """Whether PyTorch's convolution by AMX reads unwritten memory or crashes (csrc/library_limits.h)."""
        if self.dtype != torch.bfloat16:
            return False
        given = zip(
            (self.height, self.width), self.kernel, self.spec.dilation, self.spec.padding, strict=True
        )
        longer = any([
            dilation * (taps - 1) >= size and (taps > _SHORT_KERNEL or dilation > 1 or padding >= taps)
            for size, taps, dilation, padding in given
        ])  # fmt: skip
        return longer or 1 in (self.width, self.conv[1])

    @property
    def depthwise(self) -> bool:
        return self.spec.groups == self.channels > 1


def conv_problem(
    sizes: Sizes, training: bool, needs_x: bool, channels_last: bool, threads: int
) -> ConvProblem:
    """The problem of a block of these sizes."""
    spec, (batch, channels, height, width) = sizes.spec, sizes.shape
    size, kernel = (height, width), (sizes.weight_shape[2], sizes.weight_shape[3])
    return ConvProblem(
        spec, batch, channels, height, width, sizes.weight_shape[0], kernel,
        spec.conv_size(size, kernel), spec.out_size(size, kernel),
        sizes.dtype, sizes.norm, training, needs_x, channels_last, threads,
    )  # fmt: skip


def lies_channels_last(x: Tensor) -> bool:
    """Whether an image's channels are contiguous, and the image itself is not; one channel may lie so too."""
    # A conditional expression, because a compiler guards on a branch but makes a symbol of a value.
    return True if x.stride(1) == 1 and x.shape[2] * x.shape[3] > 1 else False


def nominal(
    shape: Sequence[int], weight_shape: Sequence[int], groups: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of input and weight, with assumed sizes where the compiler lets them vary."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # an expensive import

    def known(size: int, otherwise: int) -> int:
        return size if has_static_value(size) else otherwise

    per_group = known(weight_shape[1], -(-NOMINAL_EXTENT // groups))
    kernel = known(weight_shape[2], 3), known(weight_shape[3], 3)
    height, width = (known(shape[2 + i], max(NOMINAL_EXTENT, kernel[i])) for i in range(2))
    weight = known(weight_shape[0], groups * per_group), per_group, *kernel
    return (known(shape[0], NOMINAL_BATCH), groups * per_group, height, width), weight
