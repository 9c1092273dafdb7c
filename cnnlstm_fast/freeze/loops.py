"""Python loops over the steps of a recurrent layer, which export unrolls, as one layer over all steps again.

A step's state is that of the step before, or its product with a factor for each sequence, as agents have it:
``keep * h``, where ``keep`` is 0 after an episode's end.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from cnnlstm_fast.freeze.nodes import Graph, GraphNode
from cnnlstm_fast.freeze.passes import recurrent, same_size, value_of

aten = torch.ops.aten

#: Operators on one tensor that act on each element by itself.
_ELEMENTWISE = {aten.rsub.Scalar, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.neg.default}


class _Step(NamedTuple):
    """A recurrent node of one step, and where its state comes from."""

    node: GraphNode
    states: tuple[GraphNode | None, GraphNode | None]  # h0 and c0 without their factor
    keep: GraphNode | None


def roll_loops(graph: Graph) -> None:
    """Make one node of each chain of single steps of the same layer, in place."""
    steps = [_step_of(node) for node in graph.nodes if node.target is recurrent]
    chains: list[list[_Step]] = []
    ends: dict[GraphNode, list[_Step]] = {}
    for step in filter(None, steps):
        before = _step_before(step)
        chain = ends.pop(before, None) if before is not None else None
        if chain is None or chain[0].node.args[5:8] != step.node.args[5:8]:
            chain = []
            chains.append(chain)
        chain.append(step)
        ends[step.node] = chain
    for chain in chains:
        if len(chain) > 1:
            _roll(graph, chain)
    for node in list(graph.nodes):
        _join_results(graph, node)
    graph.eliminate_dead_code()


def _step_of(node: GraphNode) -> _Step | None:
    """A node of one step of a layer of one direction, without resets and lengths."""
    x, h0, c0, reset, lengths, weights, _, batch_first = node.args[:8]
    shape = value_of(x).shape
    if (
        reset is not None
        or lengths is not None
        or weights[4] is not None
        or weights[5] is not None
        or len(shape) != 3
        or not same_size(shape[1 if batch_first else 0], 1)
    ):
        return None
    h, keep = _unscaled(h0)
    c, keep_c = _unscaled(c0)
    if c0 is not None and keep is not keep_c:
        return _Step(node, (h0, c0), None)
    return _Step(node, (h, c), keep)


def _unscaled(state: GraphNode | None) -> tuple[GraphNode | None, GraphNode | None]:
    """A state (1, B, H) without a factor for each sequence, and the factor."""
    if state is None:
        return None, None
    node = _seen_through(state)
    if node.target is aten.mul.Tensor and all(isinstance(a, fx.Node) for a in node.args[:2]):
        for factor, other in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            value, whole = value_of(factor), value_of(other)
            if (
                value.dim() == 3
                and value.dtype in (torch.float32, torch.bfloat16)
                and same_size(value.shape[0], 1)
                and same_size(value.shape[2], 1)
                and whole.dim() == 3
                and same_size(value.shape[1], whole.shape[1])
            ):
                return _seen_through(other), factor
    return node, None


def _seen_through(node: GraphNode) -> GraphNode:
    """What a node is but for slices of everything."""
    while node.target is aten.slice.Tensor and all(
        same_size(a, b) for a, b in zip(value_of(node).shape, value_of(node.args[0]).shape, strict=True)
    ):
        node = node.args[0]
    return node


def _step_before(step: _Step) -> GraphNode | None:
    """The node whose last states this step begins with."""
    h, c = step.states
    if h is None or h.target is not operator.getitem or h.args[0].target is not recurrent or h.args[1] != 1:
        return None
    before: GraphNode = h.args[0]
    if c is not None and not (c.target is operator.getitem and c.args[0] is before and c.args[1] == 2):
        return None
    return before


# ---- One node of many


def _roll(graph: Graph, chain: list[_Step]) -> None:
    first, last = chain[0].node, chain[-1].node
    inputs = [step.node.args[0] for step in chain]
    keeps = [step.keep for step in chain]
    if any(keeps[1:]) and not all(keeps[1:]):
        return
    if not _states_stay(chain) or not _move_before(graph, first, [*inputs, *filter(None, keeps)]):
        return
    (h0, c0), batch_first = first.args[1:3], first.args[7]
    with graph.inserting_before(first):
        keep = None
        if keeps[1]:
            if keeps[0] is None:
                keeps[0] = _call(graph, aten.ones_like.default, keeps[1])
            else:
                h0, c0 = chain[0].states
            keep = _call(graph, aten.squeeze.dims, _stacked(graph, keeps) or _gathered(graph, keeps), [1, 3])
            if value_of(keep).dtype is torch.float32:
                keep = _call(graph, aten.clone.default, keep, memory_format=torch.contiguous_format)
            else:
                form = {"dtype": torch.float32, "memory_format": torch.contiguous_format}
                keep = _call(graph, aten._to_copy.default, keep, **form)
        x = _stacked(graph, inputs) or _gathered(graph, inputs)
        x = _call(graph, aten.squeeze.dim, x, 2 if batch_first else 1)  # [T, B, I]
        rolled = graph.call_function(
            recurrent, (x, h0, c0, None, None, first.args[5], first.args[6], False, keep)
        )
        out, *others = last.meta["val"]
        length, hidden = len(chain), out.shape[2]
        sizes = (length, out.shape[0 if batch_first else 1], hidden)
        rolled.meta["val"] = (value_of(x).new_empty(sizes), *others)
        results = [_item(graph, rolled, i) for i in range(3)]
    for t, step in enumerate(chain):
        for user in list(step.node.users):
            index = user.args[1]
            if index > 0 and step.node is last:
                user.replace_all_uses_with(results[index])
            elif index < 2 and user.users:
                with graph.inserting_before(first):
                    part = _call(graph, aten.slice.Tensor, results[0], 0, t, t + 1)
                    if batch_first and index == 0:
                        part = _call(graph, aten.transpose.int, part, 0, 1)
                user.replace_all_uses_with(part)


def _states_stay(chain: list[_Step]) -> bool:
    """Whether the cells between steps are read by the next step only: what comes out has none of them."""
    for step, following in itertools.pairwise(chain):
        for user in step.node.users:
            if user.args[1] == 2 and not _read_only_by(user, following.node):
                return False
    return True


def _read_only_by(node: GraphNode, reader: GraphNode) -> bool:
    return all(
        user is reader
        or (user.target in (aten.slice.Tensor, aten.mul.Tensor) and _read_only_by(user, reader))
        for user in node.users
    )


def _move_before(graph: Graph, first: GraphNode, needed: Sequence[GraphNode]) -> bool:
    """Move what some nodes need before the first step; False where that needs a step's results."""
    wanted: set[GraphNode] = set()
    waiting = list(needed)
    while waiting:
        node = waiting.pop()
        if node not in wanted:
            wanted.add(node)
            waiting += node.all_input_nodes
    later = False
    found = []
    for node in graph.nodes:
        later |= node is first
        if later and node in wanted:
            if node.target is recurrent:
                return False
            found.append(node)
    for node in found:
        first.prepend(node)
    return True


