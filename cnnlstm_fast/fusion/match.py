"""What counts as a block, in a list of modules or in calls of functions: one matcher for all who look.

A chain of modules (``cf.Sequential``), of graph nodes (the compile backend) or of calls that really
happened (``cf.accelerate``) is described as parts; :func:`spans` finds the blocks among them. What a
part may be and what may follow it stands in the tables below.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import nn

from cnnlstm_fast.planning import observer
from cnnlstm_fast.planning.support import global_hooks, unhooked


class Part(NamedTuple):
    """One member of a chain: what it does, and the dimensions (N, C, ...) it works on if that matters.

    ``kind`` is ``conv``, ``norm``, ``activation``, ``monotone`` (an activation that never falls, so that
    it may change places with a max pool), ``max_pool``, ``pool``, ``flatten`` (any bridge) or
    ``identity``.
    """

    kind: str
    rank: int | None = None


#: The slot of a :class:`Block` that a part fills.
SLOTS = {
    "conv": "conv", "norm": "norm", "activation": "activation", "monotone": "activation",
    "max_pool": "pool", "pool": "pool", "flatten": "flatten",
}  # fmt: skip

#: Where a part leads: a block begins with a convolution, and ends where nothing leads on.
FOLLOWS: dict[str, dict[str, str]] = {
    "conv": {
        "norm": "norm", "activation": "activated", "monotone": "activated", "max_pool": "pooled early",
        "pool": "pooled", "flatten": "flat",
    },
    "norm": {
        "activation": "activated", "monotone": "activated", "max_pool": "pooled early", "pool": "pooled",
        "flatten": "flat",
    },
    "activated": {"max_pool": "pooled", "pool": "pooled", "flatten": "flat"},
    "pooled early": {"monotone": "pooled", "flatten": "flat"},
    "pooled": {"flatten": "flat"},
    "flat": {},
}  # fmt: skip


def follow(state: str, part: Part | str, rank: int | None) -> str | None:
    """The state behind ``part``, or None where it does not belong to the block of a ``rank``-d conv."""
    if isinstance(part, str) or part.rank not in (None, rank):
        return None
    if part.kind == "identity":
        return state if FOLLOWS[state] else None
    return FOLLOWS[state].get(part.kind)


def spans(chain: Sequence[Part | str]) -> list[tuple[int, int]]:
    """Where the blocks of a chain begin and end (half-open).

    A string in the place of a part says why that member fits in no block.
    """
    found, at = [], 0
    while at < len(chain):
        begin, first = at, chain[at]
        at += 1
        if isinstance(first, str) or first.kind != "conv":
            continue
        state = "conv"
        while at < len(chain):
            following = follow(state, chain[at], first.rank)
            if following is None:
                break
            state = following
            at += 1
        found.append((begin, at))
    return found


# ---------------------------------------------------------------- modules

#: Modules that can be part of a block; exactly these types, since a subclass may do anything.
PARTS: dict[type, Part] = {
    nn.Conv2d: Part("conv", 4),
    nn.Conv1d: Part("conv", 3),
    nn.BatchNorm2d: Part("norm", 4),
    nn.BatchNorm1d: Part("norm", 3),
    nn.ReLU: Part("monotone"),
    nn.LeakyReLU: Part("monotone"),
    nn.ELU: Part("monotone"),
    nn.Hardtanh: Part("monotone"),
    nn.ReLU6: Part("monotone"),
    nn.Tanh: Part("monotone"),
    nn.Sigmoid: Part("monotone"),
    nn.SiLU: Part("activation"),
    nn.GELU: Part("activation"),
    nn.MaxPool2d: Part("max_pool", 4),
    nn.MaxPool1d: Part("max_pool", 3),
    nn.AdaptiveMaxPool2d: Part("max_pool", 4),
    nn.AdaptiveMaxPool1d: Part("max_pool", 3),
    nn.AvgPool2d: Part("pool", 4),
    nn.AvgPool1d: Part("pool", 3),
    nn.AdaptiveAvgPool2d: Part("pool", 4),
    nn.AdaptiveAvgPool1d: Part("pool", 3),
    nn.Flatten: Part("flatten"),
    nn.Identity: Part("identity"),
    nn.Dropout: Part("identity"),
    nn.Dropout1d: Part("identity"),
    nn.Dropout2d: Part("identity"),
}

#: Modules besides the parts that treat every sample of a batch alone and have no state.
PER_SAMPLE: set[type] = {
    nn.CELU, nn.GLU, nn.Hardsigmoid, nn.Hardswish, nn.Linear, nn.LogSigmoid, nn.Mish, nn.PReLU, nn.SELU,
    nn.Softplus, nn.Softsign,
}  # fmt: skip

#: Containers that do nothing but call their children in turn.
CONTAINERS: set[type] = {nn.Sequential}


class Block(NamedTuple):
    """The modules of one block: ``flatten(pool(activation(norm(conv(x)))))``."""

    conv: nn.Conv1d | nn.Conv2d
    norm: nn.Module | None = None
    activation: nn.Module | None = None
    pool: nn.Module | None = None
    flatten: Any = (
        None  # an nn.Flatten, or a module with a ``layout`` and ``split_clips``, which views the result
    )


def part_of(module: nn.Module) -> Part | str:
    """The part a module can play in a block, or why it can play none."""
    part = PARTS.get(type(module))
    if part is None:
        return "is not fused"
    if not unhooked(module):
        return "has hooks or a forward of its own"
    kind = part.kind
    if kind == "monotone":
        return part if rises(module) else Part("activation")
    if kind == "max_pool":
        if module.return_indices:
            return "returns indices"
    elif kind == "identity":
        if module.training and getattr(module, "p", 0) > 0:
            return "drops values in training"
    elif kind == "flatten" and type(module) is nn.Flatten:
        if module.start_dim != 1 or module.end_dim not in (-1, 2, 3):
            return "does not flatten a whole sample"
        return Part("flatten", None if module.end_dim == -1 else module.end_dim + 1)
    return part


def rises(activation: nn.Module) -> bool:
    """Whether an activation of a monotone kind, with its parameters, indeed never falls."""
    return getattr(activation, "negative_slope", 0) >= 0 and getattr(activation, "alpha", 0) >= 0


def is_container(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether calling ``module`` does nothing but call its children in turn."""
    return type(module) in CONTAINERS and unhooked(module)


