"""What counts as a block, in a list of modules or in a graph: one matcher for all who look for blocks.

A chain of modules (or of graph nodes with one consumer each) is described as parts; :func:`spans`
finds the blocks among them. What a part may be and what may follow it stands in the tables below.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnnlstm_fast import functional, plans
from cnnlstm_fast.functional import unhooked

__all__ = [
    "Block", "Part", "as_block", "eager_layout", "is_container", "per_sample", "run", "spans", "steps",
]  # fmt: skip


class Part(NamedTuple):
    """One member of a chain: what it does, and the dimensions (N, C, ...) it works on if that matters."""

    kind: str
    rank: int | None = None


#: What may follow a part inside a block. A block begins with a convolution.
FOLLOWS: dict[str, tuple[str, ...]] = {
    "conv": ("activation", "pool", "flatten"),
    "activation": ("pool", "flatten"),
    "pool": ("flatten",),
    "flatten": (),
}

#: Modules that can be part of a block; exactly these types, since a subclass may do anything.
PARTS: dict[type, Part] = {
    nn.Conv2d: Part("conv", 4),
    nn.Conv1d: Part("conv", 3),
    nn.ReLU: Part("activation"),
    nn.MaxPool2d: Part("pool", 4),
    nn.MaxPool1d: Part("pool", 3),
    nn.Flatten: Part("flatten"),
}

#: Modules besides the parts that treat every sample of a batch alone and have no state, and those of
#: which that holds in eval mode only.
PER_SAMPLE: set[type] = {
    nn.AvgPool1d, nn.AvgPool2d, nn.ELU, nn.GELU, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.Linear,
    nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Tanh,
}  # fmt: skip
PER_SAMPLE_IN_EVAL: set[type] = {nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout, nn.Dropout2d}

#: Containers that do nothing but call their children in turn.
CONTAINERS: set[type] = {nn.Sequential}


class Block(NamedTuple):
    """The modules of one block."""

    conv: nn.Conv1d | nn.Conv2d
    activation: nn.Module | None = None
    pool: nn.Module | None = None
    flatten: nn.Module | None = None


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
        last = first.kind
        while at < len(chain):
            part = chain[at]
            if isinstance(part, str) or part.kind not in FOLLOWS[last] or part.rank not in (None, first.rank):
                break
            last = part.kind
            at += 1
        found.append((begin, at))
    return found


def part_of(module: nn.Module) -> Part | str:
    """The part a module can play in a block, or why it can play none."""
    part = PARTS.get(type(module))
    if part is None:
        return "is not fused"
    if not unhooked(module):
        return "has hooks or a forward of its own"
    kind = part.kind
    if kind == "conv":
        if module.padding_mode != "zeros":
            return "pads with something other than zeros"
    elif kind == "pool":
        if module.return_indices:
            return "returns indices"
    elif kind == "flatten":
        if module.start_dim != 1 or module.end_dim not in (-1, 2, 3):
            return "does not flatten a whole sample"
        return Part("flatten", None if module.end_dim == -1 else module.end_dim + 1)
    return part


def is_container(module: nn.Module) -> bool:
    """Whether calling ``module`` does nothing but call its children in turn."""
    return type(module) in CONTAINERS and unhooked(module)


def _members(modules: Iterable[nn.Module]) -> list[nn.Module]:
    members = []
    for module in modules:
        if is_container(module):
            members.extend(_members(module._modules.values()))
        else:
            members.append(module)
    return members


def steps(modules: Iterable[nn.Module]) -> list[Block | nn.Module]:
    """A chain of modules as blocks and, where nothing is to be fused, the modules themselves.

    Containers inside are unrolled. Looked up anew on every call, so that hooks, replaced children
    and changed attributes count at once.
    """
    if torch.jit.is_tracing() or functional.global_hooks():
        return list(modules)
    members = _members(modules)
    parts = [part_of(module) for module in members]
    result: list[Block | nn.Module] = []
    at = 0
    for begin, end in spans(parts):
        result.extend(members[at:begin])
        slots: dict[str, Any] = {parts[i].kind: members[i] for i in range(begin, end)}
        result.append(Block(**slots))
        at = end
    result.extend(members[at:])
    if plans.observer is not None:
        reasons = dict(zip(map(id, members), parts, strict=True))
        for step in result:
            if not isinstance(step, Block):
                why = reasons[id(step)]
                why = why if isinstance(why, str) else "follows no convolution"
                plans.observer.as_is(step, f"{type(step).__name__} {why}")
    return result


def per_sample(chain: Iterable[Block | nn.Module], rank: int) -> bool:
    """Whether it is known that splitting the batch does not change what a chain of steps computes.

    ``rank`` is that of the chain's input; a convolution takes one of a lower rank for unbatched.
    """
    for step in chain:
        conv = step.conv if isinstance(step, Block) else step
        kind = type(conv)
        if kind in PER_SAMPLE_IN_EVAL:
            known = not step.training and getattr(step, "running_mean", step) is not None and unhooked(step)
        elif kind in PER_SAMPLE:
            known = unhooked(step)
        else:
            part = part_of(conv)
            known = not isinstance(part, str) and (part.kind != "conv" or part.rank == rank)
        if not known:
            return False
        if kind is nn.Flatten or (isinstance(step, Block) and step.flatten is not None):
            rank = 2
    return True


def as_block(modules: Iterable[nn.Module]) -> Block | None:
    """The modules as one block with nothing before or after it, or None."""
    found = steps(modules)
    return found[0] if len(found) == 1 and isinstance(found[0], Block) else None


def run(block: Block, x: Any, layout: str | None = None) -> Tensor:
    """Run a block.

    Args:
        x: ``(N, C, H, W)``, ``(C, H, W)``, ``(N, C, L)`` or ``(C, L)``, as the convolution takes it.
        layout: a name of :data:`cnnlstm_fast.spec.LAYOUTS`; the block must have no flatten then.
            None gives what calling the modules in turn would give, strides included.
    """
    conv, activation, pool, flatten = block
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested:
        for module in block:
            x = x if module is None else module(x)
        return x
    weight = _parameter(conv, "weight")
    if layout is None:
        if flatten is not None and x.dim() == weight.dim():
            layout, flatten = "features", None
        else:
            layout = eager_layout(x, weight, pool is not None)
    y = functional.conv_block(
        x,
        weight,
        _parameter(conv, "bias"),
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        activation=None if activation is None else "relu",
        pool=pool,
        layout=layout,
    )
    return y if flatten is None else flatten(y)


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """An attribute that is a parameter, as a rule; ten times as fast as ``nn.Module.__getattr__``."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def eager_layout(x: Tensor, weight: Tensor, pooled: bool) -> str:
    """``channels_last`` where PyTorch's convolution and pool would give that, else ``channels_first``."""
    signal, unbatched = weight.dim() == 3, x.dim() == weight.dim() - 1
    if (pooled and (signal or unbatched)) or not (x.is_cpu or x.is_cuda):
        return "channels_first"
    if signal:  # the convolution makes signals contiguous first
        last = _like_channels_last(weight.unsqueeze(2))
    else:
        last = _like_channels_last(x.unsqueeze(0) if unbatched else x) or _like_channels_last(weight)
    return "channels_last" if last else "channels_first"


def _like_channels_last(x: Tensor) -> bool:
    """What PyTorch's ``suggest_memory_format`` answers for a 4-d tensor that is not empty, dense or not."""
    if x.dim() != 4 or x.stride(3) < x.stride(1):  # mostly it ends here
        return False
    size, stride = x.shape, x.stride()
    if stride[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * size[d] if size[d] > 1 else stride[d]
    return True
