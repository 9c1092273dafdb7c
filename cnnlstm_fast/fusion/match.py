"""What counts as a block: the one matcher.

It serves chains of modules (``cf.Sequential``), of graph nodes (the compile backend) and of calls in a
running program (``cf.accelerate``). The members of a chain are described as parts, and :func:`spans` finds
the blocks among them. The tables below say what a part can be and what may follow it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from cnnlstm_fast.planning import observer
from cnnlstm_fast.planning.support import global_hooks, own_hooks


class Part(NamedTuple):
    """One member of a chain.

    Attributes:
        kind: ``conv``, ``norm``, ``activation``, ``monotone``, ``max_pool``, ``pool``, ``flatten`` (any
            bridge to a sequence) or ``identity``. ``monotone`` is an activation that never falls: a max pool
            may stand before it or behind it.
        rank: of its input, 4 for (N, C, H, W) and 3 for (N, C, L); None where any will do.
    """

    kind: str
    rank: int | None = None


#: The slot of a :class:`Block` that a part fills.
SLOTS = {
    "conv": "conv", "norm": "norm", "activation": "activation", "monotone": "activation",
    "max_pool": "pool", "pool": "pool", "flatten": "flatten",
}  # fmt: skip

#: By state of a block, the state behind each kind of part that may follow. A block begins with a convolution
#: and ends before a part that may not follow.
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


#: What else may follow where an epilogue (:mod:`cnnlstm_fast.ops.epilogue`) runs behind the convolution, in
#: the order in which it is written: sums with another tensor, and norms behind activations.
PROGRAM_FOLLOWS: dict[str, dict[str, str]] = {
    "conv": {"sum": "summed"},
    "norm": {"activation": "normed and activated", "monotone": "normed and activated", "sum": "summed"},
    "activated": {"norm": "normed late", "sum": "summed"},
    "normed and activated": {**FOLLOWS["activated"], "sum": "summed"},
    "normed late": {"activation": "activated twice", "monotone": "activated twice", "sum": "summed"},
    "activated twice": {"sum": "summed"},
    "summed": {"activation": "ended", "monotone": "ended"},
    "ended": {},
}


def follow(state: str, part: Part | str, rank: int | None, programs: bool = False) -> str | None:
    """The state behind ``part``; None where it ends the block of a convolution with inputs of ``rank``.

    Args:
        programs: states of :data:`PROGRAM_FOLLOWS` may follow, too.
    """
    if isinstance(part, str) or part.rank not in (None, rank):
        return None
    following = FOLLOWS.get(state, {})
    if programs:
        following = {**following, **PROGRAM_FOLLOWS.get(state, {})}
    if part.kind == "identity":
        return state if following else None
    return following.get(part.kind)


def is_program(kinds: Sequence[str]) -> bool:
    """Whether parts behind a convolution are in an order that only an epilogue takes."""
    state = "conv"
    for kind in kinds:
        following = follow(state, Part(kind), None)
        if following is None:
            return True
        state = following
    return False


def spans(chain: Sequence[Part | str]) -> list[tuple[int, int]]:
    """Begin and end (half-open) of each block of a chain.

    Args:
        chain: a string instead of a part says why that member fits in no block.
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
    nn.Softplus: Part("activation"),
    nn.Mish: Part("activation"),
    nn.Hardswish: Part("activation"),
    nn.Hardsigmoid: Part("monotone"),
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
    nn.CELU, nn.GLU, nn.Linear, nn.LogSigmoid, nn.PReLU, nn.SELU, nn.Softsign,
}  # fmt: skip

#: Containers that do nothing but call their children in turn.
CONTAINERS: set[type] = {nn.Sequential}


class Block(NamedTuple):
    """The modules of one block: ``flatten(pool(activation(norm(conv(x)))))``."""

    conv: nn.Conv1d | nn.Conv2d
    norm: nn.Module | None = None
    activation: nn.Module | None = None
    pool: nn.Module | None = None
    flatten: Any = None  # an nn.Flatten or a cnnlstm_fast.ToSequence


def part_of(module: nn.Module) -> Part | str:
    """The part of a block that a module can be, or why it can be none; hooks on all modules are not asked."""
    part = PARTS.get(type(module))
    if part is None:
        return "is not fused"
    if own_hooks(module):
        return "has hooks or a forward of its own"
    kind = part.kind
    if kind == "monotone":
        return part if rises(module) else Part("activation")
    if kind == "max_pool":
        if module.return_indices:
            return "returns indices"
    elif kind == "identity":
        if module.training and module.__dict__.get("p", 0) > 0:
            return "drops values in training"
    elif kind == "flatten" and type(module) is nn.Flatten:
        if module.start_dim != 1 or module.end_dim not in (-1, 2, 3):
            return "does not flatten a whole sample"
        return Part("flatten", None if module.end_dim == -1 else module.end_dim + 1)
    return part


def rises(activation: nn.Module) -> bool:
    """Whether an activation of a monotone kind, with its parameters, indeed never falls."""
    slope = _SLOPES.get(type(activation))
    return slope is None or getattr(activation, slope) >= 0


#: The attribute that must not be negative, of those activations that have one.
_SLOPES: dict[type, str] = {nn.LeakyReLU: "negative_slope", nn.ELU: "alpha"}


def members(modules: Iterable[Any]) -> list[nn.Module]:
    """The modules that are called in turn, with plain containers unrolled."""
    found = []
    for module in modules:
        if type(module) in CONTAINERS and not own_hooks(module):
            found.extend(members(module._modules.values()))  # one that stands twice too, unlike children()
        else:
            found.append(module)
    return found


def steps(modules: Iterable[nn.Module]) -> list[Block | nn.Module]:
    """A chain of modules, with each run of modules that makes a block as one :class:`Block`.

    Containers are unrolled. Called for every forward pass, so that hooks, replaced children and changed
    attributes count at once.
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
    """Whether each step of a chain is known to compute every sample of a batch alone.

    Args:
        rank: of the chain's input. A convolution takes an input of a lower rank for one sample.
    """
    if global_hooks():
        return False
    for step in chain:
        for module in step if isinstance(step, Block) else (step,):
            if module is None:
                continue
            part = part_of(module)
            if type(module) in PER_SAMPLE:
                known = not own_hooks(module)
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
