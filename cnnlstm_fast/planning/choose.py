"""Which plan runs a block, and why. Nothing else decides that.

Each plan is an entry of :data:`PLANS`. The plan of least predicted cost runs, if the prediction beats that of
PyTorch's operators by a margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnnlstm_fast import backends
from cnnlstm_fast.limits import limit
from cnnlstm_fast.ops import conv_block as op
from cnnlstm_fast.ops import conv_fft
from cnnlstm_fast.planning import costs, costs_cuda, rates, tuner
from cnnlstm_fast.planning.problem import ConvProblem, Sizes, conv_problem, lies_channels_last, nominal
from cnnlstm_fast.planning.support import (
    check_sizes,
    folds,
    needs_gradient,
    of_batch,
    records_gradients,
    why_not_call,
    why_not_direct,
    why_not_fft,
    why_not_sizes,
    why_not_winograd,
)
from cnnlstm_fast.spec import BlockSpec, Pool

#: Percent of PyTorch's time that a fused plan must be predicted to save; predictions err by about as much.
GAIN_PERCENT = limit("GAIN_PERCENT", 10, -(2**31))
#: How many choices are remembered.
_MEMORY = 4096


# The op lies below the planner, and must cut its work without asking it.
conv_fft.rates = lambda: rates.here().tilings


class Plan(NamedTuple):
    """One way to run a block.

    Attributes:
        name: as ``conv_block(plan=...)`` takes it.
        why_not: why it cannot run a block of these sizes, as a sentence; None if it can. It is asked only for
            blocks that some fused plan can run.
        why_not_values: why it does not suit the values of ``(spec, x, weight)``, as a sentence; None if it
            does. The op looks at the values in each call, and runs ``chunked`` where they do not suit.
        transforms: it rounds an element as the loudest one nearby
            (:data:`cnnlstm_fast.backends.allow_transforms`).
    """

    name: str
    why_not: Callable[[Sizes], str | None]
    why_not_values: Callable[[BlockSpec, Tensor, Tensor], str | None]
    transforms: bool = False


def _taps_vanish(spec: BlockSpec, x: Tensor, weight: Tensor) -> str | None:
    if op.suits_winograd_op(weight):
        return None
    return "a tap is nearly zero for a whole channel: rounding by tiles could show"


def _is_uneven(spec: BlockSpec, x: Tensor, weight: Tensor) -> str | None:
    if conv_fft.is_uneven(x, weight, spec.conv_args):
        return "quiet positions beside loud ones: rounding by windows could show"
    return None


def _never(*_) -> None:
    return None


#: All plans, in the order in which tables list them:
#:
#: - ``direct``: our own convolution; the whole block stays in registers and cache.
#: - ``chunked``: the library's convolution over as many frames as stay in cache, then one pass for
#:   bias, activation, pool and layout.
#: - ``winograd``: as ``chunked``, with our own convolution of 3x3 taps, which takes 16 products where
#:   others take 36.
#: - ``fft``: a convolution by Fourier transforms along one axis, which takes fewer multiplications for
#:   large kernels (:mod:`cnnlstm_fast.ops.conv_fft`), then one pass as ``chunked``.
#: - ``reference``: PyTorch's own operators. Always right.
PLANS: dict[str, Plan] = {
    plan.name: plan
    for plan in (
        Plan("direct", why_not_direct, _never),
        Plan("chunked", _never, _never),
        Plan("winograd", why_not_winograd, _taps_vanish, transforms=True),
        Plan("fft", why_not_fft, _is_uneven, transforms=True),
        Plan("reference", _never, _never),
    )
}


class Choice(NamedTuple):
    """What runs a call.

    Attributes:
        forward, backward: names of plans.
        reason: in words.
        us: microseconds that the call takes, predicted or timed.
        saves_us: microseconds less than PyTorch's operators take.
        by_sizes: PyTorch's operators were chosen by a prediction, although a fused plan can run the call.
    """

    forward: str
    backward: str
    reason: str
    us: float = 0.0
    saves_us: float = 0.0
    by_sizes: bool = False


def choose(
    plan: str,
    spec: BlockSpec,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm=None,
    run: Callable[[str], Any] | None = None,
) -> Choice:
    """The plan for a call: ``plan`` itself, or for ``"auto"`` the fastest one, timed or predicted.

    Args:
        run: runs the call by the plan that it is given, forward and backward, and changes no tensor. None
            where plans are not to be timed.

    Raises:
        ValueError: ``plan`` names a plan that cannot run this call; the message says why. Or the input
            is too small for the kernel or the pool.
    """
    if plan == "reference":
        check_sizes(spec, x.shape[2:], weight.shape[2:])
        return Choice(plan, plan, "asked for")
    why_not = why_not_call(spec, x, weight, bias, norm)
    mode = None if norm is None else "batch" if of_batch(norm) else "folded" if folds(norm) else "given"
    sizes = Sizes(spec, x.shape, weight.shape, x.dtype, x.device.type, mode)
    if plan != "auto":
        why_not = why_not or why_not_sizes(sizes)
        if why_not is None and PLANS[plan].transforms and not backends.allow_transforms:
            why_not = "cnnlstm_fast.backends.allow_transforms is False"
        why_not = why_not or PLANS[plan].why_not(sizes)
        if why_not:
            raise ValueError(
                f'plan="{plan}" cannot run here: {why_not}. Pass plan="auto" to let '
                'the package choose, or plan="reference" for PyTorch\'s own operators'
            )
        return Choice(plan, plan, "asked for")
    if why_not:
        return Choice("reference", "reference", why_not)
    needs_x = x.requires_grad
    training = records_gradients() and (
        needs_x
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (norm is not None and needs_gradient(norm.weight, norm.bias))
    )
    gradients = training, needs_x, lies_channels_last(x)
    if torch.compiler.is_compiling():
        return _while_compiling(sizes, *gradients)
    call = (sizes, *gradients, *_settings(sizes.device))
    if run is not None and sizes.device == "cpu" and (tuner.may_time() or tuner.knows(call)):
        return _fastest(call, run)
    return cheapest(*call)


def _settings(device: str) -> tuple[bool, bool, int]:
    """Settings of the user that a choice depends on: transforms, TF32 and threads."""
    return backends.allow_transforms, device == "cuda" and library_uses_tf32(), torch.get_num_threads()


def library_uses_tf32() -> bool:
    """Whether cuDNN's float32 convolutions are TF32."""
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv.fp32_precision == "tf32"


