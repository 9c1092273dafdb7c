"""In which order a frozen block writes its map: that in which its reader has nothing to copy."""

from __future__ import annotations

import torch

from cnnlstm_fast.freeze.nodes import GraphNode
from cnnlstm_fast.freeze.passes import VIEWS, block, recurrent

aten = torch.ops.aten

_CHANNELS_FIRST, _CHANNELS_LAST = [0, 1, 2, 3], [0, 2, 3, 1]
_RESHAPES = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints,
}  # fmt: skip


def result_order(node: GraphNode) -> list[int]:
    """The permutation of (N, C, H, W) in which a block's result lies in memory.

    Args:
        node: a block of :mod:`cnnlstm_fast.freeze.passes`.
    """
    signal = node.kwargs["signal"]
    users = list(node.users)
    if users and all(user.target is block for user in users):
        return _CHANNELS_LAST
    if len(users) == 1:
        axes = _axes_when_read(node, list("NCW" if signal else "NCHW"))
        if axes is not None:
            missing = [axis for axis in "NCHW" if axis not in axes]
            return ["NCHW".index(axis) for axis in [*missing, *axes]]
    return _CHANNELS_FIRST


def _axes_when_read(node: GraphNode, axes: list[str]) -> list[str] | None:
    """The axes in the order in which a chain of views hands them to something that wants them contiguous."""
    while len(node.users) == 1:
        node, before = next(iter(node.users)), node
        target = node.target
        if target in (aten.permute.default, aten.transpose.int):
            if target is aten.permute.default:
                order = [d % len(axes) for d in node.args[1]]
            else:
                order = list(range(len(axes)))
                i, j = (d % len(axes) for d in node.args[1:3])
                order[i], order[j] = j, i
            axes = [axes[i] for i in order]
        elif target is aten.squeeze.dim:
            dim = node.args[1] % len(axes)
            if before.meta["val"].shape[dim] != 1:
                return None
            axes = axes[:dim] + axes[dim + 1 :]
        elif target in _RESHAPES or (
            target is aten.clone.default and node.kwargs.get("memory_format") is torch.contiguous_format
        ):
            return axes
        elif target is recurrent:
            return axes
        elif target not in VIEWS:
            return None
        else:
            return None
    return None
