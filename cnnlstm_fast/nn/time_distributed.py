"""The same module on every time step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cnnlstm_fast.errors import WrongRank, WrongShape, WrongType
from cnnlstm_fast.fusion import match
from cnnlstm_fast.limits import limit
from cnnlstm_fast.nn.chain import run_chain, run_modules
from cnnlstm_fast.nn.leaf import Leaf

__all__ = ["TimeDistributed"]

#: Bytes of the largest map of a chunk. Larger maps get fresh pages from the system in each layer.
CHUNK_BYTES = limit("FRAME_CHUNK_BYTES", 4 * 2**20, 1)


class TimeDistributed(Leaf, nn.Module):
    """Apply ``module`` to every time step: fold time into the batch, run, unfold.

    A chain of layers inside (an ``nn.Sequential`` or a single layer) is fused as in
    :class:`cnnlstm_fast.Sequential` and writes straight into the result. Without gradients on the
    CPU, a chain with layers between the blocks that are not fused goes through in chunks whose maps
    stay in the cache, if each of its layers is known to treat every step alone.

    Args:
        module: takes ``(N, *step)`` and returns ``(N, *out)``.
        batch_first: the input is ``(B, T, *step)`` if True, ``(T, B, *step)`` if False.
        flatten: merge everything behind the first two dimensions of the result, as a recurrent
            layer wants it.

    Shapes:
        ``(B, T, C, H, W) -> (B, T, F)``, or ``(T, B, C, H, W) -> (T, B, F)`` with
        ``batch_first=False``; with ``flatten=False`` ``(B, T, *out)`` or ``(T, B, *out)``. Steps of
        other ranks, as ``(B, T, F)`` for a Linear, work alike.

    Raises:
        ValueError: the input is not of a rank that ``module`` can take step by step, or ``module``
            does not return one result per step.
        TypeError: the input or what ``module`` returns is not a tensor.

    Example:
        >>> cnn = cf.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        >>> cf.TimeDistributed(cnn)(torch.randn(4, 10, 3, 28, 28)).shape
        torch.Size([4, 10, 3136])
    """

    def __init__(self, module: nn.Module, batch_first: bool = True, flatten: bool = True):
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"got module={module!r}, expected an nn.Module")
        self.module = module
        self.batch_first = batch_first
        self.flatten = flatten

    def extra_repr(self) -> str:
        return f"batch_first={self.batch_first}, flatten={self.flatten}"

    def forward(self, x: Tensor) -> Tensor:
        chain = match.steps([self.module])
        self._check(x, chain)
        frames = x.flatten(0, 1)
        size = _chunk_size(frames, chain)
        if size is None:
            y = self._run(frames, chain)
        else:
            y = torch.cat([self._run(chunk, chain) for chunk in frames.split(size)])
        if not isinstance(y, Tensor):
            raise WrongType(
                f"{type(self.module).__name__} returned a {type(y).__name__}, expected a tensor with one "
                "result per step: wrap it in a module that returns the tensor to go on with"
            )
        if y.dim() == 0 or y.shape[0] != x.shape[0] * x.shape[1]:
            raise WrongShape(
                f"{type(self.module).__name__} returned shape {tuple(y.shape)} for "
                f"{x.shape[0]} x {x.shape[1]} steps, expected {x.shape[0] * x.shape[1]} results: it must "
                "keep the first dimension"
            )
        return y.unflatten(0, x.shape[:2])

    def _check(self, x: Tensor, chain: list) -> None:
        if not isinstance(x, Tensor):
            raise WrongType(f"got a {type(x).__name__}, expected a tensor {self._shape('*step')}")
        first = chain[0] if chain else None
        conv = first.conv if isinstance(first, match.Block) else first
        part = match.PARTS.get(type(conv))
        if part is not None and part.rank is not None and part.kind == "conv":
            step = "C, H, W" if part.rank == 4 else "C, L"
            if x.dim() != part.rank + 1:
                hint = f": add the missing dimension, e.g. x.unsqueeze({int(self.batch_first)}) for one step"
                raise WrongRank(
                    f"got an input of shape {tuple(x.shape)} for a {type(conv).__name__} on every step, "
                    f"expected {self._shape(step)}{hint if x.dim() == part.rank else ''}"
                )
        elif x.dim() < 2:
            raise WrongRank(f"got an input of shape {tuple(x.shape)}, expected {self._shape('*step')}")

    def _shape(self, step: str) -> str:
        return f"(B, T, {step})" if self.batch_first else f"(T, B, {step})"

    def _run(self, frames: Tensor, chain: list):
        last = chain[-1] if chain else None
        if self.flatten and isinstance(last, match.Block) and last.flatten is None:
            y = run_modules(last, run_chain(chain[:-1], frames), "features")
        else:
            y = run_chain(chain, frames)
        return y.flatten(1) if self.flatten and isinstance(y, Tensor) and y.dim() > 2 else y


def _chunk_size(frames: Tensor, chain: list) -> int | None:
    """How many frames to run at a time, or None for all at once."""
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(frames) is not Tensor
        or frames.device.type != "cpu"
        or torch._C._are_functorch_transforms_active()
        or not any(_makes_maps(step) for step in chain)
        or not match.per_sample(chain, frames.dim())
    ):
        return None
    largest = _largest_map(frames.shape[1:], chain) * frames.element_size()
    size = max(CHUNK_BYTES // max(largest, 1), torch.get_num_threads(), 1)
    return size if size < len(frames) else None


def _makes_maps(step: match.Block | nn.Module) -> bool:
    """Whether ``step`` is an unfused layer, which is faster on maps that stay in cache."""
    return not isinstance(step, (match.Block, nn.Flatten, nn.Identity, nn.Linear))


def _largest_map(shape: tuple[int, ...], chain: list) -> int:
    """About how many elements the largest map of one frame has; padding does not count."""
    elements, area = math.prod(shape), math.prod(shape[1:])
    for step in chain:
        for layer in step if isinstance(step, match.Block) else (step,):
            stride = getattr(layer, "stride", 1)
            area //= stride ** (len(shape) - 1) if isinstance(stride, int) else math.prod(stride)
        channels = getattr(step.conv if isinstance(step, match.Block) else step, "out_channels", 0)
        elements = max(elements, channels * area)
    return elements
