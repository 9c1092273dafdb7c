"""``conv_block``: validate, choose a plan, call one op."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnnlstm_fast import backends, reference
from cnnlstm_fast.errors import WrongDtype, WrongShape, WrongValue
from cnnlstm_fast.ops import conv_block as op
from cnnlstm_fast.ops import conv_norm
from cnnlstm_fast.planning import observer, tuner
from cnnlstm_fast.planning.choose import PLANS, Choice, choose
from cnnlstm_fast.planning.support import (
    folds,
    keeps_map,
    needs_gradient,
    norm_tensors,
    of_batch,
    unhooked,
    why_not_by_patches,
    why_not_call,
)
from cnnlstm_fast.spec import ACTIVATIONS, LAYOUTS, BlockSpec, Pool, view_as_layout

__all__ = ["conv_block"]


def conv_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    norm: nn.Module | None = None,
    activation="relu",
    pool: nn.Module | None = None,
    layout: str = "channels_first",
    plan: str = "auto",
) -> Tensor:
    """``layout(pool(activation(norm(conv(x)))))`` in one op.

    Args:
        x: ``(N, C, H, W)`` or ``(C, H, W)`` with a 4-d weight, ``(N, C, L)`` or ``(C, L)`` with a
            3-d one. Any strides.
        weight: ``(C_out, C // groups, KH, KW)`` or ``(C_out, C // groups, K)``.
        bias: ``(C_out,)`` or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d`` / ``conv1d``.
        norm: an ``nn.BatchNorm1d/2d`` (its mode says which statistics), or None.
        activation: a name in ``torch.nn.functional``, an ``nn`` module, or None.
        pool: an ``nn`` pooling module, or None.
        layout: how the result lies in memory, see :func:`cnnlstm_fast.reference.to_layout`.
        plan: ``"auto"`` takes the plan of least predicted time. ``"direct"`` (our own convolution),
            ``"chunked"`` (the library's over as many images as stay in cache, one pass behind it),
            ``"winograd"`` (3x3 kernels, stride 1), ``"fft"`` (large kernels) and ``"reference"`` (PyTorch's
            operators) are run as asked, or refused with the reason.

    Returns:
        The pooled map in the shape of ``layout``, in the dtype that PyTorch would give.

    Raises:
        TypeError: an argument or a dtype is of the wrong type.
        ValueError: shapes do not fit, a name is unknown, or ``plan`` cannot run this call.
        RuntimeError: the same error, where PyTorch raises one (:mod:`cnnlstm_fast.errors`).

    Example:
        >>> x, weight = torch.randn(8, 1, 32, 100), torch.randn(64, 1, 3, 3)
        >>> y = cf.functional.conv_block(x, weight, padding=1, pool=nn.MaxPool2d(2), layout="columns")
        >>> y.shape, y.is_contiguous()  # (N, W, C*H): one step per column of the pooled map
        (torch.Size([8, 50, 1024]), True)
    """
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        raise TypeError(f"x and weight must be tensors, got {type(x).__name__} and {type(weight).__name__}")
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor or None, got {type(bias).__name__}")
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if plan != "auto" and plan not in PLANS:
        raise ValueError(f"unknown plan {plan!r}, expected one of auto, {', '.join(PLANS)}")
    rest = stride, padding, dilation, groups, norm, activation, pool, layout
    remembers = plan == "auto" and observer.current is None and not torch.compiler.is_compiling()
    if remembers and weight.shape in _left_weights:
        if _call_key(x, weight, bias, *rest) in _left_to_pytorch:
            return _reference(x, weight, bias, *rest)
    decision, x, weight, bias = decide(x, weight, bias, *rest, plan)
    watched = observer.current
    if watched is not None:
        known = decision.spec if decision.behind is None else None
        plan, reason = _as_run(decision, x, weight)
        watched.block_begins(known, x, weight, norm, activation, pool, layout, plan, reason)
    if decision.plan == "reference":
        if remembers and decision.choice.by_sizes:
            _leave_to_pytorch(_call_key(x, weight, bias, *rest), weight.shape)
        out = _reference(x, weight, bias, *rest)
    else:
        out = _run(decision, x, weight, bias, norm)
    if watched is not None:
        watched.block_ends(out)
    return out


class Decision(NamedTuple):
    """How a call of :func:`conv_block` runs, and others like it.

    Attributes:
        spec: None where the fused plans have no words for the block.
        choice: by :func:`cnnlstm_fast.planning.choose.choose`.
        inner_layout: of the block.
        behind: a pool that runs as PyTorch's own behind the block, or None.
        layout: of the result.
        grad_signature: by :func:`_grad_signature`.
    """

    spec: BlockSpec | None
    choice: Choice
    inner_layout: str
    behind: nn.Module | None
    layout: str
    grad_signature: tuple

    @property
    def plan(self) -> str:
        return self.choice.forward

    @property
    def reason(self) -> str:
        return self.choice.reason


def decide(
    x, weight, bias, stride, padding, dilation, groups, norm, activation, pool, layout, plan="auto"
) -> tuple[Decision, Tensor, Tensor, Tensor | None]:
    """How :func:`conv_block` runs these arguments; and input, weight and bias as autocast casts them.

    Raises:
        TypeError, ValueError: as ``conv_block``.
    """
    rank = weight.dim()
    groups = _whole(groups, "groups")
    _check_shapes(x, weight, bias, rank, groups)
    if x.device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(x.device.type):
        x, weight, bias = _autocast(x, weight, bias)
    elif x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        raise _different_dtypes(x, weight, bias)
    inside, behind, inner_layout = pool, None, layout  # a pool inside the block, or PyTorch's behind it
    if pool is not None and type(pool) in _OTHER_POOLS[rank]:
        _check_pool(pool, rank)
        inside = _as_max_pool(pool, x, weight, stride, padding, dilation)
        if inside is None:
            behind, inner_layout = pool, "channels_last" if rank == 4 else "channels_first"
    spec, reason = make_spec(
        weight.shape, x.dim() < rank, stride, padding, dilation, groups, norm, activation, inside,
        inner_layout,
    )  # fmt: skip
    choice = Choice("reference", "reference", reason)
    if spec is not None:
        rest = stride, padding, dilation, groups, norm, activation, pool, layout
        block = Decision(spec, choice, inner_layout, behind, layout, ())
        run = partial(_timed_run, block, (x, weight, bias), rest) if tuner.enabled else None
        choice = choose(plan, spec, *_as_2d(x, weight, rank), bias, norm, run)
    elif plan not in ("auto", "reference"):
        raise ValueError(f'plan="{plan}" cannot run here: {reason}. Pass plan="auto"')
    signature = () if spec is None else _grad_signature(x, weight, bias, norm)
    decision = Decision(spec, choice, inner_layout, behind, layout, signature)
    return decision, x, weight, bias


def _timed_run(block: Decision, tensors: tuple, rest: tuple, plan: str) -> None:
    """A block by ``plan``, backward too where a gradient is wanted, as a run that leaves no trace.

    Args:
        block: how other plans than PyTorch's operators run it.
        tensors: input, weight and bias.
        rest: the other arguments of the call.
        plan: its name.
    """
    norm = rest[4]
    leaves: Any = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
    if norm is not None:
        norm = copy.deepcopy(norm)
        rest = (*rest[:4], norm, *rest[5:])
    if plan == "reference":
        out = _reference(*leaves, *rest)
    else:
        x, weight, bias = leaves
        out = _run(block._replace(choice=Choice(plan, plan, "")), x, weight, bias, norm)
    if out.requires_grad:
        out.backward(torch.ones_like(out))


def _as_run(decision: Decision, x: Tensor, weight: Tensor) -> tuple[str, str]:
    """Plan and reason, where the values of these tensors decide too; the ops look at them in every call."""
    if decision.spec is not None:
        values = _as_2d(x, weight, weight.dim())
        if why_not := PLANS[decision.plan].why_not_values(decision.spec, *values):
            return "chunked", why_not
    return decision.plan, decision.reason


def _grad_signature(x: Tensor, weight: Tensor, bias: Tensor | None, norm: nn.Module | None) -> tuple:
    """Which tensors there are, and which of them want a gradient."""
    tensors = (x, weight, bias, *(() if norm is None else norm_tensors(norm)))
    return tuple([t if t is None else t.requires_grad for t in tensors])


def run_again(
    decision: Decision, x: Tensor, weight: Tensor, bias: Tensor | None, norm: nn.Module | None
) -> Tensor | None:
    """The block of an earlier call on other values, without finding out again how to run it.

    Sizes and strides, ``x``'s dtype and device, the norm's mode, the gradient mode and all that is no tensor
    must be as they were. None where something else is not, or where somebody watches: then
    :func:`conv_block` is to be called.
    """
    spec = decision.spec
    if spec is None or decision.plan == "reference" or observer.current is not None:
        return None
    if PLANS[decision.plan].transforms and not backends.allow_transforms:
        return None
    if _grad_signature(x, weight, bias, norm) != decision.grad_signature:
        return None
    if bias is not None and bias.dtype != weight.dtype:
        return None
    if why_not_call(spec, *_as_2d(x, weight, weight.dim()), bias, norm) is not None:
        return None
    return _run(decision, x, weight, bias, norm)


def _run(decision: Decision, x: Tensor, weight: Tensor, bias: Tensor | None, norm) -> Tensor:
    """The result of a block by one of the fused plans."""
    rank, spec = weight.dim(), decision.spec
    assert spec is not None
    run = _fused if norm is None else _fused_with_norm
    forward, backward = op.PLANS[decision.choice.forward], op.PLANS[decision.choice.backward]
    raw = run(spec, *_as_2d(x, weight, rank), bias, norm, forward, backward)
    out = view_as_layout(raw, decision.inner_layout, rank)
    if decision.behind is not None:
        out = reference.to_layout(decision.behind(out), decision.layout)
        if (
            decision.layout == "channels_first" and out.is_contiguous()
        ):  # one position or channel: in any layout
            out = out.flatten().view(out.shape)
    return out.squeeze(reference.batch_dim(decision.layout)) if x.dim() == rank - 1 else out


#: Calls like these (:func:`_call_key`) are PyTorch's by a rule of sizes. Whatever else may be true of a call,
#: PyTorch's operators are right; here they are reached in 3 us, and 20 to 80 are saved.
_left_to_pytorch: set[tuple] = set()
#: The shapes of their weights: most other calls end here.
_left_weights: set[torch.Size] = set()

_NORM_ATTRIBUTES = ("training", "num_features")
_POOL_ATTRIBUTES = ("kernel_size", "stride", "padding", "return_indices")


def _call_key(
    x, weight, bias, stride, padding, dilation, groups, norm, activation, pool, layout
) -> tuple | None:
    """What the rules of sizes and the checks of arguments depend on; None where that cannot be a key."""
    device = x.device.type
    if device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        return None
    key = (
        x.shape, x.dtype, device, x.requires_grad, weight.shape, weight.dtype, weight.requires_grad,
        None if bias is None else (bias.shape, bias.dtype, bias.requires_grad), torch.is_grad_enabled(),
        backends.allow_transforms, tuner.enabled,
        stride, padding, dilation, groups, layout,
        norm if norm is None else (type(norm), *[getattr(norm, name, None) for name in _NORM_ATTRIBUTES]),
        activation if activation is None or isinstance(activation, str) else type(activation),
        pool if pool is None else (
            type(pool), *[getattr(pool, name, None) for name in _POOL_ATTRIBUTES]
        ),
    )  # fmt: skip
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _leave_to_pytorch(call: tuple | None, weight_shape: torch.Size) -> None:
    if call is None:
        return
    if len(_left_to_pytorch) >= 4096:
        _left_to_pytorch.clear()
        _left_weights.clear()
    _left_to_pytorch.add(call)
    _left_weights.add(weight_shape)


def _fused(spec, x, weight, bias, norm, plan: int, backward_plan: int) -> Tensor:
    """The op's raw result (memory order) of a block without a norm; ``norm`` is None."""
    args = (spec.conv_args, ACTIVATIONS[spec.activation], spec.act_args, spec.pool_args, spec.order)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return op.ConvBlockFunction.apply(x, weight, bias, *args, plan, backward_plan)
    return op.caller(op.forward_op, plan)(x, weight, bias, *args, plan, False)[0]


def _fused_with_norm(spec, x, weight, bias, norm, plan: int, backward_plan: int) -> Tensor:
    """The same of a block with a norm, whose running statistics are updated where it is training."""
    gamma, beta, mean, var = tensors = norm_tensors(norm)
    trained = torch.is_grad_enabled() and needs_gradient(weight, bias, gamma, beta)
    by_batch = of_batch(norm)
    if folds(norm):
        folded = conv_norm.fold(weight, bias, tensors, norm.eps, trained)
        return _fused(spec, x, *folded, None, plan, backward_plan)
    # A folded weight has a gradient, which reads the input: PyTorch keeps none for a frozen convolution's.
    frozen = trained and not weight.requires_grad
    by_patches = by_batch and not frozen and plan == op.PLANS["direct"]
    if by_patches and why_not_by_patches(spec, x, weight) is None:
        weight, shift, mean, var = conv_norm.fold_batch(
            x, weight, bias, gamma, beta, norm.eps, spec.conv_args
        )
        raw = _fused(spec, x, weight, shift, None, plan, backward_plan)
    else:
        statistics = (None, None) if by_batch else (mean, var)
        args = (x, weight, bias, gamma, beta, *statistics, norm.eps, spec.conv_args,
                ACTIVATIONS[spec.activation], spec.act_args, spec.pool_args, spec.order, plan)  # fmt: skip
        if trained or (torch.is_grad_enabled() and x.requires_grad):
            raw, stats = conv_norm.ConvNormFunction.apply(*args, keeps_map(weight.shape))
        else:
            raw, *_, stats = conv_norm.forward_op(*args, False, False)
        mean, var = stats[0], stats[1]
    if by_batch:
        height, width = spec.conv_size(x.shape[2:], weight.shape[2:])
        conv_norm.update_running(norm, bias, mean, var, x.shape[0] * height * width)
    return raw


def _reference(x, weight, bias, stride, padding, dilation, groups, norm, activation, pool, layout):
    return reference.conv_block(
        x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups,
        norm=norm, activation=activation, pool=pool, layout=layout,
    )  # fmt: skip


def _as_2d(x: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A batch of maps (N, C, H, W) and a 2-d weight, whatever the rank; views only."""
    if x.dim() == rank - 1:
        x = x.unsqueeze(0)
    return (x, weight) if rank == 4 else (x.unsqueeze(2), weight.unsqueeze(2))


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None):
    """Cast as autocast casts a convolution's arguments (float64 stays)."""
    dtype = torch.get_autocast_dtype(x.device.type)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (x, weight, bias)
    ]


_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def _different_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> WrongDtype:
    names = [str(t.dtype)[6:] for t in (x, weight, bias) if t is not None]
    return WrongDtype(
        f"input, weight and bias must have one dtype, got {', '.join(names)}: convert with .to(dtype)"
    )


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, rank: int, groups: int) -> None:
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
    """A conv or pool parameter as (h, w); for signals h is neutral (``one_d``)."""
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


def _check_pool(pool, rank: int) -> None:
    if not isinstance(pool, nn.Module):
        raise TypeError(f"got pool={pool!r}, expected an nn pooling module or None")
    name = type(pool).__name__
    if rank == 4 and name.endswith("Pool1d"):  # PyTorch takes a 2-d pool on signals, as one image
        raise WrongValue(f"got a {name} for images: use {name[:-2]}2d")
    if getattr(pool, "return_indices", False):
        raise ValueError(f"got a {name} with return_indices=True, expected one that returns the map alone")


#: Pools that run as PyTorch's own behind a block, or as a max pool inside it, by the rank of the input.
_OTHER_POOLS = {
    4: (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    3: (nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
}


def _as_max_pool(pool: nn.Module, x: Tensor, weight: Tensor, stride, padding, dilation) -> nn.Module | None:
    """The max pool that an adaptive one is on a map whose sizes it divides, else None."""
    rank = weight.dim()
    if type(pool) is not (nn.AdaptiveMaxPool2d if rank == 4 else nn.AdaptiveMaxPool1d) or not unhooked(pool):
        return None
    spec, _ = make_spec(weight.shape, False, stride, padding, dilation, 1, None, None, None, "channels_first")
    assert spec is not None  # a convolution alone always has one
    x, weight = _as_2d(x, weight, rank)
    size = spec.conv_size(x.shape[2:], weight.shape[2:])[4 - rank :]
    wanted = (
        pool.output_size if isinstance(pool.output_size, (tuple, list)) else [pool.output_size] * len(size)
    )
    out = [have if want is None else want for have, want in zip(size, wanted, strict=True)]
    if min(*size, *out) < 1 or any(have % want for have, want in zip(size, out, strict=True)):
        return None
    return (nn.MaxPool2d if rank == 4 else nn.MaxPool1d)(
        tuple([have // want for have, want in zip(size, out, strict=True)])
    )


#: The fused activations as modules: the name, and which attributes are its numbers.
_ACTIVATION_MODULES: dict[type, tuple[str | None, tuple[str, ...]]] = {
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
}
#: The fused names of ``torch.nn.functional``, with the numbers that they have by default.
_ACTIVATION_NAMES: dict[str | None, tuple[str | None, tuple[float, ...]]] = {
    None: (None, ()), "relu": ("relu", ()), "hardtanh": ("hardtanh", (-1.0, 1.0)),
    "relu6": ("hardtanh", (0.0, 6.0)), "leaky_relu": ("leaky_relu", (0.01,)), "elu": ("elu", (1.0,)),
    "tanh": ("tanh", ()), "sigmoid": ("sigmoid", ()), "silu": ("silu", ()), "gelu": ("gelu", ()),
}  # fmt: skip


def _fused_activation(activation) -> tuple[str | None, tuple[float, ...]] | str:
    """Name and numbers of an activation as a spec has them, or why it is not fused."""
    if not isinstance(activation, nn.Module):
        found = _ACTIVATION_NAMES.get(activation)
        return f"the activation {activation!r} has no fused kernel" if found is None else found
    module = _ACTIVATION_MODULES.get(type(activation))
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
    """The block's spec and "", or None and why the fused plans have no words for it."""
    rank, weight_channels = len(weight_shape), weight_shape[0]
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise WrongValue(f"got padding={padding!r}, expected an int, ints, 'same' or 'valid'")
        if padding == "same" and any(v != 1 for v in _pair(_hashable(stride), rank, "stride", 1, 1)):
            raise WrongValue(
                f"padding='same' keeps the size, so it goes with stride=1 only, got stride={stride!r}"
            )
    if pool is not None:
        _check_pool(pool, rank)
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
        if unbatched:  # PyTorch refuses a map, and takes a signal for a batch of samples
            return None, "a batch norm takes a batch"
    fused_activation = _fused_activation(activation)
    if isinstance(fused_activation, str):
        return None, fused_activation
    if pool is not None:
        if type(pool) is not (nn.MaxPool2d if rank == 4 else nn.MaxPool1d):
            return None, f"{type(pool).__name__} is not fused"
        if not unhooked(pool):
            return None, "the pool has hooks or a forward of its own"
        pool = (
            _hashable(pool.kernel_size), _hashable(pool.stride), _hashable(pool.padding),
            _hashable(pool.dilation), pool.ceil_mode,
        )  # fmt: skip
    build = _spec.__wrapped__ if torch.compiler.is_compiling() else _spec  # dynamo warns of caches
    return build(
        rank, tuple(weight_shape[2:]), _hashable(stride), _hashable(padding), _hashable(dilation), groups,
        *fused_activation, pool, layout,
    ), ""  # fmt: skip


def _hashable(value):
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def _whole(value, name: str) -> int:
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
