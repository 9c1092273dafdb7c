"""The arguments of ``conv_block``: their checks, and the :class:`BlockSpec` that they describe."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor, nn

from cnnlstm_fast import reference
from cnnlstm_fast.errors import WrongDtype, WrongShape, WrongValue
from cnnlstm_fast.planning.support import unhooked
from cnnlstm_fast.spec import BlockSpec, Pool


def as_2d(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of maps (N, C, H, W) and a 2-d weight, whatever their rank; views only."""
    rank = weight.dim()
    if x.dim() == rank - 1:
        x = x.unsqueeze(0)
    return (x, weight) if rank == 4 else (x.unsqueeze(2), weight.unsqueeze(2))


def different_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> WrongDtype:
    names = [str(t.dtype)[6:] for t in (x, weight, bias) if t is not None]
    return WrongDtype(
        f"input, weight and bias must have one dtype, got {', '.join(names)}: convert with .to(dtype)"
    )


def check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, rank: int, groups: int) -> None:
    if rank not in (3, 4):
        raise WrongShape(
            f"got a weight of shape {tuple(weight.shape)}, expected (C_out, C_in/groups, KH, KW) for "
            "images or (C_out, C_in/groups, K) for signals"
        )
    if 0 in (weight.shape[0], *weight.shape[2:]):
        raise WrongShape(f"got an empty weight of shape {tuple(weight.shape)}, expected sizes of at least 1")
    names = "(N, C, H, W) or (C, H, W)" if rank == 4 else "(N, C, L) or (C, L)"
    if x.dim() not in (rank, rank - 1):
        raise WrongShape(
            f"got an input of shape {tuple(x.shape)} for a weight of shape {tuple(weight.shape)}, "
            f"expected {names}"
            + (": fold the time axis first, or use cf.TimeDistributed" if x.dim() > rank else "")
        )
    if groups < 1 or weight.shape[0] % groups:
        raise WrongValue(
            f"got groups={groups} with {weight.shape[0]} output channels, expected a divisor of them"
        )
    channels = x.shape[1 - rank]
    if channels != weight.shape[1] * groups:
        raise WrongShape(
            f"the input has {channels} channels but the weight of shape {tuple(weight.shape)} with "
            f"groups={groups} expects {weight.shape[1] * groups}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise WrongShape(f"got a bias of shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")


def _pair(value, rank: int, name: str, low: int, one_d: int = 0) -> tuple[int, int]:
    """A parameter of a convolution or pool as (h, w), with h = ``one_d`` for signals."""
    values: tuple[int, ...]
    try:
        values = (
            tuple(operator.index(v) for v in value) if isinstance(value, tuple) else (operator.index(value),)
        )
    except TypeError:
        raise TypeError(f"got {name}={value!r}, expected an int or {rank - 2} ints") from None
    if len(values) == 1:
        values *= rank - 2
    if len(values) != rank - 2:
        raise WrongValue(f"got {name}={value!r}, expected an int or {rank - 2} ints")
    if min(values) < low:
        raise WrongValue(f"got {name}={value!r}, expected values of at least {low}")
    return (values[0], values[1]) if rank == 4 else (one_d, values[0])


def check_pool(pool, rank: int) -> None:
    if not isinstance(pool, nn.Module):
        raise TypeError(f"got pool={pool!r}, expected an nn pooling module or None")
    name = type(pool).__name__
    if rank == 4 and name.endswith("Pool1d"):  # PyTorch takes a 2-d pool on signals, as one image
        raise WrongValue(f"got a {name} for images: use {name[:-2]}2d")
    if getattr(pool, "return_indices", False):
        raise ValueError(f"got a {name} with return_indices=True, expected one that returns the map alone")


#: By rank of the input: pools that run as PyTorch's own behind a block, or for which there is a max pool.
OTHER_POOLS = {
    4: (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    3: (nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
}


def as_max_pool(pool: nn.Module, x: Tensor, weight: Tensor, stride, padding, dilation) -> nn.Module | None:
    """The plain max pool that does the same as an adaptive one here; None where there is none.

    There is one where the pool's output sizes divide the map's.
    """
    rank = weight.dim()
    if type(pool) is not (nn.AdaptiveMaxPool2d if rank == 4 else nn.AdaptiveMaxPool1d) or not unhooked(pool):
        return None
    spec, _ = make_spec(weight.shape, False, stride, padding, dilation, 1, None, None, None, "channels_first")
    assert spec is not None  # a convolution without other parts always has one
    x, weight = as_2d(x, weight)
    size = spec.conv_size(x.shape[2:], weight.shape[2:])[4 - rank :]
    asked = (
        pool.output_size if isinstance(pool.output_size, (tuple, list)) else [pool.output_size] * len(size)
    )
    out = [have if want is None else want for have, want in zip(size, asked, strict=True)]
    if min(*size, *out) < 1 or any(have % want for have, want in zip(size, out, strict=True)):
        return None
    return (nn.MaxPool2d if rank == 4 else nn.MaxPool1d)(
        tuple([have // want for have, want in zip(size, out, strict=True)])
    )


#: Modules of fused activations: the activation's name, and the attributes that are its numbers.
ACTIVATION_MODULES: dict[type, tuple[str | None, tuple[str, ...]]] = {
    nn.Identity: (None, ()),
    nn.ReLU: ("relu", ()),
    nn.Hardtanh: ("hardtanh", ("min_val", "max_val")),
    nn.ReLU6: ("hardtanh", ("min_val", "max_val")),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.ELU: ("elu", ("alpha",)),
    nn.Tanh: ("tanh", ()),
    nn.Sigmoid: ("sigmoid", ()),
    nn.SiLU: ("silu", ()),
    nn.GELU: ("gelu", ()),
    nn.Softplus: ("softplus", ("beta", "threshold")),
    nn.Mish: ("mish", ()),
    nn.Hardswish: ("hardswish", ()),
    nn.Hardsigmoid: ("hardsigmoid", ()),
}
#: Names in ``torch.nn.functional`` of fused activations: the activation's name, and its default numbers.
_ACTIVATION_NAMES: dict[str | None, tuple[str | None, tuple[float, ...]]] = {
    None: (None, ()), "relu": ("relu", ()), "hardtanh": ("hardtanh", (-1.0, 1.0)),
    "relu6": ("hardtanh", (0.0, 6.0)), "leaky_relu": ("leaky_relu", (0.01,)), "elu": ("elu", (1.0,)),
    "tanh": ("tanh", ()), "sigmoid": ("sigmoid", ()), "silu": ("silu", ()), "gelu": ("gelu", ()),
    "softplus": ("softplus", (1.0, 20.0)), "mish": ("mish", ()), "hardswish": ("hardswish", ()),
    "hardsigmoid": ("hardsigmoid", ()),
}  # fmt: skip


def fused_activation(activation) -> tuple[str | None, tuple[float, ...]] | str:
    """Name and numbers of an activation, as :class:`BlockSpec` has them; or why it is not fused."""
    if not isinstance(activation, nn.Module):
        found = _ACTIVATION_NAMES.get(activation)
        return f"the activation {activation!r} has no fused kernel" if found is None else found
    module = ACTIVATION_MODULES.get(type(activation))
    if module is None:
        return f"{type(activation).__name__} is not fused"
    if not unhooked(activation):
        return "the activation has hooks or a forward of its own"
    name, attributes = module
    if name == "gelu" and activation.approximate == "tanh":
        return "gelu_tanh", ()
    numbers = tuple([getattr(activation, attribute) for attribute in attributes])
    if not all(type(number) in (int, float) for number in numbers):
        return f"{type(activation).__name__} has numbers of another type"
    if name == "hardtanh" and not numbers[0] <= numbers[1]:
        return "Hardtanh's least value is larger than its most"
    return name, numbers


def make_spec(
    weight_shape, unbatched, stride, padding, dilation, groups, norm, activation, pool, layout
) -> tuple[BlockSpec | None, str]:
    """The block's spec and "", or None and why no fused plan computes such a block."""
    rank, weight_channels = len(weight_shape), weight_shape[0]
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise WrongValue(f"got padding={padding!r}, expected an int, ints, 'same' or 'valid'")
        if padding == "same" and any(v != 1 for v in _pair(_hashable(stride), rank, "stride", 1, 1)):
            raise WrongValue(
                f"padding='same' keeps the size, so it goes with stride=1 only, got stride={stride!r}"
            )
    if pool is not None:
        check_pool(pool, rank)
    if norm is not None:
        if not isinstance(norm, nn.Module):
            raise TypeError(f"got norm={norm!r}, expected an nn.BatchNorm1d/2d module or None")
        channels = getattr(norm, "num_features", weight_channels)
        if channels != weight_channels:
            raise WrongShape(f"got a norm of {channels} channels, the convolution gives {weight_channels}")
    if activation is not None and not isinstance(activation, (str, nn.Module)):
        raise TypeError(f"got activation={activation!r}, expected a name, an nn module or None")
    if isinstance(activation, str) and activation not in reference.ACTIVATION_NAMES:
        raise ValueError(
            f"unknown activation {activation!r}, expected one of torch.nn.functional: "
            f"{', '.join(sorted(reference.ACTIVATION_NAMES))}"
        )
    if norm is not None:
        if type(norm) is not (nn.BatchNorm2d if rank == 4 else nn.BatchNorm1d):
            return None, f"{type(norm).__name__} is not fused"
        if not unhooked(norm):
            return None, "the norm has hooks or a forward of its own"
        if unbatched:  # PyTorch's norm raises for (C, H, W), and takes (C, L) for C samples
            return None, "a batch norm takes a batch"
    found = fused_activation(activation)
    if isinstance(found, str):
        return None, found
    if pool is not None:
        if type(pool) is not (nn.MaxPool2d if rank == 4 else nn.MaxPool1d):
            return None, f"{type(pool).__name__} is not fused"
        if not unhooked(pool):
            return None, "the pool has hooks or a forward of its own"
        pool = (
            _hashable(pool.kernel_size), _hashable(pool.stride), _hashable(pool.padding),
            _hashable(pool.dilation), pool.ceil_mode,
        )  # fmt: skip
    build = _spec.__wrapped__ if torch.compiler.is_compiling() else _spec  # dynamo warns about lru_cache
    return build(
        rank, tuple(weight_shape[2:]), _hashable(stride), _hashable(padding), _hashable(dilation), groups,
        *found, pool, layout,
    ), ""  # fmt: skip


def _hashable(value):
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def whole_number(value, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"got {name}={value!r}, expected an int") from None


@lru_cache(maxsize=4096)
def _spec(
    rank, kernel, stride, padding, dilation, groups, activation, activation_args, pool, layout
) -> BlockSpec:
    dilation, after = _pair(dilation, rank, "dilation", 1, 1), (0, 0)
    if padding == "same":
        kernel = kernel if rank == 4 else (1, *kernel)
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple([t // 2 for t in total])
        after = tuple([t % 2 for t in total])
    elif padding == "valid":
        padding = (0, 0)
    else:
        padding = _pair(padding, rank, "padding", 0, 0)
    max_pool = None
    if pool is not None:
        pool_kernel, pool_stride, pool_padding, pool_dilation, ceil_mode = pool
        max_pool = Pool(
            _pair(pool_kernel, rank, "kernel_size", 1, 1),
            _pair(pool_kernel if pool_stride is None else pool_stride, rank, "stride", 1, 1),
            _pair(pool_padding, rank, "padding", 0, 0),
            _pair(pool_dilation, rank, "dilation", 1, 1),
            ceil_mode,
        )
        for pad, k in zip(max_pool.padding, max_pool.kernel, strict=True):
            if pad > k // 2:
                raise WrongValue(
                    f"got a pool padding of {pad} for a kernel of {k}, expected at most half of it"
                )
    return BlockSpec(
        _pair(stride, rank, "stride", 1, 1),
        padding,
        dilation,
        groups,
        activation,
        max_pool,
        layout,
        activation_args,
        after,
    )
