"""A block's convolution, norm, activation and pool as one call, in PyTorch's own layout."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnnlstm_fast import functional
from cnnlstm_fast.functional.conv_block import Decision, run_again
from cnnlstm_fast.functional.conv_block import decide as decide_call
from cnnlstm_fast.fusion.calls import Conv
from cnnlstm_fast.fusion.layout import eager_layout


def run_block(
    x: Tensor,
    conv: Conv,
    norm: nn.Module | None = None,
    activation: Any = None,
    pool: nn.Module | None = None,
    layout: str | None = None,
    decision: Decision | None = None,
) -> Tensor:
    """:func:`cnnlstm_fast.functional.conv_block`, in PyTorch's own layout unless one is named.

    ``decision`` is what :func:`decide` said of an earlier call like this one.
    """
    if decision is not None:
        result = run_again(decision, x, conv.weight, conv.bias, norm)
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
) -> Decision:
    """How :func:`run_block` would run these arguments; nothing is computed."""
    return decide_call(x, *conv, norm, activation, pool, layout)[0]
