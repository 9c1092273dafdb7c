"""A model whose program cannot be captured whole: those of its modules that can run frozen."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from cnnlstm_fast.copying import copy_sharing_tensors
from cnnlstm_fast.freeze.trials import Trial, copied

FreezeOne = Callable[[nn.Module, tuple, dict], "nn.Module | None"]

#: Modules that are worth a program.
_HEAVY = (nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase)


def freeze_pieces(
    plain: nn.Module, model: nn.Module, args: tuple, kwargs: dict, freeze_one: FreezeOne
) -> nn.Module | None:
    """A copy of a model, of which the largest modules that have a program run frozen; None where none has.

    Args:
        plain: the accelerated model.
        model: the one that is captured, of the same structure.
        args, kwargs: an example of a call.
        freeze_one: freezes a module for such arguments; None where it has no program.
    """
    twin = copy_sharing_tensors(plain)
    if twin is plain:
        return None
    try:
        calls = _first_calls(model, *copied(args, kwargs))
        if not _replace(twin, model, calls, freeze_one):
            return None
        if not Trial(twin, args, kwargs).did_as(Trial(plain, args, kwargs)):
            return None
    except Exception:  # whatever a model does with parts that are not its own
        return None
    return twin


def _first_calls(model: nn.Module, args: tuple, kwargs: dict) -> dict[nn.Module, tuple[tuple, dict]]:
    """Arguments of the first call of each module that takes and gives tensors."""
    calls: dict[nn.Module, tuple[tuple, dict]] = {}

    def note(module, given, named):
        calls.setdefault(module, (given, named))

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in model.modules() if m is not model]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _replace(
    twin: nn.Module, model: nn.Module, calls: dict[nn.Module, tuple[tuple, dict]], freeze_one: FreezeOne
) -> bool:
    """Put frozen modules in the places of those that can be, the outermost first; whether there are any."""
    found = False
    for name, child in model.named_children():
        if not any(isinstance(m, _HEAVY) for m in child.modules()):
            continue
        piece = _piece(child, calls[child], freeze_one) if child in calls else None
        if piece is not None:
            twin._modules[name] = piece
            found = True
        else:
            inner = twin._modules[name]
            found |= inner is not None and _replace(inner, child, calls, freeze_one)
    return found


def _piece(module: nn.Module, call: tuple[tuple, dict], freeze_one: FreezeOne) -> nn.Module | None:
    if not all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(call) if leaf is not None):
        return None
    return freeze_one(module, *call)
