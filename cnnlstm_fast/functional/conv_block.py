"""``conv_block``: validate, choose a plan, call one op."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnnlstm_fast import backends, reference
from cnnlstm_fast.functional.arguments import (
    ACTIVATION_MODULES,
    OTHER_POOLS,
    as_2d,
    as_max_pool,
    check_pool,
    check_shapes,
    different_dtypes,
    make_spec,
    whole_number,
)
from cnnlstm_fast.ops import conv_block as op
from cnnlstm_fast.ops import conv_norm
from cnnlstm_fast.planning import capturing, observer, tuner
from cnnlstm_fast.planning.choose import GAIN_PERCENT, PLANS, Choice, choose, library_uses_tf32
from cnnlstm_fast.planning.support import (
    folds,
    global_hooks,
    is_plain_call,
    keeps_map,
    needs_gradient,
    norm_tensors,
    of_batch,
    own_hooks,
    records_gradients,
    why_not_by_patches,
)
from cnnlstm_fast.spec import ACTIVATIONS, LAYOUTS, BlockSpec, view_as_layout

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
    block = stride, padding, dilation, groups, norm, activation, pool, layout
    key = None
    watched = observer.current
    compiling = torch.compiler.is_compiling()
    if compiling and plan == "auto" and capturing.active():
        return _reference(x, weight, bias, *block)
    if plan == "auto" and watched is None and not compiling:
        key, known = _look_up(x, weight, bias, *block)
        if known is not None:
            if known.plan == "reference":  # PyTorch's operators are right whatever the modes and hooks
                return _reference(x, weight, bias, *block)
            if is_plain_call(x, weight) and not _hooked(norm, activation, pool):
                if torch._C._is_any_autocast_enabled():
                    x, weight, bias = as_autocast_casts(x, weight, bias)
                return known.run(x, weight, bias, norm, pool)
    x, weight, bias = as_autocast_casts(x, weight, bias)
    call = plan_under_autocast(x, weight, bias, *block, plan)
    if key is not None and _holds_for_all(key, call):
        if len(_known_calls) >= _MOST_KNOWN:
            _known_calls.clear()
        _known_calls[key] = call
    if watched is not None:
        spec = None if call.pool_behind else call.spec
        watched.block_begins(spec, x, weight, norm, activation, pool, layout, *call.as_run(x, weight))
    if call.plan == "reference":
        out = _reference(x, weight, bias, *block)
    else:
        out = call.run(x, weight, bias, norm, pool)
    if watched is not None:
        watched.block_ends(out)
    return out


class CallPlan(NamedTuple):
    """How calls of :func:`conv_block` with the same sizes, dtypes and modes run.

    Attributes:
        spec: the block, without a pool that runs behind it; None where no fused plan computes such a block.
        choice: the plans and the reason.
        inner_layout: of the fused block's result.
        pool_behind: PyTorch's own pool runs behind the fused block.
        layout: of the call's result.
        rounds_to: the dtype of autocast, where a block is computed in float32 and its result rounded.
    """

    spec: BlockSpec | None
    choice: Choice
    inner_layout: str
    pool_behind: bool
    layout: str
    rounds_to: torch.dtype | None = None

    @property
    def plan(self) -> str:
        return self.choice.forward

    @property
    def reason(self) -> str:
        return self.choice.reason

    def as_run(self, x: Tensor, weight: Tensor) -> tuple[str, str]:
        """Plan and reason for the values of these tensors, which the ops look at in each call."""
        if self.spec is not None:
            values = as_2d(x, weight)
            if why_not := PLANS[self.plan].why_not_values(self.spec, *values):
                return "chunked", why_not
        return self.plan, self.reason

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, norm, pool) -> Tensor:
        """The block's result by the fused plan that was chosen."""
        spec, choice, inner_layout, pool_behind, layout, rounds_to = self
        assert spec is not None
        run = _fused if norm is None else _fused_with_norm
        if rounds_to is not None:  # gradients are rounded on their way back, as PyTorch's are
            x, weight, bias = x.float(), weight.float(), bias if bias is None else bias.float()
        rank, unbatched = weight.dim(), x.dim() < weight.dim()
        forward, backward = op.PLANS[choice.forward], op.PLANS[choice.backward]
        out = run(spec, *as_2d(x, weight), bias, norm, forward, backward)
        if rounds_to is not None:
            out = out.to(rounds_to)
        if rank == 3 or inner_layout != "channels_first":
            out = view_as_layout(out, inner_layout, rank)
        if pool_behind:
            out = reference.to_layout(pool(out), layout)
            if (
                layout == "channels_first" and out.is_contiguous()
            ):  # a map of one position or channel: PyTorch's strides
                out = out.flatten().view(out.shape)
        return out.squeeze(reference.batch_dim(layout)) if unbatched else out