def _call(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> GraphNode:
    """A call of an operator, with an example of its result."""
    node = graph.call_function(target, args, kwargs)

    def value(a: Any) -> Any:
        return a.meta["val"] if isinstance(a, fx.Node) else a

    node.meta["val"] = target(*fx.node.map_aggregate(args, value), **kwargs)
    return node


def _moved(graph: Graph, node: GraphNode, axis: int, to: int) -> GraphNode:
    order = list(range(value_of(node).dim()))
    order.insert(to, order.pop(axis))
    return _call(graph, aten.permute.default, node, order)


def _item(graph: Graph, node: GraphNode, index: int) -> GraphNode:
    item = graph.call_function(operator.getitem, (node, index))
    item.meta["val"] = node.meta["val"][index]
    return item


def _gathered(graph: Graph, nodes: Sequence[GraphNode]) -> GraphNode:
    return _call(graph, aten.stack.default, list(nodes), 0)


def _stacked(graph: Graph, nodes: Sequence[GraphNode]) -> GraphNode | None:
    """What the nodes are parts of, one behind the other along a new first axis; None where that is nothing.

    Works its way up to what was taken apart: what was done to each part is done to the whole.
    """
    first = nodes[0]
    if any(n.target is not first.target or n.kwargs != first.kwargs or not n.args for n in nodes):
        return None
    target, whole = first.target, first.args[0]
    if target is operator.getitem and whole.target is aten.unbind.int:
        same = all(node.args == (whole, t) for t, node in enumerate(nodes))
        axis = whole.args[1] if len(whole.args) > 1 else 0
        source = whole.args[0]
        if not same or len(whole.meta["val"]) != len(nodes):
            return None
        return source if axis == 0 else _moved(graph, source, axis, 0)
    if target is aten.select.int and all(
        node.args[0] is whole and node.args[1:] == (first.args[1], t) for t, node in enumerate(nodes)
    ):
        if not same_size(value_of(whole).shape[first.args[1]], len(nodes)):
            return None
        return whole if first.args[1] == 0 else _moved(graph, whole, first.args[1], 0)
    if target is aten.slice.Tensor and all(node.args == (whole, 0, t, t + 1) for t, node in enumerate(nodes)):
        if not same_size(value_of(whole).shape[0], len(nodes)):
            return None
        return _call(graph, aten.unsqueeze.default, whole, 1)
    return _done_to_all(graph, nodes)


def _done_to_all(graph: Graph, nodes: Sequence[GraphNode]) -> GraphNode | None:
    """The same for what one operator made of each part, with the same other arguments."""
    first = nodes[0]
    target, rest = first.target, first.args[1:]
    views = {
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.transpose.int,
        aten.view.default,
        aten.reshape.default,
    }
    if target not in views | _ELEMENTWISE or any(node.args[1:] != rest for node in nodes):
        return None
    rank = value_of(first.args[0]).dim()
    if target in _ELEMENTWISE and not all(isinstance(a, (int, float)) for a in rest):
        return None
    parts = [node.args[0] for node in nodes]
    if not all(isinstance(p, fx.Node) for p in parts):
        return None
    whole = _stacked(graph, parts)
    if whole is None:
        return None
    if target in (aten.view.default, aten.reshape.default):
        return _call(graph, aten.reshape.default, whole, [len(nodes), *rest[0]])
    if target in _ELEMENTWISE:
        return _call(graph, target, whole, *rest, **first.kwargs)
    rank += target is aten.unsqueeze.default
    return _call(graph, target, whole, *(1 + axis % rank for axis in rest))


def _join_results(graph: Graph, node: GraphNode) -> None:
    """Let steps that are put together be the whole that they were taken from."""
    if node.target not in (aten.cat.default, aten.stack.default) or len(node.args[0]) < 2:
        return
    axis = (node.args[1] if len(node.args) > 1 else 0) % value_of(node).dim()
    joins = node.target is aten.cat.default
    if joins and not all(same_size(value_of(part).shape[axis], 1) for part in node.args[0]):
        return
    with graph.inserting_before(node):
        whole = _stacked(graph, list(node.args[0]))
        if whole is None:
            return
        if joins:
            whole = _call(graph, aten.squeeze.dim, whole, axis + 1)
        if axis:
            whole = _moved(graph, whole, 0, axis)
            whole = _call(graph, aten.clone.default, whole, memory_format=torch.contiguous_format)
    whole.meta = {**node.meta, "val": whole.meta["val"]} if axis else whole.meta
    node.replace_all_uses_with(whole)
