"""A block's convolution, norm, activation and pool as one call of ``conv_block``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnnlstm_fast import functional
from cnnlstm_fast.functional.conv_block import CallPlan, as_autocast_casts, plan_under_autocast
from cnnlstm_fast.fusion.calls import Conv
from cnnlstm_fast.fusion.layout import eager_layout


def run_block(
    x: Tensor,
    conv: Conv,
    norm: nn.Module | None = None,
    activation: Any = None,
    pool: nn.Module | None = None,
    layout: str | None = None,
) -> Tensor:
    """:func:`cnnlstm_fast.functional.conv_block`, in the layout of PyTorch's result unless one is named."""
    if layout is None:
        layout = eager_layout(x, conv.weight, pool is not None, norm, activation)
    return functional.conv_block(
        x, conv.weight, conv.bias, stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
        groups=conv.groups, norm=norm, activation=activation, pool=pool, layout=layout,
    )  # fmt: skip


def plan_block(
    x: Tensor, conv: Conv, norm: nn.Module | None, activation: Any, pool: nn.Module | None, layout: str
) -> CallPlan:
    """How :func:`run_block` would run these arguments; nothing is computed."""
    x, weight, bias = as_autocast_casts(x, conv.weight, conv.bias)
    return plan_under_autocast(x, weight, bias, *conv[2:], norm, activation, pool, layout)
