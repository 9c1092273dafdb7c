"""Which plan each block of a frozen program runs by: timed once, at the examples' sizes and larger."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from cnnlstm_fast import backends
from cnnlstm_fast.freeze.nodes import Node
from cnnlstm_fast.freeze.program import Program, compute_constants
from cnnlstm_fast.ops.program import BLOCK_PLANS
from cnnlstm_fast.spec import map_size

#: Plans on packed weights, which alone add a tensor to a convolution's map.
PACKED = ("packed", "packed winograd", "packed library")
#: Batches that are timed beside the examples' own, as multiples, while their inputs have at most so many
#: elements.
_LARGER, _MOST_ELEMENTS = 8, 2**21
#: Plans that round otherwise than a sum of products.
_TRANSFORMS = ("winograd", "fft", "packed winograd")
_ROUNDS, _SECONDS = 5, 0.05


def choose_plans(program: dict, values: dict[str, Tensor], inputs: list[Tensor] | None = None) -> None:
    """Give every block of a program its ``plans``, in place.

    Args:
        values: of the names in ``state`` and ``tensors``.
        inputs: examples; the sizes of their blocks are timed. None: those that were timed before, on another
            processor.
    """
    blocks = [node for node in program["nodes"] if node["op"] == "block"]
    if not blocks:
        return
    constants = compute_constants(program, values)
    if inputs is not None:
        for node in blocks:
            node["plans"] = [[1.0, _any_plan(node, constants)]]
        names = list(dict.fromkeys(node["x"] for node in blocks))
        observed = Program({**program, "outputs": names}, values)
        for node, t in zip(blocks, _inputs_of(blocks, names, observed.run(inputs)), strict=True):
            node["size"] = list(t.shape)
    known: dict[Any, list] = {}
    for node in blocks:
        size = tuple(node["size"])
        same = {k: v for k, v in node.items() if k not in ("x", "out", "plans", "added")}
        key = (size, node["weight"], node["added"] is None, str(same))
        if key not in known:
            known[key] = _measured(node, size, constants)
        node["plans"] = known[key]


def _inputs_of(blocks: list[Node], names: list[str], tensors: list[Tensor]) -> list[Tensor]:
    by_name = dict(zip(names, tensors, strict=True))
    return [by_name[node["x"]] for node in blocks]


def _measured(node: Node, shape: tuple[int, ...], constants: dict[str, Tensor]) -> list:
    """Pairs of positions and the fastest plan for so many."""
    found = []
    for times in (1, _LARGER):
        size = (shape[0] * times, *shape[1:])
        if times > 1 and torch.Size(size).numel() > _MOST_ELEMENTS:
            break
        plan = _fastest(node, size, constants)
        if plan is not None:
            found.append([float(_positions(node, size, constants)), plan])
    return found or [[1.0, _any_plan(node, constants)]]


def _any_plan(node: Node, constants: dict[str, Tensor]) -> str:
    """The plan of a block that was not timed: it takes all of them."""
    if node["added"] is None:
        return "chunked"
    return "packed" if constants[node["weight"]].dtype is torch.float32 else "packed library"


def _map_size(node: Node, size: tuple[int, ...], constants: dict[str, Tensor]) -> tuple[int, int]:
    kernel = tuple(constants[node["weight"]].shape[2:])
    image = size[2:]
    if node["signal"]:
        kernel, image = (1, *kernel), (1, *image)
    return map_size(image, kernel, node["conv"])


def _positions(node: Node, size: tuple[int, ...], constants: dict[str, Tensor]) -> int:
    h, w = _map_size(node, size, constants)
    return max(1, size[0] * h * w)


def _addend(node: Node, size: tuple[int, ...], constants: dict[str, Tensor]) -> Tensor:
    """A tensor that a block adds, channels-last as a block before writes it."""
    h, w = _map_size(node, size, constants)
    weight = constants[node["weight"]]
    added = torch.randn(size[0], h, w, weight.shape[0]).to(weight.dtype).permute(0, 3, 1, 2)
    return added.squeeze(2) if node["signal"] else added


def _fastest(node: Node, size: tuple[int, ...], constants: dict[str, Tensor]) -> str | None:
    x = torch.randn(size).to(constants[node["weight"]].dtype)
    inputs = [x]
    if len(size) == 4 and node["order"] == [0, 2, 3, 1] and size[1] > 1:
        inputs = [x.contiguous(memory_format=torch.channels_last)]
    if node["added"] is not None:
        inputs.append(_addend(node, size, constants))
    runs = {}
    for plan in BLOCK_PLANS:
        if node["added"] is not None and plan not in PACKED:
            continue
        if plan in _TRANSFORMS and not backends.allow_transforms:
            continue
        try:
            runs[plan] = _alone({**node, "plans": [[1.0, plan]]}, constants)
            runs[plan].run(inputs)
        except RuntimeError:  # not a block of this plan
            runs.pop(plan, None)
    best = dict.fromkeys(runs, float("inf"))
    end = time.perf_counter() + _SECONDS * len(runs)
    for turn in range(_ROUNDS):
        for plan, program in runs.items():
            if turn and best[plan] > 2 * min(best.values()):
                continue
            start = time.perf_counter()
            program.run(inputs)
            best[plan] = min(best[plan], time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return min(best, key=best.__getitem__, default=None)


def _alone(node: Node, constants: dict[str, Tensor]) -> Program:
    used = [name for name in (node["weight"], node["bias"], *node["act"]) if isinstance(name, str)]
    if node["added"] == node["x"]:
        node = {**node, "added": node["x"] + " too"}
    program = {
        "inputs": [name for name in (node["x"], node["added"]) if name is not None],
        "state": {}, "prelude": [], "nodes": [node], "outputs": [node["out"]],
    }  # fmt: skip
    return Program(program, {name: constants[name] for name in used})