@lru_cache(maxsize=_MEMORY)
def cheapest(
    sizes: Sizes,
    training: bool,
    needs_x: bool,
    channels_last: bool,
    transforms: bool,
    tf32: bool,
    threads: int,
) -> Choice:
    """The plan of least predicted cost, which is remembered.

    Args:
        sizes, training, needs_x, channels_last, threads: as in :class:`ConvProblem`.
        transforms: whether plans that round by tiles and windows may be taken.
        tf32: whether the library's float32 products are TF32.
    """
    why_not = why_not_sizes(sizes)
    if why_not:
        return Choice("reference", "reference", why_not)
    problem = conv_problem(sizes, training, needs_x, channels_last, threads)
    if sizes.device == "cuda":
        return _on_cuda(problem, tf32)
    if problem.faulty and rates.library_has_amx():
        choice = least(costs.predict(problem, rates.here(), _able(sizes, transforms)), gain=-math.inf)
        return choice._replace(reason=choice.reason + ", whose convolution of such images by AMX has faults")
    choice = least(costs.predict(problem, rates.here(), _able(sizes, transforms)))
    if not transforms and PLANS[least(costs.predict(problem, rates.here(), _able(sizes))).forward].transforms:
        choice = choice._replace(reason=choice.reason + "; cnnlstm_fast.backends.allow_transforms is False")
    return choice


def _able(sizes: Sizes, transforms: bool = True) -> list[str]:
    """The plans that can run a block of these sizes."""
    return [
        name
        for name, plan in PLANS.items()
        if (transforms or not plan.transforms) and plan.why_not(sizes) is None
    ]


@lru_cache(maxsize=_MEMORY)
def _likely(*call) -> list[str]:
    """The plans that are worth timing, PyTorch's operators first. The arguments are :func:`cheapest`'s."""
    sizes, training, needs_x, channels_last, transforms, _, threads = call
    if why_not_sizes(sizes):
        return ["reference"]
    problem = conv_problem(sizes, training, needs_x, channels_last, threads)
    if problem.faulty and rates.library_has_amx():
        return [cheapest(*call).forward]
    return tuner.shortlist(costs.predict(problem, rates.here(), _able(sizes, transforms)))