def members(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that are called in turn, with plain containers unrolled."""
    found = []
    for module in modules:
        if is_container(module):
            found.extend(members(module._modules.values()))
        else:
            found.append(module)
    return found


def steps(modules: Iterable[nn.Module]) -> list[Block | nn.Module]:
    """A chain of modules as blocks and, where nothing is to be fused, the modules themselves.

    Containers inside are unrolled. Looked up anew on every call, so that hooks, replaced children
    and changed attributes count at once.
    """
    if torch.jit.is_tracing() or global_hooks():
        return list(modules)
    chain = members(modules)
    parts = [part_of(module) for module in chain]
    result: list[Block | nn.Module] = []
    at = 0
    for begin, end in spans(parts):
        result.extend(chain[at:begin])
        slots: dict[str, Any] = {}
        for part, module in zip(parts[begin:end], chain[begin:end], strict=True):
            slot = None if isinstance(part, str) else SLOTS.get(part.kind)
            if slot is not None:
                slots[slot] = module
        result.append(Block(**slots))
        at = end
    result.extend(chain[at:])
    if observer.current is not None:
        reasons = dict(zip(map(id, chain), parts, strict=True))
        for step in result:
            if not isinstance(step, Block):
                why = reasons[id(step)]
                why = why if isinstance(why, str) else "belongs to no convolution before it"
                observer.current.as_is(step, f"{type(step).__name__} {why}")
    return result


def per_sample(chain: Iterable[Block | nn.Module], rank: int) -> bool:
    """Whether it is known that splitting the batch does not change what a chain of steps computes.

    ``rank`` is that of the chain's input; a convolution takes one of a lower rank for unbatched.
    """
    for step in chain:
        for module in step if isinstance(step, Block) else (step,):
            if module is None:
                continue
            part = part_of(module)
            if type(module) in PER_SAMPLE:
                known = unhooked(module)
            elif isinstance(part, str):
                known = False
            elif part.kind == "norm":
                known = not module.training and module.running_mean is not None
            elif part.kind == "flatten":
                known = type(module) is nn.Flatten
            else:
                known = part.kind != "conv" or part.rank == rank
            if not known:
                return False
            if type(module) is nn.Flatten:
                rank = 2
    return True


def as_block(modules: Iterable[nn.Module]) -> Block | None:
    """The modules as one block with nothing before or after it, or None."""
    found = steps(modules)
    return found[0] if len(found) == 1 and isinstance(found[0], Block) else None
