"""Modules that ``torch.fx`` does not look into."""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = ["Leaf"]


class Leaf:
    """A base before ``nn.Module`` that makes symbolic tracers treat a module as one of PyTorch's own layers.

    A tracer makes one node of a module from ``torch.nn``, hooks included, and traces through all others. It
    reads ``__module__`` of the instance. So the instance has another value while it is traced, and the class
    keeps the one that pickles need.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not _traced(args) and not _traced(kwargs.values()):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        vars(self)["__module__"] = "torch.nn"
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            del vars(self)["__module__"]


def _traced(args) -> bool:
    """Whether an ``fx.Proxy`` is among the arguments or in one of their tuples."""
    return any(
        isinstance(a, fx.Proxy) or (isinstance(a, (tuple, list)) and any(isinstance(s, fx.Proxy) for s in a))
        for a in args
    )