def _fastest(call: tuple, run: Callable[[str], Any]) -> Choice:
    """The likely plan that is timed to be the fastest. ``call`` has the arguments of :func:`cheapest`."""
    plans = _likely(*call)
    if len(plans) == 1:
        return cheapest(*call)

    def key() -> dict:
        sizes, *rest = call
        return {"block": _described(sizes.spec), "call": [str(part) for part in (*sizes[1:], *rest)]}

    seconds = tuner.seconds_of(call, key, plans, run)
    return least({plan: 1e9 * s for plan, s in seconds.items()}, gain=1 - tuner.TIE, how="timed: ")


def least(nanoseconds: dict[str, float], gain: float | None = None, how: str = "") -> Choice:
    """The plan of least cost; PyTorch's operators where none is better by ``gain``.

    Args:
        nanoseconds: by plan, PyTorch's operators among them.
        gain: share of PyTorch's time; ``GAIN_PERCENT`` without it.
        how: the reason's beginning.
    """
    theirs = nanoseconds["reference"]
    ours, name = min((ns, name) for name, ns in nanoseconds.items() if name != "reference")
    told = f"{how}{in_words(ours)} by {name}, {in_words(theirs)} by PyTorch"
    if ours <= (1 - (GAIN_PERCENT / 100 if gain is None else gain)) * theirs:
        return Choice(name, name, told, ours / 1e3, max(theirs - ours, 0.0) / 1e3)
    return Choice("reference", "reference", told, theirs / 1e3, by_sizes=True)


def in_words(nanoseconds: float) -> str:
    """Nanoseconds in words, as ``4.3 ms`` or ``62 us``."""
    us = nanoseconds / 1e3
    return f"{us / 1e3:.3g} ms" if us >= 1e3 else f"{us:.3g} us"


def _on_cuda(problem: ConvProblem, tf32: bool) -> Choice:
    """The plan of least predicted cost on CUDA, by bytes and arithmetic."""
    spec, norm = problem.spec, problem.norm
    alone = norm is None and spec.activation is None and not spec.pool
    if alone and spec.layout in ("channels_first", "channels_last"):
        return Choice(
            "reference", "reference", "a convolution alone: there is nothing to fuse", by_sizes=True
        )
    found = costs_cuda.costs(problem, tf32)
    if spec.groups > 1:  # our tiles for tensor cores would be mostly empty
        return Choice("chunked", "chunked", "a grouped convolution: the library's, then one pass")
    if norm in ("batch", "given"):  # one plan, because the backward reads what the forward keeps
        both = {plan: forward + problem.training * backward for plan, (forward, backward) in found.items()}
        # given statistics without a pool: the map is kept, and the library computes it for both plans
        if both["direct"] <= both["chunked"] and (spec.pool or norm == "batch"):
            reason = "by bytes and arithmetic: statistics as it convolves, the map never moves"
            return Choice("direct", "direct", reason)
        reason = "by bytes and arithmetic: the library's convolution, then passes over its map"
        return Choice("chunked", "chunked", reason)
    forward, backward = (
        "direct" if found["direct"][way] <= found["chunked"][way] else "chunked" for way in range(2)
    )
    if forward == "direct":
        return Choice(forward, backward, "by bytes and arithmetic: the map before the pool never exists")
    return Choice(forward, backward, "by bytes and arithmetic: the library's convolution, then one pass")


def _while_compiling(sizes: Sizes, *gradients: bool) -> Choice:
    """The plan under a compiler. It is hidden from dynamo, which would guard on every value that is asked."""
    shapes = nominal(sizes.shape, sizes.weight_shape, sizes.spec.groups)
    kinds = sizes.dtype, sizes.device, sizes.norm
    return Choice(*_constant(_described(sizes.spec), *shapes, *kinds, *gradients))


def _described(spec: BlockSpec) -> tuple:
    """A spec's fields by name, as numbers, names and tuples of them."""
    pool = spec.pool
    return (
        ("stride", spec.stride), ("padding", spec.padding), ("dilation", spec.dilation),
        ("groups", spec.groups), ("activation", spec.activation), ("layout", spec.layout),
        ("activation_args", spec.activation_args), ("padding_after", spec.padding_after),
        ("pool", pool and (pool.kernel, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)),
    )  # fmt: skip


def _constant(described, shape, weight_shape, dtype, device, norm, *gradients) -> tuple:
    fields = dict(described)
    pool = fields.pop("pool")
    spec = BlockSpec(pool=pool and Pool(*pool), **fields)
    sizes = Sizes(spec, torch.Size(shape), torch.Size(weight_shape), dtype, device, norm)
    return tuple(cheapest.__wrapped__(sizes, *gradients, *_settings(device)))


# What torch.compiler.assume_constant_result does, without importing the compiler.
_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
