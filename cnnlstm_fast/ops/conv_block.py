"""The block op: ``layout(max_pool(act(conv2d(x) + bias)))`` forward, and its backward.

Schema terms (all sizes of a 2-d block; a 1-d block is a block of height 1):

- ``conv``: stride h, w, padding h, w, dilation h, w, groups.
- ``activation``: a value of :data:`cnnlstm_fast.spec.ACTIVATIONS`.
- ``pool``: empty, or kernel h, w, stride h, w, padding h, w, dilation h, w, ceil_mode.
- ``order``: the permutation of (N, C, H, W) in which the result lies contiguously in memory.
- ``plan``: a value of :data:`PLANS`.
- ``keep``: also return the winner codes (:func:`cnnlstm_fast.spec.codes_shape`) that the backward
  reads; otherwise, and where a block has neither activation nor pool, codes are empty.

The CPU kernels live in ``csrc/``, the CUDA kernels in ``kernels/``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnlstm_fast.spec import codes_shape, conv_size, pool_size, raw_shape

PLANS = {"direct": 1, "chunked": 2}

_lib = torch.library.Library("cnnlstm_fast", "FRAGMENT")
_lib.define(
    "conv_block(Tensor x, Tensor weight, Tensor? bias, int[] conv, int activation, int[] pool, "
    "int[] order, int plan, bool keep) -> (Tensor, Tensor)"
)
_lib.define(
    "conv_block_backward(Tensor grad, Tensor x, Tensor weight, Tensor codes, int[] conv, "
    "int activation, int[] pool, int[] order, int plan, bool need_x, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor)"
)

forward_op = torch.ops.cnnlstm_fast.conv_block.default
backward_op = torch.ops.cnnlstm_fast.conv_block_backward.default


def keeps_codes(activation: int, pool: list[int]) -> bool:
    """Whether the backward of such a block reads winner codes at all."""
    return bool(activation or pool)


@torch.library.register_fake("cnnlstm_fast::conv_block", lib=_lib)
def _(x, weight, bias, conv, activation, pool, order, plan, keep):
    conv_hw = conv_size(x.shape[2:], weight.shape[2:], conv[0:2], conv[2:4], conv[4:6])
    size = pool_size(conv_hw, pool)
    n, c = x.shape[0], weight.shape[0]
    out = x.new_empty(raw_shape(order, n, c, size))
    window = pool[0] * pool[1] if pool else 1
    kept = codes_shape(window, n, c, size) if keep and keeps_codes(activation, pool) else [0]
    return out, x.new_empty(kept, dtype=torch.uint8)


@torch.library.register_fake("cnnlstm_fast::conv_block_backward", lib=_lib)
def _(grad, x, weight, codes, conv, activation, pool, order, plan, need_x, need_weight, need_bias):
    return (
        x.new_empty(x.shape if need_x else [0]),
        weight.new_empty(weight.shape if need_weight else [0]),
        weight.new_empty(weight.shape[:1] if need_bias else [0]),
    )


def composite(x, weight, bias, conv, activation, pool, order) -> Tensor:
    """The op in differentiable PyTorch, in the op's own terms."""
    y = F.conv2d(x, weight, bias, conv[0:2], conv[2:4], conv[4:6], conv[6])
    if activation:
        y = F.relu(y)
    if pool:
        y = F.max_pool2d(y, pool[0:2], pool[2:4], pool[4:6], pool[6:8], bool(pool[8]))
    return y.permute(order).contiguous()


class ConvBlockFunction(torch.autograd.Function):
    """Autograd around the op; entered only when a gradient is needed."""

    @staticmethod
    def forward(x, weight, bias, conv, activation, pool, order, plan, backward_plan):
        return forward_op(x, weight, bias, conv, activation, pool, order, plan, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, *ctx.args, _, ctx.backward_plan = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, output[1])

    @staticmethod
    def backward(ctx, grad, _):
        nothing = (None,) * 6
        if grad is None:
            return None, None, None, *nothing
        x, weight, bias, codes = ctx.saved_tensors
        needs = [bool(need) for need in ctx.needs_input_grad[:3]]
        if torch.is_grad_enabled():  # create_graph=True: differentiable backward
            inputs = [t for t, need in zip((x, weight, bias), needs, strict=True) if need]
            found = iter(
                torch.autograd.grad(
                    composite(x, weight, bias, *ctx.args), inputs, grad, create_graph=True
                )
            )
            return *(next(found) if need else None for need in needs), *nothing
        grads = backward_op(grad, x, weight, codes, *ctx.args, ctx.backward_plan, *needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *nothing
