"""The block op: ``layout(max_pool(act(conv2d(x) + bias)))`` forward, and its backward.

Schema terms (all sizes of a 2-d block; a 1-d block is a block of height 1):

- ``conv``: stride h, w, padding h, w, dilation h, w, groups; then, where there is any, zeros after the last
  row and column beside the padding.
- ``activation``, ``act``: a value of :data:`cnnlstm_fast.spec.ACTIVATIONS` and its numbers (Hardtanh: least,
  most; LeakyReLU: slope; ELU: alpha; Softplus: beta, threshold).
- ``pool``: empty, or kernel h, w, stride h, w, padding h, w, dilation h, w, ceil_mode.
- ``order``: the permutation of (N, C, H, W) in which the result lies contiguously in memory.
- ``plan``: a value of :data:`PLANS`.
- ``keep``: also return what the backward reads, otherwise empty tensors: the argmax codes
  (:func:`cnnlstm_fast.spec.codes_shape`) of a pool or an activation of slope 0 or 1, and in the shape
  of the result the slopes at the argmax positions of a curved activation. The backward op takes a
  gradient that has been multiplied by them, and such an activation as none.

The CPU kernels live in ``csrc/``, the CUDA kernels in ``kernels/``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cnnlstm_fast.ops import python_inside
from cnnlstm_fast.ops.cuda import register_cuda
from cnnlstm_fast.reference import conv_backward_by_args, conv_block_by_args
from cnnlstm_fast.spec import CODE_GROUP, CURVED, STOPPING, codes_shape, map_size, pool_size, raw_shape

PLANS = {"direct": 1, "chunked": 2, "winograd": 3, "fft": 4}

_lib = torch.library.Library("cnnlstm_fast", "FRAGMENT")
_lib.define(
    "conv_block(Tensor x, Tensor weight, Tensor? bias, int[] conv, int activation, float[] act, "
    "int[] pool, int[] order, int plan, bool keep) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "conv_block_backward(Tensor grad, Tensor x, Tensor weight, Tensor codes, int[] conv, "
    "int activation, float[] act, int[] pool, int[] order, int plan, bool need_x, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor)"
)

_lib.define("suits_winograd(Tensor weight) -> bool")

forward_op = torch.ops.cnnlstm_fast.conv_block.default
backward_op = torch.ops.cnnlstm_fast.conv_block_backward.default
#: Whether no tap of a weight (C_out, C, 3, 3) is nearly zero for a whole channel. If one is, the ops above
#: run the plan ``winograd`` as ``chunked``, since a tile rounds all its elements as its loudest one.
suits_winograd_op = torch.ops.cnnlstm_fast.suits_winograd.default


def caller(op: Callable, plan: int) -> Callable:
    """A function that calls one of these ops, and raises the errors of Python code inside it unchanged."""
    return partial(python_inside.call, op) if plan == PLANS["fft"] else op


def keeps_codes(activation: int, pool: list[int]) -> bool:
    """Whether the backward of a block with this activation and pool reads argmax codes."""
    return bool(pool) or 0 < activation < CURVED


@torch.library.register_fake("cnnlstm_fast::conv_block", lib=_lib)
def _(x, weight, bias, conv, activation, act, pool, order, plan, keep):
    size = pool_size(map_size(x.shape[2:], weight.shape[2:], conv), pool)
    n, c = x.shape[0], weight.shape[0]
    out = x.new_empty(raw_shape(order, n, c, size))
    window = pool[0] * pool[1] if pool else 1
    kept = codes_shape(window, n, c, size) if keep and keeps_codes(activation, pool) else [0]
    slopes = x.new_empty(out.shape if keep and activation >= CURVED else [0])
    return out, x.new_empty(kept, dtype=torch.uint8), slopes


def new_like_input(x: Tensor) -> Tensor:
    """An empty gradient of ``x``: channels-last on the CPU where ``x`` is, else contiguous."""
    n, c, h, w = x.shape
    if x.device.type == "cpu" and not x.is_contiguous() and x.stride() == (h * w * c, 1, w * c, c):
        return x.new_empty(n, h, w, c).permute(0, 3, 1, 2)
    return x.new_empty(x.shape)


@torch.library.register_fake("cnnlstm_fast::conv_block_backward", lib=_lib)
def _(grad, x, weight, codes, conv, activation, act, pool, order, plan, need_x, need_weight, need_bias):
    return (
        new_like_input(x) if need_x else x.new_empty(0),
        weight.new_empty(weight.shape if need_weight else [0]),
        weight.new_empty(weight.shape[:1] if need_bias else [0]),
    )


def inverse(order) -> list[int]:
    """The permutation that undoes ``order``."""
    return sorted(range(4), key=lambda axis: order[axis])


def max_unpool(grad: Tensor, codes: Tensor, conv_hw, channels: int, pool: list[int], order) -> Tensor:
    """The gradient of the convolution's map (N, C_out, OH, OW) from that of the op's result.

    Each gradient goes to the position that its argmax code names. Plain PyTorch, differentiable in ``grad``.

    Args:
        grad: of the op's result, in memory order.
        codes: (N, PH, PW, groups, bytes), or empty where the block keeps none.
        conv_hw: (OH, OW).
    """
    grad = grad.permute(inverse(order))
    if codes.numel() == 0:
        return grad
    n, c, out_h, out_w = grad.shape
    if codes.shape[-1] == CODE_GROUP // 2:
        codes = torch.cat([codes & 15, codes >> 4], -1)
        stopped = 15
    else:
        stopped = 255
    # [N, C, PH, PW]: positions in the pool's windows
    position = codes.flatten(3)[..., :channels].permute(0, 3, 1, 2).long()
    passed = position != stopped
    kernel_w, stride, padding, dilation = (
        (pool[1], pool[2:4], pool[4:6], pool[6:8]) if pool else (1, (1, 1), (0, 0), (1, 1))
    )
    position = position.where(passed, 0)
    rows = torch.arange(out_h, device=grad.device)[:, None] * stride[0] - padding[0]
    cols = torch.arange(out_w, device=grad.device) * stride[1] - padding[1]
    flat = (rows + position // kernel_w * dilation[0]) * conv_hw[1] + cols + position % kernel_w * dilation[1]
    flat = flat.where(passed, 0)
    values = grad.where(passed, 0)
    grad_map = grad.new_zeros(n, c, conv_hw[0] * conv_hw[1])
    return grad_map.scatter_add(2, flat.flatten(2), values.flatten(2)).unflatten(2, tuple(conv_hw))


class Unchecked:
    """A small tensor that only second derivatives read, with a copy of its values.

    PyTorch's own operators do not save it, so the program may write to it before the backward.
    """

    def __init__(self, tensor: Tensor | None):
        self.tensor = tensor
        self.held = None if tensor is None else tensor.detach().clone()

    def as_it_was(self) -> Tensor | None:
        """The tensor with its place in the autograd graph and the copied values."""
        if self.tensor is None or self.held is None:
            return None
        return self.tensor + (self.held - self.tensor).detach()


class Refused:
    """A large tensor that only second derivatives read, which must not change before they do.

    PyTorch's own operators do not save it for first derivatives, so the program may write to it before those.
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        # A compiled graph checks no version counters, and inference tensors have none.
        unversioned = torch.compiler.is_compiling() or tensor.is_inference()
        self.version = None if unversioned else tensor._version

    def value(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: the program has written to it.
        """
        if self.version is not None and self.tensor._version != self.version:
            raise RuntimeError(
                "an operand of a convolution that second derivatives read has been modified by an inplace "
                f"operation: it is at version {self.tensor._version}, expected version {self.version}"
            )
        return self.tensor


def saved_and_unsaved(x: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[tuple, tuple]:
    """What first derivatives read of a convolution's operands, and what only second ones do.

    Only the first are saved: the program may write to the others, and hooks on saved tensors free the first.

    Args:
        needs: whether the input and the weight need a gradient.
    """
    need_x, need_weight = needs
    saved = x if need_weight else None, weight if need_x else None
    return saved, (None if need_weight else Refused(x), None if need_x else Refused(weight))


class ConvBlockFunction(torch.autograd.Function):
    """Autograd around the op; entered only when a gradient is needed."""

    @staticmethod
    def forward(ctx, x, weight, bias, conv, activation, act, pool, order, plan, backward_plan):
        # One method instead of setup_context, which costs 15 us: under torch.func, which needs that,
        # the reference plan runs.
        raw, codes, slopes = caller(forward_op, plan)(
            x, weight, bias, conv, activation, act, pool, order, plan, True
        )
        ctx.args = conv, activation, act, pool, order
        ctx.backward_plan = backward_plan
        ctx.shapes = x.shape, weight.shape
        ctx.set_materialize_grads(False)
        saved, unsaved = saved_and_unsaved(x, weight, ctx.needs_input_grad[:2])
        if activation >= CURVED:
            ctx.bias, ctx.unsaved = Unchecked(bias), unsaved
            ctx.save_for_backward(*saved, codes, slopes)
        else:
            ctx.bias = bias  # its place in the graph alone
            ctx.save_for_backward(*saved, codes)
        return raw

    @staticmethod
    def backward(ctx, grad):
        nothing = (None,) * 7
        if grad is None:
            return None, None, None, *nothing
        x, weight, codes, *curved = ctx.saved_tensors
        needs = [bool(need) for need in ctx.needs_input_grad[:3]]
        again = torch.is_grad_enabled()  # create_graph=True: a backward that can be differentiated
        if again and curved:
            x, weight = (
                t if unsaved is None else unsaved.value()
                for t, unsaved in zip((x, weight), ctx.unsaved, strict=True)
            )
        if x is None:
            x = grad.new_empty(()).expand(ctx.shapes[0])
        if weight is None:
            weight = grad.new_empty(()).expand(ctx.shapes[1])
        if again:
            if curved:
                grads = _recomputed_backward(grad, x, weight, ctx.bias.as_it_was(), ctx.args, needs)
            else:
                operands = (x, weight, ctx.bias)
                grads = _differentiable_backward(grad, *operands, codes, ctx.args, needs)
        else:
            conv, activation, act, pool, order = ctx.args
            if curved:
                grad = _through_slopes(grad, curved[0], activation)
                activation, act = 0, []
            args = conv, activation, act, pool, order
            plan = ctx.backward_plan
            grads = caller(backward_op, plan)(grad, x, weight, codes, *args, plan, *needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *nothing


def _through_slopes(grad, slopes, activation):
    product = grad * slopes
    return product.masked_fill_(slopes == 0, 0) if activation in STOPPING else product


def _recomputed_backward(grad, x, weight, bias, args, needs):
    """Gradients through a second forward in plain PyTorch."""
    # Views: where one argument depends on another, gradients do not flow that way.
    inputs: list[Any] = [None if t is None else torch.ops.aten.alias.default(t) for t in (x, weight, bias)]
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(conv_block_by_args(*inputs, *args), wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needs]


class WithZeros(torch.autograd.Function):
    """A tensor as it is, on which others depend with derivatives of zero, and not with none."""

    @staticmethod
    def forward(ctx, x, *others):
        ctx.others = [None if t is None else (t.shape, t.dtype) for t in others]
        return torch.ops.aten.alias.default(x)  # view_as gives sizes of 1 other strides, which norms misread

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[1:]
        return grad, *(
            grad.new_zeros(other[0], dtype=other[1]) if need else None
            for other, need in zip(ctx.others, needs, strict=True)
        )


def _differentiable_backward(grad, x, weight, bias, codes, args, needs):
    conv, activation, _, pool, order = args
    grad_map = max_unpool(
        grad, codes, map_size(x.shape[2:], weight.shape[2:], conv), weight.shape[0], pool, order
    )
    if activation or pool:  # as PyTorch's second derivatives of those give zeros
        grad_map = WithZeros.apply(grad_map, x, weight, bias)
    return conv_backward_by_args(grad_map, x, weight, conv, needs)


register_cuda("conv_block", "conv_block", "forward", x_at=0)
register_cuda("conv_block_backward", "conv_block", "backward", x_at=1)
