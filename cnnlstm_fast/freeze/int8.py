"""Which layers of a frozen program multiply in int8, and why others do not.

A program says nothing of it: it is captured, checked and saved in float32. ``Program(..., int8=True)`` packs
the weights of its linear and recurrent layers in int8.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cnnlstm_fast.freeze.nodes import Node

#: Most numbers of a row whose products are summed exactly in int32; as in ``csrc/cpu/int8/int8.h``.
MOST_INPUTS = 2**17


def why_not_int8(node: Node, constants: Mapping[str, Tensor]) -> str | None:
    """None where a linear or recurrent layer can multiply in int8; else why not, in words."""
    weights = [node["weight"]] if node["op"] == "linear" else [name for name in node["weights"] if name]
    if node["op"] == "recurrent" and node["weights"][4] is not None:
        return "a projected LSTM is computed in float32"
    most = max(constants[name].shape[-1] for name in weights if constants[name].dim() == 2)
    if most > MOST_INPUTS:
        return f"{most} products are too many for an exact sum in int32, which takes {MOST_INPUTS}"
    return None
