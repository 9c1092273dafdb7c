"""A frozen model chunk by chunk: what its layers remember is carried from call to call."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from cnnlstm_fast.errors import WrongShape
from cnnlstm_fast.freeze.nodes import Node, results_of
from cnnlstm_fast.freeze.program import Program
from cnnlstm_fast.freeze.versions import Version
from cnnlstm_fast.ops.recurrent import MODES

_LARGEST = 2**63 - 1
#: Steps of the sequence on which a stream is compared with the whole when it is made, and how they are cut.
_TRIED, _CUTS = 23, (1, 2, 7)
#: Largest difference of the two, relative to the largest value.
_ROUNDING = 1e-4


class FrozenStream:
    """A frozen model on a sequence that comes in chunks; made by ``frozen.stream(batch)``.

    States of recurrent layers, and the last columns of convolutions along time (without padding, or with
    zeros before the first step only), are carried from call to call, so that the results are those of the
    whole sequence, within rounding.

    Args:
        version: the program.
        batch: how many sequences run side by side.

    Shapes:
        A chunk is as the model's input with any number of steps from 1 on. Results are those of the steps
        that came, or, where the model gives the result of its last step, that of the last step so far.

    Raises:
        ValueError: the model cannot run chunk by chunk; the message says why.

    Example:
        >>> model = nn.Sequential(nn.Conv1d(3, 8, 5), nn.ReLU()).eval()
        >>> stream = cf.freeze(model, torch.randn(1, 3, 40)).stream(batch=2)
        >>> x = torch.randn(2, 3, 30)
        >>> parts = [stream(chunk) for chunk in x.split(10, 2)]
        >>> torch.allclose(torch.cat(parts, 2), model(x), atol=1e-5)
        True
    """

    def __init__(self, version: Version, batch: int):
        self._version, self.batch = version, batch
        self._time: dict[str, Any] = version.data["time"]
        if "why_not" in self._time:
            raise ValueError(f"this model cannot run as a stream: {self._time['why_not']}")
        self._batch_axis = self._time["batch"]
        self._data, self._first = _streamed(version.data, self._time, version.program.constants, batch)
        self._program, self._of = self._compiled()
        self.reset()
        self._compare()
        self.reset()

    def _compiled(self) -> tuple[Program, Program]:
        of = self._version.program
        return Program(self._data, of.constants, of.int8), of

    def reset(self) -> None:
        """Begin all sequences anew."""
        self._carried = [t.clone() for t in self._first]
        self._waiting: Tensor | None = None
        #: Steps that came so far.
        self.steps = 0

    def __call__(self, x: Tensor) -> Any:
        """The results for the next steps of all sequences.

        Args:
            x: as the model's input, with ``batch`` sequences and any number of steps.

        Returns:
            As the model; None while convolutions without padding have seen too few steps for a first result.

        Raises:
            ValueError: the shape is not that of a chunk.
            TypeError: ``x`` is no tensor, or of another dtype.
        """
        self._check(x)
        axis = self._time["axis"]
        with torch.no_grad():
            self.steps += x.shape[axis]
            if self.steps <= self._time["lost"]:
                self._waiting = x.clone() if self._waiting is None else torch.cat([self._waiting, x], axis)
                return None
            if self._waiting is not None:
                x, self._waiting = torch.cat([self._waiting, x], axis), None
            if self._version.program is not self._of:  # the weights were refreshed
                self._program, self._of = self._compiled()
            found = self._program.run([x.contiguous(), *self._carried])
        count = len(self._time["results"])
        self._carried = [t.clone() for t in found[count:]]  # the caller gets states too
        if self._version.single:
            return found[0]
        left = iter(found[:count])
        leaves = [next(left) if r is None else r[1] for r in self._version.results]
        return pytree.tree_unflatten(leaves, self._version.out_spec)

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"got a {type(x).__name__}, expected a tensor")
        shape = self._version.sizes.shapes[0]
        fits = x.dim() == len(shape) and x.shape[self._time["axis"]] > 0
        if fits:
            fixed = all(x.shape[i] == size for i, size in enumerate(shape) if isinstance(size, int))
            fits = fixed and x.shape[self._batch_axis] == self.batch
        if not fits:
            named = [str(size) for size in shape]
            named[self._time["axis"]], named[self._batch_axis] = "T", str(self.batch)
            raise WrongShape(
                f"got a chunk of shape {tuple(x.shape)}, expected ({', '.join(named)}) with T of 1 or more "
                f"steps"
            )
        if x.dtype != self._version.signature[1][0]:
            raise TypeError(f"got {x.dtype}, expected {self._version.signature[1][0]}")

    def _compare(self) -> None:
        """Compare with the whole of a random sequence: what is neither carried nor step by step shows.

        In float32: where a number is rounded to int8 one step apart, results differ by more than rounding.
        """
        program, of = self._program.in_float32(), self._of.in_float32()
        axis, lost = self._time["axis"], self._time["lost"]
        sizes = list(self._time["example"])
        sizes[self._batch_axis], sizes[axis] = self.batch, lost + _TRIED
        if self._version.signature[1][0].is_floating_point:
            x = torch.randn(sizes, dtype=self._version.signature[1][0])
        else:
            x = torch.zeros(sizes, dtype=self._version.signature[1][0])
        with torch.no_grad():
            whole = of.run([x])
            chunks, at = [], 0
            for size in (lost + 1, *_CUTS, sizes[axis]):
                chunk = x.narrow(axis, at, min(size, sizes[axis] - at))
                at += chunk.shape[axis]
                if chunk.shape[axis]:
                    self.steps += chunk.shape[axis]
                    found = program.run([chunk.contiguous(), *self._carried])
                    self._carried = found[len(whole) :]
                    chunks.append(found[: len(whole)])
        for i, (expected, along) in enumerate(zip(whole, self._time["results"], strict=True)):
            parts = [chunk[i] for chunk in chunks]
            got = parts[-1] if along is None else torch.cat(parts, along)
            if got.shape != expected.shape or not torch.allclose(
                got, expected, rtol=0, atol=_ROUNDING * max(1e-6, expected.abs().max().item()), equal_nan=True
            ):
                raise ValueError(
                    "this model cannot run as a stream: its results for chunks are not those of the whole "
                    "sequence, so something in it looks at all steps at once"
                )


def _streamed(
    program: dict, time: dict[str, Any], constants: dict[str, Tensor], batch: int
) -> tuple[dict, list[Tensor]]:
    """The program with what is carried as more inputs and outputs, and its values before the first step."""
    nodes: list[Node] = []
    inputs: list[str] = []
    outputs: list[str] = []
    first: list[Tensor] = []
    padded = {conv["padded"] for conv in time["convs"].values() if "padded" in conv}

    def carry(name: str, found: str, begin: Tensor) -> None:
        inputs.append(name)
        outputs.append(found)
        first.append(begin)

    for index, node in enumerate(program["nodes"]):
        if node["op"] == "recurrent" and node["from"] in time["recurrent"]:
            h0, c0, last_h, last_c = (f"stream.{index}.{part}" for part in ("h0", "c0", "h_n", "c_n"))
            rows, width = constants[node["weights"][1]].shape
            out, h_n, c_n = node["out"]
            node = {**node, "h0": h0, "out": [out, h_n or last_h, c_n]}
            carry(h0, h_n or last_h, torch.zeros(1, batch, width))
            if node["mode"] == MODES["LSTM"]:
                node = {**node, "c0": c0, "out": [out, h_n or last_h, c_n or last_c]}
                carry(c0, c_n or last_c, torch.zeros(1, batch, rows // 4))
        elif node["op"] == "block" and node["out"] in time["convs"]:
            conv = time["convs"][node["out"]]
            before, joined, after = (f"stream.{index}.{part}" for part in ("before", "joined", "after"))
            x = conv.get("of", node["x"])
            if conv["columns"]:
                parts = [{"ref": before}, {"ref": x}]
                nodes.append({"op": "call", "name": "aten::cat", "args": [parts, 2], "out": [joined]})
                numbers = [2, -conv["columns"], _LARGEST, 1]
                nodes.append({"op": "view", "kind": "slice", "x": joined, "numbers": numbers, "out": after})
                carry(before, after, torch.zeros(batch, conv["channels"], conv["zeros"]))
                x = joined
            node = {**node, "x": x}
        elif padded.intersection(results_of(node)):
            continue
        nodes.append(node)
    whole = {
        "inputs": [*program["inputs"], *inputs], "state": {}, "prelude": [], "nodes": nodes,
        "outputs": [*program["outputs"], *outputs],
    }  # fmt: skip
    return whole, first
