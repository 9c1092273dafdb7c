"""Errors of wrong calls: each is a ``ValueError`` or ``TypeError``, and what PyTorch raises for that call.

So code that catches PyTorch's error around a plain module catches ours around its drop-in.

Example:
    >>> try:
    ...     cf.LSTM(64, 128)(torch.randn(10, 2, 32))
    ... except RuntimeError as error:  # as nn.LSTM's
    ...     print(isinstance(error, ValueError), error)
    True the LSTM expects 64 features but the input has 32 in its last dimension: ...
"""

from __future__ import annotations

__all__ = ["WrongDevice", "WrongDtype", "WrongRank", "WrongShape", "WrongStates", "WrongType", "WrongValue"]


class WrongValue(ValueError, RuntimeError):
    """A number or a word that does not fit; a ``RuntimeError`` in PyTorch."""


class WrongShape(WrongValue):
    """A shape that does not fit; a ``RuntimeError`` in PyTorch."""


class WrongDevice(WrongValue):
    """Tensors on several devices; a ``RuntimeError`` in PyTorch."""


class WrongRank(WrongShape, IndexError):
    """Dimensions that are missing; an ``IndexError`` in PyTorch where they are asked for by number."""


class WrongDtype(TypeError, ValueError, RuntimeError):
    """A dtype that does not fit; a ``RuntimeError`` or, of a recurrent layer, a ``ValueError`` in PyTorch."""


class WrongType(TypeError, AttributeError):
    """No tensor; an ``AttributeError`` in PyTorch where a method of one is called."""


class WrongStates(TypeError, IndexError, RuntimeError):
    """No pair of states; an ``IndexError`` or ``RuntimeError`` in PyTorch."""