def plan_call(
    x, weight, bias, stride, padding, dilation, groups, norm, activation, pool, layout, plan="auto"
) -> CallPlan:
    """The plan of a call of :func:`conv_block`; nothing is computed.

    Args:
        x, weight, bias: cast as autocast casts them (:func:`as_autocast_casts`).

    Raises:
        TypeError, ValueError: as ``conv_block``.
    """
    rank = weight.dim()
    groups = whole_number(groups, "groups")
    check_shapes(x, weight, bias, rank, groups)
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        raise different_dtypes(x, weight, bias)
    inside, pool_behind, inner_layout = pool, False, layout
    if pool is not None and type(pool) in OTHER_POOLS[rank]:
        check_pool(pool, rank)
        inside = as_max_pool(pool, x, weight, stride, padding, dilation)
        if inside is None:
            pool_behind, inner_layout = True, "channels_last" if rank == 4 else "channels_first"
    spec, reason = make_spec(
        weight.shape, x.dim() < rank, stride, padding, dilation, groups, norm, activation, inside,
        inner_layout,
    )  # fmt: skip
    call = CallPlan(spec, Choice("reference", "reference", reason), inner_layout, pool_behind, layout)
    if spec is not None:
        block = stride, padding, dilation, groups, norm, activation, pool, layout
        run = partial(_timed_run, call, (x, weight, bias), block) if tuner.enabled else None
        call = call._replace(choice=choose(plan, spec, *as_2d(x, weight), bias, norm, run))
    elif plan not in ("auto", "reference"):
        raise ValueError(f'plan="{plan}" cannot run here: {reason}. Pass plan="auto"')
    return call


def plan_under_autocast(x, weight, bias, *block) -> CallPlan:
    """As :func:`plan_call`. Under autocast the plan may be to compute in float32 what bfloat16 tensors hold.

    Some plans exist in float32 alone.
    """
    call = plan_call(x, weight, bias, *block)
    asked = len(block) > _GIVEN and block[-1] != "auto"
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or asked or torch.compiler.is_compiling():
        return call
    if not torch.is_autocast_enabled("cpu"):
        return call
    wide = plan_call(*(t if t is None else t.float() for t in (x, weight, bias)), *block)
    gains = wide.choice.us < (1 - max(GAIN_PERCENT, 0) / 100) * call.choice.us
    return wide._replace(rounds_to=x.dtype) if wide.plan != "reference" and gains else call


def _timed_run(call: CallPlan, tensors: tuple, block: tuple, plan: str) -> None:
    """Run a block by ``plan``, and its backward if there is one, on copies of all that a run changes.

    Args:
        call: any plan of this call; its ``choice`` is not read.
        tensors: input, weight and bias.
        block: the other arguments of the call.
        plan: the name of the plan to time.
    """
    norm, pool = block[4], block[6]
    leaves: Any = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
    if norm is not None:
        norm = copy.deepcopy(norm)
        block = (*block[:4], norm, *block[5:])
    if plan == "reference":
        out = _reference(*leaves, *block)
    else:
        x, weight, bias = leaves
        out = call._replace(choice=Choice(plan, plan, "")).run(x, weight, bias, norm, pool)
    if out.requires_grad:
        out.backward(torch.ones_like(out))


# ---------------------------------------------------------------- calls that are known

#: Plans by the keys of :func:`_look_up`.
_known_calls: dict[tuple, CallPlan] = {}
_MOST_KNOWN = 4096
#: How many items at the end of a key stand for the arguments behind ``bias``.
_GIVEN = 8

