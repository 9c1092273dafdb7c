"""How PyTorch would lay out a block's result in memory."""

from __future__ import annotations

from torch import Tensor, nn


def eager_layout(
    x: Tensor, weight: Tensor, pooled: bool, norm: nn.Module | None, activation: nn.Module | None
) -> str:
    """The layout of a block's result by PyTorch's operators: ``channels_last`` or ``channels_first``."""
    signal, unbatched = weight.dim() == 3, x.dim() == weight.dim() - 1
    if (pooled and (signal or unbatched)) or not (x.is_cpu or x.is_cuda):
        return "channels_first"
    if signal:  # PyTorch's conv1d makes its input contiguous
        last = like_channels_last(weight.unsqueeze(2))
    else:
        last = like_channels_last(x.unsqueeze(0) if unbatched else x) or like_channels_last(weight)
    return layout_behind(last, weight, norm, activation)


#: Activations that keep their argument's strides, even those of a one-channel map, which is contiguous too.
_KEEP_STRIDES = (nn.Identity, nn.Hardtanh)


def layout_behind(last: bool, weight: Tensor, norm: nn.Module | None, activation: nn.Module | None) -> str:
    """The layout behind norm and activation, where ``last`` says that the convolution gives channels-last.

    A map of one channel is both channels-last and contiguous; most operators give it contiguous strides.
    """
    if not last:
        return "channels_first"
    if weight.shape[0] > 1:
        return "channels_last"
    kept = (
        activation is None or isinstance(activation, _KEEP_STRIDES) or getattr(activation, "inplace", False)
    )
    return "channels_last" if norm is None and kept else "channels_first"


def like_channels_last(x: Tensor) -> bool:
    """Whether PyTorch's ``suggest_memory_format`` calls a 4-d tensor channels-last, dense or not."""
    if x.dim() != 4 or x.stride(3) < x.stride(1):  # a contiguous tensor, most likely
        return False
    size, stride = x.shape, x.stride()
    if stride[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * size[d] if size[d] > 1 else stride[d]
    return True
