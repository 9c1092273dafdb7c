"""The ways to run a site: as PyTorch's operators, or as a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnnlstm_fast.functional.conv_block import CallPlan
from cnnlstm_fast.fusion.calls import Conv
from cnnlstm_fast.planning.choose import in_words
from cnnlstm_fast.planning.support import records_gradients


class Kind(NamedTuple):
    """What is known of an operand before it exists; without ``strides`` it is contiguous."""

    shape: torch.Size
    strides: tuple[int, ...] | None
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, x: Tensor) -> Kind:
        return cls(x.shape, x.stride(), x.dtype, x.requires_grad)

    def tensor(self, filled: bool) -> Tensor:
        """Such a tensor on the CPU: its values are random if it is ``filled``, else not written."""
        if self.strides is None:
            x = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        else:
            x = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="cpu")
        if filled:
            x.normal_(generator=torch.Generator("cpu").manual_seed(0))
        return x.requires_grad_(self.requires_grad and records_gradients())


class ConvCall(NamedTuple):
    """A convolution's call without its tensors: ``rest`` is what stands behind weight and bias."""

    function: Callable[..., Tensor]
    weight: Kind
    bias: Kind | None
    rest: tuple


class Place(NamedTuple):
    """A site where it stands.

    Attributes:
        function: the convolution.
        conv: its arguments behind the input.
        x: the input as it is read. Its values are not read unless the ways are timed.
        carried: it lies channels-last, where PyTorch's is contiguous, and so do the results.
        timed: the ways are timed.
        shapes: shape and strides that PyTorch's operators give all values of the site.
    """

    function: Callable[..., Tensor]
    conv: Conv
    x: Tensor
    carried: bool
    timed: bool
    shapes: list[tuple] = []  # noqa: RUF012  # never changed


class Way(NamedTuple):
    """One way to run a site.

    Attributes:
        layout: of the result.
        call: the block's plan; None where PyTorch's operators run.
        us: microseconds of this site, predicted or timed.
        overhead_us: those of speculating it, where that is not part of ``us``.
        carried: input and result lie channels-last, where PyTorch's are contiguous.
        head: how many of the steps run in one call with the convolution; an epilogue runs the others.
    """

    layout: str
    call: CallPlan | None
    us: float
    overhead_us: float = 0.0
    carried: bool = False
    head: int = 0

    @property
    def total_us(self) -> float:
        return self.us + self.overhead_us

    @property
    def name(self) -> str:
        """For the tuner's files."""
        name = "PyTorch" if self.call is None else self.call.plan
        return f"{name}, carried" if self.carried else name

    def reason(self, plain: Way, timed: bool) -> str:
        """What decided, in words."""
        assert self.call is not None
        if not timed:
            return self.call.reason
        times = [in_words(1e3 * way.total_us) for way in (self, plain)]
        return f"timed where it stands: {times[0]} as a block by {self.call.plan}, {times[1]} by PyTorch"


#: Seconds of each of some ways, timed in turn: ``clock(plan, place, ways)``. None where nothing can be timed.
Clock = Callable[[Any, Place, Sequence[Way]], "list[float] | None"]


def contiguous_like(x: Tensor, filled: bool) -> Tensor:
    """A contiguous tensor like ``x``, with its values if it is to be ``filled``."""
    if filled:
        return x.detach().contiguous().requires_grad_(x.requires_grad)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).requires_grad_(x.requires_grad)


def channels_last_like(x: Tensor, filled: bool) -> Tensor:
    """A channels-last image like ``x``, with its values if it is to be ``filled``."""
    n, c, h, w = x.shape
    last = torch.empty((n, h, w, c), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    if filled:
        last.copy_(x.detach())
    return last.requires_grad_(x.requires_grad)