#: By type, the attributes of a module that decide how a call runs.
_POOL_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    **dict.fromkeys(
        (nn.MaxPool1d, nn.MaxPool2d),
        ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    ),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d), ("output_size", "return_indices")),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d), ()),
}
_ACTIVATION_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    **{kind: attributes for kind, (_, attributes) in ACTIVATION_MODULES.items()},
    nn.GELU: ("approximate",),
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


#: Errors of tensors without strides, of arguments without a hash, and of modules that are in no table above.
_WITHOUT_KEY = (AttributeError, KeyError, RuntimeError, TypeError)


def _look_up(
    x, weight, bias, stride, padding, dilation, groups, norm, activation, pool, layout
) -> tuple[tuple | None, CallPlan | None]:
    """The key of a call, and the plan of an earlier call with that key; None for what does not exist.

    A plan depends on its key, on hooks (:func:`_hooked`), and on the modes of :func:`is_plain_call`.
    """
    try:
        key = (
            torch._C._is_any_autocast_enabled() and _autocast_of(x.device.type),
            x.shape, x.stride(), x.layout, x.dtype, x.device, x.requires_grad, weight.shape, weight.dtype,
            weight.device, weight.requires_grad,
            bias if bias is None else (bias.shape, bias.dtype, bias.requires_grad),
            records_gradients(), backends.allow_transforms, tuner.enabled, torch.get_num_threads(),
            x.is_cuda and library_uses_tf32(),
            stride, padding, dilation, groups, layout,
            norm if norm is None else _norm_key(norm),
            activation if activation is None or type(activation) is str
            else _module_key(activation, _ACTIVATION_ATTRIBUTES),
            pool if pool is None else _module_key(pool, _POOL_ATTRIBUTES),
        )  # fmt: skip
        return key, _known_calls.get(key)
    except _WITHOUT_KEY:
        return None, None


def _autocast_of(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _module_key(module: nn.Module, attributes: dict[type, tuple[str, ...]]) -> tuple:
    kind, values = type(module), module.__dict__
    return (kind, *map(values.__getitem__, attributes[kind]))


def _norm_key(norm: nn.Module) -> tuple:
    if type(norm) not in _NORMS:
        raise KeyError(type(norm))
    tensors = norm_tensors(norm)
    signature = [t if t is None else (type(t), t.dtype, t.device, t.requires_grad) for t in tensors]
    return (type(norm), norm.training, norm.num_features, *signature)


def _hooked(*modules) -> bool:
    """Whether calling one of these modules would run anything but its class's forward."""
    for module in modules:
        if isinstance(module, nn.Module) and own_hooks(module):
            return True
    return global_hooks()


def _holds_for_all(key: tuple, call: CallPlan) -> bool:
    """Whether a plan holds for all calls with this key: it depends on that alone, which cannot change."""
    by_key = call.choice.by_sizes or (call.plan != "reference" and not tuner.enabled)
    return by_key and all(map(_is_constant, key[-_GIVEN:]))


def _is_constant(value) -> bool:
    """Whether a value can never change, as an array or a tensor could."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, (int, float, str, type, torch.dtype, torch.device))


# ---------------------------------------------------------------- running


def as_autocast_casts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """Input, weight and bias as autocast casts a convolution's arguments (float64 stays)."""
    device = x.device.type
    if device not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (x, weight, bias)
    ]


_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def _fused(spec, x, weight, bias, norm, plan: int, backward_plan: int) -> Tensor:
    """The op's raw result, in memory order, of a block without a norm (``norm`` is None)."""
    args = (spec.conv_args, ACTIVATIONS[spec.activation], spec.act_args, spec.pool_args, spec.order)
    if records_gradients() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return op.ConvBlockFunction.apply(x, weight, bias, *args, plan, backward_plan)
    return op.caller(op.forward_op, plan)(x, weight, bias, *args, plan, False)[0]


def _fused_with_norm(spec, x, weight, bias, norm, plan: int, backward_plan: int) -> Tensor:
    """As :func:`_fused`, with a norm; a norm in training mode updates its running statistics."""
    gamma, beta, mean, var = tensors = norm_tensors(norm)
    trained = records_gradients() and needs_gradient(weight, bias, gamma, beta)
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
        if trained or (records_gradients() and x.requires_grad):
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
