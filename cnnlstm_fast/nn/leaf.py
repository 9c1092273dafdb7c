"""Modules that ``torch.fx`` does not look into."""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = ["Leaf"]


class Leaf:
    """In front of an ``nn.Module``: symbolic tracers treat it as they treat PyTorch's own layers.

    A tracer calls a module whose type comes from ``torch.nn`` as one node, hooks and all, and traces through
    every other. It asks the instance for the name, so that it can be told without touching the class, whose
    name pickles have.
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
    """Whether a tracer's stand-in is among the arguments or in one of their tuples."""
    return any(
        isinstance(a, fx.Proxy) or (isinstance(a, (tuple, list)) and any(isinstance(s, fx.Proxy) for s in a))
        for a in args
    )
