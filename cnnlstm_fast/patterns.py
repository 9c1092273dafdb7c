"""What counts as a block, in a list of modules or in calls of functions: one matcher for all who look.

A chain of modules (``cf.Sequential``), of graph nodes (the compile backend) or of calls that really
happened (``cf.accelerate``) is described as parts; :func:`spans` finds the blocks among them. What a
part may be and what may follow it stands in the tables below.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnlstm_fast import functional
from cnnlstm_fast.functional import unhooked
from cnnlstm_fast.planning import observer

__all__ = [
    "ANYTHING", "CONVS", "NOTHING", "WRITES", "Block", "Conv", "Found", "Norm", "Part", "as_block", "decide",
    "eager_layout", "effect", "follow", "is_container", "may_stand_between", "members", "per_sample",
    "read_call", "reads_channels_last", "run", "run_block", "run_chain", "spans", "steps",
]  # fmt: skip


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
    flatten: Any = None  # an nn.Flatten, or a module with a ``layout`` and what is left to ``finish``


def part_of(module: nn.Module) -> Part | str:
    """The part a module can play in a block, or why it can play none."""
    part = PARTS.get(type(module))
    if part is None:
        return "is not fused"
    if not unhooked(module):
        return "has hooks or a forward of its own"
    kind = part.kind
    if kind == "monotone":
        return part if _rises(module) else Part("activation")
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


def _rises(activation: nn.Module) -> bool:
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
    if torch.jit.is_tracing() or functional.global_hooks():
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


def run(block: Block, x: Any, layout: str | None = None) -> Tensor:
    """Run a block.

    Args:
        x: ``(N, C, H, W)``, ``(C, H, W)``, ``(N, C, L)`` or ``(C, L)``, as the convolution takes it.
        layout: a name of :data:`cnnlstm_fast.spec.LAYOUTS`; the block must have no flatten then.
            None gives what calling the modules in turn would give, strides included.
    """
    conv, norm, activation, pool, flatten = block
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested:
        for module in block:
            x = x if module is None else module(x)
        return x
    weight = _parameter(conv, "weight")
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    if layout is None and flatten is not None and x.dim() == weight.dim():
        plain = type(flatten) is nn.Flatten
        layout, finish = ("features", None) if plain else (flatten.layout, flatten.finish)
        flatten = None
    else:
        finish = None
    arguments = Conv(weight, _parameter(conv, "bias"), conv.stride, padding, conv.dilation, conv.groups)
    y = run_block(x, arguments, norm, activation, pool, layout)
    if finish is not None:
        y = finish(y)
    return y if flatten is None else flatten(y)


#: Taps of a kernel up to which the library's channels-last convolution is the faster one.
_CHANNELS_LAST_TAPS = 25


def run_chain(chain: Sequence[Block | nn.Module], x: Any) -> Any:
    """Run the steps of a chain; between blocks maps lie as is best for the next one.

    Result and strides are those of calling the modules in turn. Measured: channels-last maps between
    blocks save 5 to 20 % of CRNN's and video CNNs' inference, nothing in training, and cost 12 % before
    kernels as large as those of speech models.
    """
    eager = None  # the layout that PyTorch's x would have, where ours has another
    for i, step in enumerate(chain):
        if not isinstance(step, Block):
            x = step(x)
            continue
        layout = None
        if eager is not None and step.flatten is None:
            weight = _parameter(step.conv, "weight")
            last = eager == "channels_last" or _like_channels_last(weight)
            layout = _layout_behind(last, weight, step.norm, step.activation)
        eager = None
        if i + 1 < len(chain) and _hands_on(step, chain[i + 1], x):
            weight = _parameter(step.conv, "weight")
            eager = layout or eager_layout(x, weight, step.pool is not None, step.norm, step.activation)
            layout = "channels_last"
        x = run(step, x, layout)
    return x


def _hands_on(step: Block, following: Block | nn.Module, x: Any) -> bool:
    """Whether a block should write channels-last maps for the block behind it."""
    return (
        isinstance(following, Block)
        and step.flatten is None
        and type(step.conv) is type(following.conv) is nn.Conv2d
        and following.conv.padding_mode == "zeros"
        and math.prod(following.conv.kernel_size) <= _CHANNELS_LAST_TAPS
        and not torch.is_grad_enabled()
        and isinstance(x, Tensor)
        and x.dim() == 4
        and x.is_cpu
    )


def run_block(
    x: Tensor,
    conv: Conv,
    norm: nn.Module | None = None,
    activation: Any = None,
    pool: nn.Module | None = None,
    layout: str | None = None,
    decision: functional.Decision | None = None,
) -> Tensor:
    """:func:`cnnlstm_fast.functional.conv_block`, in PyTorch's own layout unless one is named.

    ``decision`` is what :func:`decide` said of an earlier call like this one.
    """
    if decision is not None:
        result = functional.run_again(decision, x, conv.weight, conv.bias, norm)
        if result is not None:
            return result
    if layout is None:
        layout = eager_layout(x, conv.weight, pool is not None, norm, activation)
    return functional.conv_block(
        x, conv.weight, conv.bias, stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
        groups=conv.groups, norm=norm, activation=activation, pool=pool, layout=layout,
    )  # fmt: skip


def decide(
    x: Tensor, conv: Conv, norm: nn.Module | None, activation: Any, pool: nn.Module | None, layout: str
) -> functional.Decision:
    """How :func:`run_block` would run these arguments; nothing is computed."""
    return functional.decide(x, *conv, norm, activation, pool, layout)[0]


def _parameter(module: nn.Module, name: str) -> Any:
    """An attribute that is a parameter, as a rule; ten times as fast as ``nn.Module.__getattr__``."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def eager_layout(
    x: Tensor, weight: Tensor, pooled: bool, norm: nn.Module | None, activation: nn.Module | None
) -> str:
    """``channels_last`` where PyTorch's operators would give that, else ``channels_first``."""
    signal, unbatched = weight.dim() == 3, x.dim() == weight.dim() - 1
    if (pooled and (signal or unbatched)) or not (x.is_cpu or x.is_cuda):
        return "channels_first"
    if signal:  # the convolution makes signals contiguous first
        last = _like_channels_last(weight.unsqueeze(2))
    else:
        last = _like_channels_last(x.unsqueeze(0) if unbatched else x) or _like_channels_last(weight)
    return _layout_behind(last, weight, norm, activation)


