"""Nodes of frozen programs as data; :mod:`cnnlstm_fast.freeze.lower` says what they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Node = dict[str, Any]
#: A graph of torch.fx and its nodes, whose arguments may be anything: their types say too little to check by.
Graph = Any
GraphNode = Any


def results_of(node: Node) -> list[str]:
    """Names of the tensors that a node computes."""
    out = node["out"]
    if isinstance(out, str):
        return [out]
    return [name for part in out for name in (part if isinstance(part, list) else [part]) if name is not None]


#: Fields of a node whose texts are no names of values.
_NOT_NAMES = (
    "op",
    "kind",
    "name",
    "activation",
    "part",
    "plans",
    "dtype",
    "layout",
    "device",
    "memory_format",
    "from",
)


def names_in(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, dict):
        for key, value in data.items():
            if key not in _NOT_NAMES:
                yield from names_in(value)
    elif isinstance(data, (list, tuple)):
        for value in data:
            yield from names_in(value)
