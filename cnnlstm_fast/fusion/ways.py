"""The ways to run a site: as PyTorch's operators, or as a block, with maps that lie one way or the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
        x: the input as PyTorch lays it out. Its values are not read unless the ways are timed.
        given: the same, handed on channels-last; None where that is not asked.
        timed: the ways are timed. Only then the site may convert its input: no prediction knows what that is
            worth.
        shapes: shape and strides that PyTorch's operators give all values of the site.
    """

    function: Callable[..., Tensor]
    conv: Conv
    x: Tensor
    given: Tensor | None
    timed: bool
    shapes: list[tuple] = []  # noqa: RUF012  # never changed

    def inputs(self) -> Iterator[tuple[Tensor, bool, bool]]:
        """What a block may get, and whether it is handed on, or converted by the site."""
        yield self.x, False, False
        if self.given is not None:
            yield self.given, True, False
        if self.timed and self.x.dim() == 4 and self.x.is_contiguous():
            last = as_handed(self.x, True)
            if not last.is_contiguous():
                yield last, False, True


class Way(NamedTuple):
    """One way to run a site.

    Attributes:
        layout: of the result.
        call: the block's plan; None where PyTorch's operators run.
        us: microseconds of this site, predicted or timed.
        overhead_us: those of speculating it, where that is not part of ``us``.
        handed: the input is handed on channels-last, where PyTorch's is contiguous.
        converts: the block gets a channels-last copy of its contiguous input.
        hands_on: the result is handed on channels-last, where PyTorch's is contiguous.
        behind_us: microseconds of the sites that read its result.
        head: how many of the steps run in one call with the convolution; an epilogue runs the others.
    """

    layout: str
    call: CallPlan | None
    us: float
    overhead_us: float = 0.0
    handed: bool = False
    converts: bool = False
    hands_on: bool = False
    behind_us: float = 0.0
    head: int = 0

    @property
    def total_us(self) -> float:
        return self.us + self.overhead_us + self.behind_us

    @property
    def name(self) -> str:
        """For the tuner's files."""
        if self.call is None:
            return "PyTorch"
        given = "handed" if self.handed else "converted" if self.converts else "as it lies"
        return f"{self.call.plan}, {given}, {self.layout}"

    def reason(self, plain: Way, timed: bool) -> str:
        """What decided, in words."""
        assert self.call is not None
        if not timed:
            return self.call.reason
        times = [in_words(1e3 * way.total_us) for way in (self, plain)]
        where = "with what reads it" if self.behind_us else "where it stands"
        return f"timed {where}: {times[0]} as a block by {self.call.plan}, {times[1]} by PyTorch"


#: Seconds of each of some ways, timed in turn: ``clock(plan, place, ways)``. None where nothing can be timed.
Clock = Callable[[Any, Place, Sequence[Way]], "list[float] | None"]


def as_pytorch(x: Tensor, filled: bool) -> Tensor:
    """``x`` as a contiguous tensor, with its values if it is to be ``filled``."""
    if filled:
        return x.detach().contiguous().requires_grad_(x.requires_grad)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).requires_grad_(x.requires_grad)


def as_handed(x: Tensor, filled: bool) -> Tensor:
    """``x`` as a channels-last tensor, with its values if it is to be ``filled``."""
    if filled:
        last = x.detach().contiguous(memory_format=torch.channels_last)
    else:
        last = torch.empty_like(x, memory_format=torch.channels_last)
    return last.detach().requires_grad_(x.requires_grad)
