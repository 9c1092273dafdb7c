"""Calls of PyTorch's functions: the parts of a block that they are, and their side effects."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnlstm_fast.fusion.match import Part, rises


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
    def read(self) -> list[Tensor]:
        """The tensors that its result depends on, beside the input."""
        return [t for t in (self[2:4] if self.training else self[:4]) if t is not None]

    def uncounted(self) -> Norm:
        """The same call without running statistics, so that it updates none."""
        return self._replace(running_mean=None, running_var=None)

    @property
    def effect(self) -> int:
        """Its side effect: it updates running statistics, or there is none."""
        return WRITES if self.training and self.running_mean is not None else NOTHING

    def module(self, channels: int, rank: int) -> nn.Module:
        """An ``nn.BatchNorm1d/2d`` over the same tensor objects; making one costs two microseconds."""
        cls, state = _NORMS[rank]
        module = cls.__new__(cls)
        module.__dict__.update(
            state,
            _parameters={"weight": self.weight, "bias": self.bias},
            _buffers={
                "running_mean": self.running_mean, "running_var": self.running_var,
                "num_batches_tracked": None,  # the caller of F.batch_norm counts batches
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


class Found(NamedTuple):
    """A call of a function as a part of a block.

    Attributes:
        part: what it is.
        value: a module that does the same for an activation or a pool, a :class:`Norm` for a norm.
        inplace: the call overwrites its input.
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
_nn: Any = torch._C._nn  # its type stubs lack some functions

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
    ("activation", None, {"beta": 1.0, "threshold": 20.0}, nn.Softplus, (F.softplus,)),
    ("activation", None, {}, nn.Mish, (F.mish, _nn.mish, _nn.mish_)),
    ("activation", None, {}, nn.Hardswish, (F.hardswish, _nn.hardswish, _nn.hardswish_)),
    ("monotone", None, {}, nn.Hardsigmoid, (F.hardsigmoid, _nn.hardsigmoid, _nn.hardsigmoid_)),
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
    if kind == "monotone" and not rises(module):
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


class Added(NamedTuple):
    """A sum of the value at hand and another tensor.

    Attributes:
        first: the value is the first operand.
        alpha: what the other tensor is multiplied by.
    """

    first: bool
    alpha: float


def is_sum(function: Callable) -> bool:
    """Whether a function adds two tensors."""
    return function is torch.add or function is Tensor.add or function is Tensor.add_


def read_sum(function: Callable, value: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Found | None:
    """What a call that adds another tensor to ``value`` can be behind a convolution, or None.

    The other tensor has the shape, the dtype and the device of ``value``.
    """
    if not is_sum(function) or len(args) != 2 or kwargs.keys() - {"alpha"}:
        return None
    first, inplace = args[0] is value, function is Tensor.add_
    other, alpha = args[1 if first else 0], kwargs.get("alpha", 1)
    if not isinstance(other, Tensor) or other is value or type(alpha) not in (int, float):
        return None
    if not first and (inplace or alpha != 1):
        return None
    if other.shape != value.shape or other.dtype != value.dtype or other.device != value.device:
        return None
    return Found(Part("sum"), Added(first, alpha), inplace)


# ---------------------------------------------------------------- what may stand between the calls of a block

#: Side effects of a call: none; it writes to memory that existed before; or it may do anything, as change the
#: modes of gradients, autocast or inference.
NOTHING, WRITES, ANYTHING = range(3)


def may_stand_between(between: Iterable[int], norm_to_come: bool) -> bool:
    """Whether a block may be one call although calls with these effects stand between its members.

    The block's call stands where the norm stood, or where the convolution stood if there is no norm.

    - An activation or a pool moves up to it. It reads only the value before it, which nothing else holds, so
      writes between them change nothing.
    - A norm stays where it is, because it reads and updates statistics.
    - A convolution with a norm moves down to it. A write between the two could change what the convolution
      reads, so there must be none.
    - No call moves past one that may do anything.

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
    """The side effect of a call: :data:`NOTHING`, :data:`WRITES` or :data:`ANYTHING`.

    PyTorch's own operators, as functions or as methods of ``Tensor``, have the effects of their schemas. An
    unknown function may do anything.
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
        return WRITES  # a Python function, which may take inplace=True
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
    """Names of the arguments that ``aten::name`` writes to; None where that is unknown.

    Only keyword arguments have their names, the others are all "". Schemas of norms do not declare that
    running statistics are written, so any argument of such a name counts. An operator that returns nothing
    has an unknown effect.
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