#: Activations whose result lies as their argument does even where that may count for contiguous.
_KEEP_STRIDES = (nn.Identity, nn.Hardtanh)


def _layout_behind(last: bool, weight: Tensor, norm: nn.Module | None, activation: nn.Module | None) -> str:
    """The layout behind norm and activation: of a single channel they make a contiguous map."""
    if not last:
        return "channels_first"
    if weight.shape[0] > 1:
        return "channels_last"
    kept = (
        activation is None or isinstance(activation, _KEEP_STRIDES) or getattr(activation, "inplace", False)
    )
    return "channels_last" if norm is None and kept else "channels_first"


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


# ---------------------------------------------------------------- calls of functions


class Norm(NamedTuple):
    """The arguments of ``F.batch_norm`` behind its input."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    @property
    def read(self) -> tuple[Tensor | None, ...]:
        """The tensors that its result depends on, besides the input."""
        return self[2:4] if self.training else self[:4]

    def uncounted(self) -> Norm:
        """The same without running statistics, which batch statistics then are not added to."""
        return self._replace(running_mean=None, running_var=None)

    @property
    def effect(self) -> int:
        """Of the call: batch statistics are counted in the running ones."""
        return WRITES if self.training and self.running_mean is not None else NOTHING

    def module(self, channels: int, rank: int) -> nn.Module:
        """An ``nn.BatchNorm1d/2d`` over the very same tensors; cheap enough to be made on every call."""
        cls, state = _NORMS[rank]
        module = cls.__new__(cls)
        module.__dict__.update(
            state,
            _parameters={"weight": self.weight, "bias": self.bias},
            _buffers={
                "running_mean": self.running_mean, "running_var": self.running_var,
                "num_batches_tracked": None,  # who called batch_norm has counted
            },
            num_features=channels, training=self.training, momentum=self.momentum, eps=self.eps,
            affine=self.weight is not None, track_running_stats=self.running_mean is not None,
        )  # fmt: skip
        return module


_NORMS = {
    4: (nn.BatchNorm2d, nn.BatchNorm2d(1, device="meta").__dict__),
    3: (nn.BatchNorm1d, nn.BatchNorm1d(1, device="meta").__dict__),
}


class Conv(NamedTuple):
    """The arguments of ``F.conv1d`` or ``F.conv2d`` behind its input."""

    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


#: Convolutions that a block can begin with, and the dimensions of their input.
CONVS: dict[Callable, int] = {torch.conv2d: 4, torch.conv1d: 3}


def reads_channels_last(function: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call is a convolution that channels-last maps are to be handed to.

    Grouped ones are slower on them. Of a strided pointwise one with less than a vector of channels oneDNN
    writes the weight's gradient beyond its memory.
    """
    if function is not torch.conv2d:
        return False
    given = dict(zip(Conv._fields, args[1:], strict=False)) | kwargs
    _, channels, *kernel = (*getattr(given.get("weight"), "shape", ()), 0, 0)[:4]
    strided = given.get("stride", 1) not in (1, (1, 1), [1, 1])
    return given.get("groups", 1) == 1 and not (strided and channels < 16 and kernel == [1, 1])


