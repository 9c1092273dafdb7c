"""Which axis of a captured model is time, and what a stream has to carry from chunk to chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnlstm_fast.freeze.nodes import Graph, GraphNode
from cnnlstm_fast.freeze.passes import block, recurrent, value_of

aten = torch.ops.aten


def describe_time(graph: Graph, inputs: list[str], results: list[GraphNode]) -> dict[str, Any]:
    """What a stream needs, as data: or ``{"why_not": a sentence}``.

        - ``axis``: the input's axis of time, ``batch``: that of the sequences. ``example``: its sizes in the
          example.
    - ``lost``: how many steps fewer than the input the layers see.
        - ``recurrent``: results of the recurrent layers whose state is carried.
        - ``convs``: by their results, convolutions along time: how many columns they carry, and how many
          zeros were before the first step (``padded`` names the padded input then, ``of`` what was padded).
        - ``results``: for each tensor among the results its axis of time, or None where it is that after the
          last step.
    """
    try:
        return _Time(graph, inputs, results).described()
    except _NoStream as error:
        return {"why_not": str(error)}


class _NoStream(Exception):
    pass


class _Time:
    def __init__(self, graph: Graph, inputs: list[str], results: list[GraphNode]):
        if len(inputs) != 1:
            raise _NoStream(f"it takes {len(inputs)} tensors, and a stream one")
        self.nodes = [n for n in graph.nodes if n.op == "call_function"]
        (self.input,) = (n for n in graph.nodes if n.name == inputs[0])
        self.results = results
        self.symbol = self._symbol()

    def _symbol(self) -> Any:
        """The size of the input that the steps of recurrent layers, or of convolutions of signals, are."""
        steps = [
            value_of(n.args[0]).shape[1 if n.args[7] else 0] for n in self.nodes if n.target is recurrent
        ] or [value_of(n.args[0]).shape[2] for n in self.nodes if n.target is block and n.kwargs["signal"]]
        if not steps:
            raise _NoStream("it has neither a recurrent layer nor a convolution along time")
        for size in value_of(self.input).shape:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                symbol = size.node.expr
                if all(_beyond(step, symbol) is not None for step in steps):
                    return symbol
        raise _NoStream("the steps of its layers are not the steps of its input")

    def _axis(self, node: GraphNode) -> int | None:
        """The axis of time of a node's result, whose size is that of the input but for a constant."""
        axes = [i for i, s in enumerate(value_of(node).shape) if _beyond(s, self.symbol) is not None]
        return axes[0] if len(axes) == 1 else None

    def described(self) -> dict[str, Any]:
        axis = self._axis(self.input)
        if axis is None:
            raise _NoStream("its input has no single axis of time")
        lost, layers, convs = 0, [], {}
        for node in self.nodes:
            if node.target is recurrent:
                layers.append(self._layer(node))
            elif node.target is block and (found := self._conv(node)) is not None:
                convs[node.name] = found
            if node.target in (block, recurrent) and isinstance(value_of(node), Tensor):
                at = self._axis(node)
                if at is not None:
                    lost = max(lost, -(_beyond(value_of(node).shape[at], self.symbol) or 0))
        return {
            "axis": axis, "batch": self._batch(axis),
            "example": [_hint(s) for s in value_of(self.input).shape],
            "lost": int(lost), "recurrent": layers, "convs": convs,
            "results": [self._axis(result) for result in self.results],
        }  # fmt: skip

    def _batch(self, axis: int) -> int:
        """The input's axis that is the batch of the recurrent layers, or of the convolutions."""
        found = [
            value_of(n.args[0]).shape[0 if n.target is block or n.args[7] else 1]
            for n in self.nodes
            if n.target is recurrent or (n.target is block and n.kwargs["signal"])
        ]
        for i, size in enumerate(value_of(self.input).shape):
            if (
                i != axis
                and isinstance(size, torch.SymInt)
                and all(_beyond(f, size.node.expr) == 0 for f in found)
            ):
                return i
        raise _NoStream("the batch of its layers is not that of its input")

    def _layer(self, node: GraphNode) -> str:
        _, h0, c0, reset, lengths, weights, _, _, keep = node.args
        if weights[5] is not None:
            raise _NoStream(
                "it has a recurrent layer of two directions, which needs the sequence's end first"
            )
        if any(t is not None for t in (h0, c0, reset, lengths, keep)):
            raise _NoStream("a recurrent layer gets a state, resets or lengths from the model")
        return node.name

    def _conv(self, node: GraphNode) -> dict[str, Any] | None:
        x, shape = node.args[0], value_of(node.args[0]).shape
        if not node.kwargs["signal"]:
            if any(_involves(s, self.symbol) for s in shape[1:]):
                raise _NoStream("a convolution of images has time as an axis of them")
            return None
        if not _involves(shape[2], self.symbol):
            return None
        conv, kernel = node.kwargs["conv"], int(value_of(node.args[1]).shape[2])
        if conv[1] != 1 or node.kwargs["pool"]:
            raise _NoStream("a convolution along time has a stride or a pool behind it")
        if any(conv[2:4]) or len(conv) > 7:
            raise _NoStream("a convolution along time is padded at its end: it needs steps that come later")
        found: dict[str, Any] = {"columns": (kernel - 1) * conv[5], "zeros": 0, "channels": int(shape[1])}
        if x.target in (aten.pad.default, aten.constant_pad_nd.default):
            pad, value = list(x.args[1]), (list(x.args[2:]) or [0])[-1]
            if len(pad) != 2 or pad[1] != 0 or value not in (0, None, "constant") or len(x.users) != 1:
                raise _NoStream("time is padded in another way than with zeros before its first step")
            if pad[0] > found["columns"]:
                raise _NoStream("more zeros are before the first step than a convolution reads")
            found |= {"zeros": pad[0], "padded": x.name, "of": x.args[0].name}
        return found


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _beyond(size: Any, symbol: Any) -> int | None:
    """How much larger a size is than ``symbol``, if that is a constant."""
    if not isinstance(size, torch.SymInt):
        return None
    difference = size.node.expr - symbol
    return int(difference) if difference.is_number else None


def _involves(size: Any, symbol: Any) -> bool:
    return isinstance(size, torch.SymInt) and symbol in size.node.expr.free_symbols
