"""A block's result on its way to the next convolution, in the layout that convolutions read best."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from cnnlstm_fast import patterns
from cnnlstm_fast.fusion.observe import QUESTIONS, no_function
from cnnlstm_fast.fusion.recipe import Recipe


class Unviewed(torch.autograd.Function):
    """The same tensor as no view: its memory may be exchanged, and it may change in place after that."""

    @staticmethod
    def forward(ctx, view):
        return view.data

    @staticmethod
    def backward(ctx, grad):
        return grad


class Handed(Tensor):
    """A result that lies channels-last where PyTorch's is contiguous, until others than convolutions look."""

    _recipe: Recipe
    _plain: Tensor  # what convolutions read: autograd keeps this, and not what the program holds

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in QUESTIONS and not _returns_itself(function, args, kwargs):
            for value in tree_iter((args, kwargs)):
                if type(value) is Handed:
                    value.settle()
        with no_function():
            return function(*args, **kwargs)

    def settle(self) -> None:
        """Become a plain tensor in PyTorch's layout; the block hands nothing on from now on."""
        recipe = self._recipe
        recipe.hands_on = False
        recipe.sizes.clear()
        self.close()

    def close(self) -> None:
        del self._recipe, self._plain
        self.__class__ = Tensor  # type: ignore[assignment]  # the point of it
        with torch.no_grad():
            self.data = self.detach().contiguous()


def hand_on(result: Tensor, recipe: Recipe) -> Tensor:
    """``result``, which nobody else holds, as a :class:`Handed` tensor."""
    handed: Tensor = Unviewed.apply(result) if result.requires_grad else result.data
    handed.__class__ = Handed
    handed._recipe, handed._plain = recipe, result  # type: ignore[attr-defined]
    return handed


def _returns_itself(function, args, kwargs) -> bool:
    """Whether a call gives back its first argument, as dropout does in evaluation."""
    found = patterns.read_call(function, args, kwargs)
    return found is not None and found.part.kind == "identity"
