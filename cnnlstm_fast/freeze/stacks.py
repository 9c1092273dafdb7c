"""Recurrent layers of a frozen program one behind the other as one node, whose steps overlap.

A program's data keeps its layers apart, so that streams and files know nothing of this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from cnnlstm_fast.freeze.nodes import Node, names_in, results_of


def join_layers(nodes: Sequence[Node], later: Collection[str]) -> list[Node]:
    """Nodes in which layers that read nothing but the layer before are joined to it.

    Args:
        nodes: of one stretch, in order.
        later: names that others read.

    Returns:
        The same nodes, with ``stack`` nodes in the place of the last of their ``layers``.
    """
    found: list[Node] = []
    readers = Counter(name for node in nodes for name in set(names_in(node)))
    producer: dict[str, Node] = {}
    for node in nodes:
        before = producer.get(node["x"]) if node["op"] == "recurrent" else None
        if before is not None and readers[node["x"]] == 2 and node["x"] not in later:
            between = found[found.index(before) + 1 :]
            if _fit(before, node) and not _reads_any([*between, {**node, "x": None}], results_of(before)):
                layers = [*before.get("layers", [before]), node]
                found.remove(before)
                node = _stack_of(layers)
        found.append(node)
        if node["op"] in ("recurrent", "stack") and node["out"][0] is not None:
            producer[node["out"][0]] = node
    return found


def _stack_of(layers: list[Node]) -> Node:
    states = [name for layer in layers for name in layer["out"][1:]]
    first, last = layers[0], layers[-1]
    return {
        "op": "stack", "x": first["x"], "keep": first["keep"], "mode": first["mode"],
        "batch_first": first["batch_first"], "layers": layers, "out": [last["out"][0], *states],
    }  # fmt: skip


def _reads_any(nodes: Sequence[Node], names: Collection[str]) -> bool:
    return any(name in names for node in nodes for name in names_in(node))


def _fit(before: Node, node: Node) -> bool:
    """Whether two layers, the first perhaps several, can be one node: of one direction each, and alike."""
    first = before.get("layers", [before])[0]
    if first["keep"] != node["keep"]:
        return False
    return all(first[key] == node[key] for key in ("mode", "batch_first")) and all(
        one["reset"] is None and one["lengths"] is None and one["weights"][4:6] == [None, None]
        for one in (first, node)
    )
