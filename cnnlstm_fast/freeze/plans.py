"""Which plan each block of a frozen program runs by: timed once, at the examples' sizes and larger."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from cnnlstm_fast import backends
from cnnlstm_fast.freeze.nodes import Node, names_in
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
_PASSES, _ROUNDS, _SECONDS = 2, 4, 0.04


def read_by_blocks(program: dict) -> set[str]:
    """The input and views of it, if blocks alone read its values; else nothing.

    A block on packed weights of bfloat16 takes such an input in float32 and rounds it.
    """
    if len(program["inputs"]) != 1:
        return set()
    found = {*program["inputs"]}
    for node in program["nodes"]:
        if found.isdisjoint(names_in(node)):
            continue
        if node["op"] == "view":
            found.add(node["out"])
        elif node["op"] != "arithmetic" and (node["op"] != "block" or node["added"] in found):
            return set()
    return found if found.isdisjoint(program["outputs"]) else set()


def rounds_its_input(program: dict) -> bool:
    """Whether the program, in bfloat16, may as well be given its input in float32."""
    given = read_by_blocks(program)
    readers = [node for node in program["nodes"] if node["op"] == "block" and node["x"] in given]
    return any(plan == "packed" for node in readers for _, plan in node["plans"])


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
    given = read_by_blocks(program)
    alike: dict[Any, list[Node]] = {}
    for node in blocks:
        same = {k: v for k, v in node.items() if k not in ("x", "out", "plans", "added")}
        key = (node["weight"], node["added"] is None, node["x"] in given, str(same))
        alike.setdefault(key, []).append(node)
    found = [_Timed(nodes[0], constants, nodes[0]["x"] in given) for nodes in alike.values()]
    for _ in range(_PASSES):  # some time apart: others may be busy for a while
        for timed in found:
            timed.take()
    for timed, nodes in zip(found, alike.values(), strict=True):
        for node in nodes:
            node["plans"] = timed.plans()


def _inputs_of(blocks: list[Node], names: list[str], tensors: list[Tensor]) -> list[Tensor]:
    by_name = dict(zip(names, tensors, strict=True))
    return [by_name[node["x"]] for node in blocks]


class _Timed:
    """The best times of a block's plans, for one number of images or two.

    Args:
        given: whether it reads the program's input.
    """

    def __init__(self, node: Node, constants: dict[str, Tensor], given: bool):
        self.node, self.constants, self.given = node, constants, given
        first, *rest = node["size"]
        sizes = [(first, *rest), (first * _LARGER, *rest)]
        self.best: dict[tuple[int, ...], dict[str, float]] = {
            size: {} for i, size in enumerate(sizes) if i == 0 or torch.Size(size).numel() <= _MOST_ELEMENTS
        }

    def take(self) -> None:
        """Time all plans once more."""
        for size, best in self.best.items():
            for plan, seconds in _times(self.node, size, self.constants, self.given).items():
                best[plan] = min(seconds, best.get(plan, seconds))

    def plans(self) -> list:
        """Pairs of positions and the fastest plan for so many."""
        found = [
            [float(_positions(self.node, size, self.constants)), min(best, key=best.__getitem__)]
            for size, best in self.best.items()
            if best
        ]
        return found or [[1.0, _any_plan(self.node, self.constants)]]


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


def _times(node: Node, size: tuple[int, ...], constants: dict[str, Tensor], given: bool) -> dict[str, float]:
    """The best time of each plan that takes the block, in turn."""
    dtype = constants[node["weight"]].dtype
    x = torch.randn(size)
    if dtype is not torch.bfloat16 or not given:  # else every plan rounds it
        x = x.to(dtype)
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
    return best


def _alone(node: Node, constants: dict[str, Tensor]) -> Program:
    used = [name for name in (node["weight"], node["bias"], *node["act"]) if isinstance(name, str)]
    if node["added"] == node["x"]:
        node = {**node, "added": node["x"] + " too"}
    program = {
        "inputs": [name for name in (node["x"], node["added"]) if name is not None],
        "state": {}, "prelude": [], "nodes": [node], "outputs": [node["out"]],
    }  # fmt: skip
    return Program(program, {name: constants[name] for name in used})
