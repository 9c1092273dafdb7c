"""What :func:`cnnlstm_fast.explain` says of a frozen model: its program node by node, or why it has none."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from cnnlstm_fast.freeze.int8 import why_not_int8
from cnnlstm_fast.freeze.module import Frozen
from cnnlstm_fast.freeze.nodes import Node, results_of
from cnnlstm_fast.freeze.program import Compiled, Program
from cnnlstm_fast.freeze.versions import Version
from cnnlstm_fast.stages import Report, Stage, layout_of

#: Runs of each node, of which the fastest counts.
_ROUNDS = 3


def explain_frozen(frozen: Frozen, inputs: tuple) -> Report:
    """The stages of a call; see :func:`cnnlstm_fast.explain`."""
    with torch.no_grad():
        try:
            frozen(*inputs)
            start = time.perf_counter()
            frozen(*inputs)
            ms = (time.perf_counter() - start) * 1e3
        except Exception as error:
            return Report(error=f"{type(error).__name__}: {error}")
        version = frozen.version_of(inputs)
        if version is None:
            return Report(list(_without_program(frozen, inputs)), ms)
        given = pytree.tree_leaves(frozen.cast(inputs))
        tensors = [x.contiguous() for x in given if isinstance(x, Tensor)]
        return Report(list(_stages(version, tensors)), ms)


def _stages(version: Version, tensors: list[Tensor]) -> Iterator[Stage]:
    program = version.program
    values: dict[str, Tensor] = {}
    for name, t in zip(program.program["inputs"], tensors, strict=True):
        yield Stage("input", "", tuple(t.shape), layout_of(t), "", bytes=t.nbytes)
        values[name] = t
    nodes = program.program["nodes"]
    sizes = [node for node in nodes if node["op"] == "arithmetic"]
    in_python = {id(stretch.node) for stretch in program.stretches if not isinstance(stretch, Compiled)}
    for node in nodes:
        if node["op"] == "arithmetic":
            continue
        outs = results_of(node)
        alone = Program(
            {"inputs": list(values), "state": {}, "prelude": [], "nodes": [*sizes, node], "outputs": outs},
            program.constants,
            program.int8,
        )
        given, best = list(values.values()), float("inf")
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            found = alone.run(given)
            best = min(best, time.perf_counter() - start)
        values.update(zip(outs, found, strict=True))
        out = found[0]
        moved = node["op"] == "view" and node["kind"] in ("contiguous", "reshape")
        if node["op"] != "view" or (moved and out.data_ptr() != values[node["x"]].data_ptr()):
            yield Stage(
                outs[0], _name_of(node), tuple(out.shape), layout_of(out),
                *_plan_of(node, program, id(node) in in_python), ms=best * 1e3,
                bytes=sum(t.nbytes for t in found),
            )  # fmt: skip


def _name_of(node: Node) -> str:
    if node["op"] == "block":
        parts = ["Conv1d" if node["signal"] else "Conv2d"]
        parts += ["add"] if node["added"] else []
        parts += [node["activation"]] if node["activation"] else []
        return "+".join([*parts, *(["max pool"] if node["pool"] else [])])
    if node["op"] == "recurrent":
        return ("LSTM", "GRU")[node["mode"]]
    if node["op"] == "linear":
        return "+".join(["Linear", *([node["activation"]] if node["activation"] else [])])
    if node["op"] == "view":
        return "copy"
    return node["name"].partition("::")[2] if "name" in node else "add"


def _plan_of(node: Node, program: Program, in_python: bool) -> tuple[str, str]:
    if node["op"] == "block":
        plans = dict.fromkeys(plan for _, plan in node["plans"])
        return "/".join(plans), "timed when the model was frozen"
    if node["op"] in ("recurrent", "linear"):
        plan, why_not = {"recurrent": "fused", "linear": "packed"}[node["op"]], None
        if program.int8:
            why_not = why_not_int8(node, program.constants)
            if why_not is None:
                return f"{plan} int8", "weights packed once, in int8"
        return plan, "weights packed once" + (f"; no int8: {why_not}" if why_not else "")
    if in_python:
        return "PyTorch", "the interpreter of programs cannot call it: Python does"
    return "PyTorch", ""


def _without_program(frozen: Frozen, inputs: tuple) -> Iterator[Stage]:
    """Why this call has no program, and which parts of the model have one."""
    for x in pytree.tree_leaves(inputs):
        if isinstance(x, Tensor):
            yield Stage("input", "", tuple(x.shape), layout_of(x), "", bytes=x.nbytes)
    why = "; ".join(dict.fromkeys(frozen.why_not)) or "its inputs are of another device, dtype or size"
    yield Stage("model", type(frozen._model).__name__, (), "", "PyTorch", f"not one program: {why}")
    pieces: nn.Module | None = frozen._pieces
    for name, module in [] if pieces is None else pieces.named_modules():
        if isinstance(module, Frozen):
            yield Stage(name, type(module._model).__name__, (), "", "frozen", "a program of its own")
