"""Programs of one frozen model: one for each structure of the arguments, and what was decided by sizes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from cnnlstm_fast.freeze.capture import capture, size_text, tensors_of
from cnnlstm_fast.freeze.lower import lower
from cnnlstm_fast.freeze.nodes import Node, names_in
from cnnlstm_fast.freeze.plans import PACKED, choose_plans, rounds_its_input
from cnnlstm_fast.freeze.program import Program
from cnnlstm_fast.freeze.sizes import Sizes, compiled


class Version:
    """A program, and the calls that it is for.

    Args:
        program, tensors: of :func:`cnnlstm_fast.freeze.lower.lower`; blocks have plans.
        state: the model's parameters and buffers, by key.
        sizes: of the inputs.
        signature: structure and dtypes of the arguments (:func:`signature_of`).
        results: for each leaf of the results ``None`` (the program's next output), or a pair: "size" and an
            expression of sizes, or "value" and what it is.
        out_spec: how the results lie.
        int8: whether weights of linear and recurrent layers are packed in int8.
    """

    def __init__(
        self, program: dict, tensors: dict[str, Tensor], state: dict[str, Tensor], sizes: Sizes,
        signature: Any, results: list, out_spec: pytree.TreeSpec, int8: bool = False,
    ):  # fmt: skip
        self.int8 = int8
        self.data, self.tensors = program, tensors
        self.sizes, self.signature, self.results, self.out_spec = sizes, signature, results, out_spec
        self.checker = sizes.checker()
        self.single = results == [None] and out_spec.is_leaf()
        #: Whether an input in bfloat16 may be given in float32 too.
        self.rounds_its_input = rounds_its_input(program)
        self._of_sizes = [
            compiled(r[1], sizes.names()) if r is not None and r[0] == "size" else None for r in results
        ]
        #: What export took for granted and calls broke whose results were right all the same.
        self.broken: set[str] = set()
        self.refresh(state)

    def refresh(self, state: dict[str, Tensor]) -> None:
        """Take the values that the state has now: copies, so that they stay until the next refresh."""
        packed = _packed_names(self.data)  # of these the nodes make copies
        values = {
            name: state[key].detach() if name in packed else state[key].detach().clone()
            for name, key in self.data["state"].items()
        }
        self.program = Program(self.data, {**values, **self.tensors}, self.int8)

    def quantize(self, state: dict[str, Tensor]) -> None:
        """Pack in int8 from now on, what the state has now."""
        self.int8 = True
        self.refresh(state)

    def in_float32(self) -> Version:
        """The same with nothing in int8: what can be compared with the model."""
        twin = copy.copy(self)
        twin.program = self.program.in_float32()
        return twin

    def copied(self, state: dict[str, Tensor]) -> Version:
        """The same program over another state."""
        made = Version(
            self.data, self.tensors, state, self.sizes, self.signature, self.results, self.out_spec, self.int8
        )
        made.broken |= self.broken
        return made

    def results_of(self, tensors: list[Tensor]) -> Any:
        """The model's results for the tensors among its arguments."""
        outputs = self.program.run(tensors)
        if self.single:
            return outputs[0]
        values = (self.checker.values([t.shape for t in tensors]) if any(self._of_sizes) else None) or {}
        left = iter(outputs)
        leaves = [
            next(left) if result is None else result[1] if of is None else of(values)
            for result, of in zip(self.results, self._of_sizes, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.out_spec)


def _packed_names(program: dict) -> set[str]:
    """Names of the state whose values are read when the program is made and never again."""
    packed: set[str] = set()
    others: list = [program["outputs"]]
    for node in program["nodes"]:
        keys = _packed_keys(node)
        packed.update(names_in([node[key] for key in keys]))
        others.append({key: value for key, value in node.items() if key not in keys})
    for node in program["prelude"]:
        if node["op"] == "folded":
            packed.update(names_in(node["of"]))
        else:
            others.append(node)
    return packed - set(names_in(others))


def _packed_keys(node: Node) -> tuple[str, ...]:
    """What a node packs."""
    if node["op"] == "recurrent":
        return ("weights",)
    if node["op"] == "linear" or (node["op"] == "block" and all(plan in PACKED for _, plan in node["plans"])):
        return ("weight", "bias")
    return ()


def make_version(
    model: nn.Module,
    state: dict[str, Tensor],
    signature: Any,
    args: tuple,
    kwargs: dict,
) -> Version:
    """The program of a call, captured and planned.

    Raises:
        NotCaptured, NotLowered: there is none, and why.
    """
    captured = capture(model, args, kwargs)
    results: list = []
    for value in captured.results:
        if not isinstance(value, fx.Node):
            results.append(("value", value))
        elif isinstance(value.meta.get("val"), Tensor):
            results.append(None)
        else:
            results.append(("size", size_text(value.meta["val"])))
    program, others = lower(captured)
    values = {name: state[key] for name, key in program["state"].items()}
    choose_plans(program, {**values, **others}, tensors_of(args, kwargs))
    return Version(program, others, state, captured.sizes, signature, results, captured.out_spec)


def resized(
    sizes: Sizes, name: str, size: int | None, args: tuple, kwargs: dict
) -> tuple[tuple, dict] | None:
    """Arguments like these whose size ``name`` is another: ``size``, or one more if that is None."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    values = sizes.checker().values([leaves[i].shape for i in at])
    if values is None or values[name] == size:
        return None
    values[name] = values[name] + 1 if size is None else size
    for i, expected in zip(at, sizes.shapes, strict=True):
        for dim, one in enumerate(expected):
            new = one if isinstance(one, int) else compiled(one, sizes.names())(values)
            if new != leaves[i].shape[dim]:
                leaves[i] = leaves[i].index_select(dim, torch.arange(new) % leaves[i].shape[dim])
    return pytree.tree_unflatten(leaves, spec)


def signature_of(leaves: list, spec: Any) -> tuple:
    """What a version is captured for, beside sizes: structure, dtypes and what is no tensor."""
    parts = [
        (leaf.dtype, leaf.dim(), leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)
        for leaf in leaves
    ]
    return (spec, *parts)
