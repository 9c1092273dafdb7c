"""A block's result on its way to the next convolution, channels-last, as convolutions read it fastest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from cnnlstm_fast.fusion.calls import is_sum, read_call
from cnnlstm_fast.fusion.plan import FusionPlan
from cnnlstm_fast.fusion.tensors import METADATA, awaits_sum, no_function, unversioned_alias


class ChannelsLastHandoff(Tensor):
    """A map that lies channels-last where PyTorch's is contiguous.

    Convolutions read it as it lies. Any other reader first makes it a plain contiguous tensor.
    """

    _plan: FusionPlan
    _map: Tensor  # what convolutions read: autograd saves this tensor, and not the one the program holds

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_sum(function) and awaits_sum(args):
            return NotImplemented  # the other operand's class answers
        if function not in METADATA and not _returns_itself(function, args, kwargs):
            for value in tree_iter((args, kwargs)):
                if type(value) is ChannelsLastHandoff:
                    value.cancel()
        with no_function():
            return function(*args, **kwargs)

    def cancel(self) -> None:
        """Become a plain tensor in PyTorch's layout, and let the block write that layout from now on."""
        plan = self._plan
        plan.hands_on = False
        plan.by_shape.clear()
        plan.outlooks.clear()
        self.close()

    def close(self) -> None:
        """Become a plain tensor in PyTorch's layout."""
        del self._plan, self._map
        self.__class__ = Tensor  # type: ignore[assignment]  # from here on the object is plain
        with torch.no_grad():
            self.data = self.detach().contiguous()


def hand_on(result: Tensor, plan: FusionPlan) -> Tensor:
    """``result``, which nothing else holds, as a :class:`ChannelsLastHandoff`."""
    handed = unversioned_alias(result)
    handed.__class__ = ChannelsLastHandoff
    handed._plan, handed._map = plan, result  # type: ignore[attr-defined]
    return handed


def _returns_itself(function, args, kwargs) -> bool:
    """Whether a call returns its first argument, as dropout does in eval mode."""
    found = read_call(function, args, kwargs)
    return found is not None and found.part.kind == "identity"