class Found(NamedTuple):
    """A call of a function as a part of a block.

    ``value`` is a module for an activation or a pool and a :class:`Norm` for a norm; ``inplace`` says
    whether the call overwrites its input.
    """

    part: Part
    value: Any = None
    inplace: bool = False


class _Call(NamedTuple):
    kind: str
    rank: int | None
    defaults: dict[str, Any]  # of the parameters behind the input, in order
    make: Callable[..., nn.Module]


_INDICES = {"return_indices": False}
_MAX = {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, **_INDICES}
_AVG = {"kernel_size": None, "stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True}
_SIZE = {"output_size": None}
_DROP = {"p": 0.5, "training": True, "inplace": False}
_nn: Any = torch._C._nn  # what is known of its functions is not all

_CALLS: dict[Callable, _Call] = {}
for _kind, _rank, _defaults, _make, _functions in (
    ("monotone", None, {}, nn.ReLU, (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)),
    (
        "monotone", None, {"negative_slope": 0.01}, nn.LeakyReLU,
        (F.leaky_relu, _nn.leaky_relu, _nn.leaky_relu_),
    ),
    ("monotone", None, {"alpha": 1.0}, nn.ELU, (F.elu, _nn.elu, _nn.elu_)),
    (
        "monotone", None, {"min_val": -1.0, "max_val": 1.0}, nn.Hardtanh,
        (F.hardtanh, _nn.hardtanh, _nn.hardtanh_),
    ),
    ("monotone", None, {}, nn.ReLU6, (F.relu6, _nn.relu6, _nn.relu6_)),
    ("monotone", None, {}, nn.Tanh, (F.tanh, torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_)),
    (
        "monotone", None, {}, nn.Sigmoid,
        (F.sigmoid, torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_),
    ),
    ("activation", None, {}, nn.SiLU, (F.silu, _nn.silu, _nn.silu_)),
    ("activation", None, {"approximate": "none"}, nn.GELU, (_nn.gelu, _nn.gelu_)),
    ("max_pool", 4, _MAX, nn.MaxPool2d, (F.max_pool2d, torch.max_pool2d)),
    ("max_pool", 3, _MAX, nn.MaxPool1d, (F.max_pool1d, torch.max_pool1d)),
    ("max_pool", 4, {**_SIZE, **_INDICES}, nn.AdaptiveMaxPool2d, (F.adaptive_max_pool2d,)),
    ("max_pool", 3, {**_SIZE, **_INDICES}, nn.AdaptiveMaxPool1d, (F.adaptive_max_pool1d,)),
    ("pool", 4, {**_AVG, "divisor_override": None}, nn.AvgPool2d, (_nn.avg_pool2d,)),
    ("pool", 3, _AVG, nn.AvgPool1d, (torch.avg_pool1d,)),
    ("pool", 4, _SIZE, nn.AdaptiveAvgPool2d, (F.adaptive_avg_pool2d, _nn.adaptive_avg_pool2d)),
    ("pool", 3, _SIZE, nn.AdaptiveAvgPool1d, (torch.adaptive_avg_pool1d,)),
    ("identity", None, _DROP, nn.Dropout, (F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout)),
):  # fmt: skip
    for _function in _functions:
        _CALLS[_function] = _Call(_kind, _rank, _defaults, _make)
# Those that some versions lack.
for _name, _like in (("hardtanh_", F.hardtanh), ("silu_", F.silu), ("elu_", F.elu), ("relu6", F.relu6)):
    if hasattr(_nn, _name):
        _CALLS.setdefault(getattr(_nn, _name), _CALLS[_like])


def read_call(function: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Found | None:
    """What a call can be in a block behind its convolution, or None; ``args[0]`` is the input.

    Tensors may be anything (a graph's nodes); all other arguments must be plain values.
    """
    if function is F.batch_norm:
        norm = _bound(Norm._field_defaults, ("running_mean", "running_var"), args, kwargs)
        if norm is None or not all(
            isinstance(norm[name], (bool, int, float)) for name in ("training", "momentum", "eps")
        ):
            return None
        return Found(Part("norm"), Norm(**norm))
    try:
        call = _CALLS.get(function)
    except TypeError:  # not hashable
        return None
    if call is None:
        return None
    inplace = {} if "inplace" in call.defaults else {"inplace": False}
    values = _bound({**call.defaults, **inplace}, (), args, kwargs)
    if values is None or not all(map(_is_plain_value, values.values())):
        return None
    overwrites = values.pop("inplace") or getattr(function, "__name__", "").endswith("_")
    if call.kind == "identity":
        dropping = values["training"] and values["p"] > 0
        return None if dropping else Found(Part("identity"))
    if values.get("return_indices"):
        return None
    if values.get("stride") in ((), []):
        values["stride"] = None
    module = call.make(**values)
    kind = call.kind
    if kind == "monotone" and not _rises(module):
        kind = "activation"
    return Found(Part(kind, call.rank), module, bool(overwrites))


def _bound(defaults: dict, first: tuple, args: Sequence, kwargs: dict) -> dict[str, Any] | None:
    """The arguments behind the input by name, or None where they do not fit."""
    names = [*first, *(name for name in defaults if name not in first)]
    if len(args) - 1 > len(names) or not kwargs.keys() <= set(names):
        return None
    values = {**defaults, **dict(zip(names, args[1:], strict=False)), **kwargs}
    return values if len(values) == len(names) else None


def _is_plain_value(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain_value, value))
    return value is None or type(value) in (bool, int, float, str)


# ---------------------------------------------------------------- what may stand between the calls of a block

#: What a call may do besides giving a result: nothing; write to memory that was there before; or anything,
#: as change the modes (of gradients, of autocast, of inference) that later calls run in.
NOTHING, WRITES, ANYTHING = range(3)


def may_stand_between(between: Iterable[int], norm_to_come: bool) -> bool:
    """Whether a block may be one call although calls with these effects stand between its members.

    A block runs where its operands are read. Activation and pool have one operand, the value before
    them, which nobody else holds: they may run earlier, at the convolution or its norm, whatever is
    written meanwhile. A norm reads and counts statistics, so it stays where it stands, and its
    convolution runs later, at the norm: nothing may be written between these two. Past a call that may
    do anything nothing is moved.

    Args:
        between: the effects.
        norm_to_come: whether the calls stand between a convolution and its norm.
    """
    return max(between, default=NOTHING) <= (NOTHING if norm_to_come else WRITES)


#: Functions of the module ``operator`` that write to none of their arguments.
_PURE_OPERATORS = set(
    "abs add and_ eq floordiv ge getitem gt invert le lt matmul mod mul ne neg not_ or_ pos pow sub truediv "
    "xor".split()
)


def effect(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """What a call may do besides giving a result: :data:`NOTHING`, :data:`WRITES` or :data:`ANYTHING`.

    PyTorch's own operators, as functions or as methods of ``Tensor``, do what their schemas say; what is
    not known may do anything.
    """
    found = read_call(function, args, kwargs)
    if found is not None:
        if isinstance(found.value, Norm):
            return found.value.effect
        return WRITES if found.inplace else NOTHING
    name, module = getattr(function, "__name__", None), getattr(function, "__module__", None)
    if module == "_operator":
        return NOTHING if name in _PURE_OPERATORS else WRITES
    if module == F.__name__ and getattr(F, str(name), None) is function:
        return WRITES  # in Python, and in place where it is asked to be
    if isinstance(function, torch._ops.OpOverload):
        own = function.namespace == "aten"
        written = _written_arguments(function.overloadpacket.__name__) if own else None
    else:
        own = module in ("torch", "torch._C._nn") or getattr(Tensor, str(name), None) is function
        native = isinstance(function, (types.BuiltinFunctionType, types.MethodDescriptorType))
        written = _written_arguments(str(name)) if own and native else None
    if written is None:
        return ANYTHING
    return WRITES if written & {"", *kwargs} else NOTHING


@functools.cache
def _written_arguments(name: str) -> frozenset[str] | None:
    """The arguments that ``aten::name`` writes to, those that need no keyword as ""; None if it is unknown.

    The schemas of old norms do not say that running statistics are written to. What returns nothing is
    there for another effect.
    """
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return None
    written = set()
    for overload in packet.overloads():
        schema = getattr(packet, overload)._schema
        if not schema.returns:
            return None
        for argument in schema.arguments:
            stated = argument.alias_info is not None and argument.alias_info.is_write
            if stated or argument.name.startswith("running_"):
                written.add(argument.name if argument.kwarg_only else "")
    return frozenset(written)
