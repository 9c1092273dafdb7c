"""``nn.Sequential`` whose blocks run as one op each."""

from __future__ import annotations

import torch
from torch import nn

from cnnlstm_fast.fusion import match
from cnnlstm_fast.nn.chain import run_chain

__all__ = ["Sequential"]


class Sequential(nn.Sequential):
    """An ``nn.Sequential`` with the same children, keys and results, but fused.

    A convolution and the batch norm, activation, dropout (in eval mode), pool and ``Flatten(1)`` or
    :class:`cnnlstm_fast.ToSequence` that follow it become one op. What cannot be fused, and every child that
    carries a hook, is called as it is; :func:`cnnlstm_fast.explain` shows which and why. Plain
    ``nn.Sequential`` children are looked into. Children may be exchanged, appended and hooked at any time.

    Args:
        args: the children, as ``nn.Sequential`` takes them: modules, or one ``OrderedDict`` of modules.

    Shapes:
        Shapes, dtypes and strides of the result are those of ``nn.Sequential``.

    Raises:
        ValueError: an input that the convolution of a fused block cannot take.

    Example:
        >>> cnn = cf.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        >>> cnn(torch.randn(4, 3, 28, 28)).shape
        torch.Size([4, 12544])
        >>> list(cnn.state_dict())
        ['0.weight', '0.bias']
    """

    def forward(self, input):
        if torch.jit.is_scripting():
            for module in self:
                input = module(input)
            return input
        else:
            return _run(self, input)


@torch.jit.ignore
def _run(container: nn.Sequential, input):
    return run_chain(match.steps(container._modules.values()), input)


match.CONTAINERS.add(Sequential)
