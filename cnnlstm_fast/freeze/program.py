"""Running a frozen program: its nodes (:mod:`cnnlstm_fast.freeze.lower`) as calls of the op ``program_run``.

What the op cannot call runs in Python between two programs.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cnnlstm_fast.freeze.int8 import why_not_int8
from cnnlstm_fast.freeze.nodes import Node, names_in, results_of
from cnnlstm_fast.freeze.passes import fold
from cnnlstm_fast.freeze.stacks import join_layers
from cnnlstm_fast.ops import program as op
from cnnlstm_fast.spec import ACTIVATIONS

_DTYPES = {
    "uint8": 0, "int8": 1, "int16": 2, "int32": 3, "int64": 4, "float16": 5, "float32": 6,
    "float64": 7, "complex64": 9, "complex128": 10, "bool": 11, "bfloat16": 15,
}  # fmt: skip
_FORMATS = {"contiguous_format": 0, "preserve_format": 1, "channels_last": 2, "channels_last_3d": 3}
#: Largest whole number of the list in which a program travels.
_LARGEST = 2**63 - 1


#: Operators of PyTorch's own use that programs may have; others may trust their arguments.
_PRIVATE = (
    "_to_copy", "_unsafe_view", "_native_batch_norm_legit_no_training", "_weight_norm",
    "_weight_norm_interface", "_softmax", "_log_softmax", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    "_scaled_dot_product_flash_attention_for_cpu", "_native_multi_head_attention",
)  # fmt: skip
#: Operators that read files or memory that is not their arguments'.
_REFUSED = ("from_file", "as_strided", "set", "resize", "empty_strided", "new_empty_strided")


@lru_cache(maxsize=4096)
def operator_named(name: str) -> torch._ops.OpOverload:
    """An operator by its schema's name, ``aten::add.Tensor``.

    Raises:
        ValueError: there is none, or it does more than compute its results.
    """
    space, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    if space not in ("aten", "cnnlstm_fast") or not base.isidentifier():
        raise ValueError(f"a frozen program has no operator {name!r}")
    try:
        found = getattr(getattr(getattr(torch.ops, space), base), overload or "default")
        schema = found._schema
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"there is no operator {name!r}") from error
    if schema.is_mutable or (torch.Tag.nondeterministic_seeded in found.tags and "dropout" not in base):
        raise ValueError(f"a frozen program has no operator {name!r}")
    private = base.startswith("_") and base not in _PRIVATE
    if private or base in _REFUSED or not all("Tensor" in str(r.type) for r in schema.returns):
        raise ValueError(f"a frozen program has no operator {name!r}")
    return found


# ---- Constants


def compute_constants(program: dict, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values of all constants, those of the prelude included.

    Args:
        values: of the names in ``state`` and ``tensors``.
    """
    values = {name: t.detach() for name, t in values.items()}
    with torch.no_grad():
        for node in program["prelude"]:
            run_in_python(node, values, {})
    return values


def run_in_python(node: Node, values: dict[str, Any], numbers: dict[str, int]) -> None:
    """Run one node by PyTorch's operators; its results go to ``values``."""
    if node["op"] == "folded":
        tensors = [None if name is None else values[name] for name in node["of"]]
        values[node["out"]] = fold(node["part"], tensors, node["eps"])
        return
    found = operator_named(node["name"])
    args, kwargs = [], {}
    for parameter, given in zip(found._schema.arguments, node["args"], strict=True):
        value = _python_argument(given, values, numbers)
        if parameter.kwarg_only:
            kwargs[parameter.name] = value
        else:
            args.append(value)
    results = found(*args, **kwargs)
    outs = node["out"]
    if len(outs) == 1 and isinstance(outs[0], list):
        outs = outs[0]
    elif len(outs) == 1:
        results = [results]
    for name, result in zip(outs, results, strict=True):
        if name is not None:
            values[name] = result


def _python_argument(given: Any, values: dict[str, Any], numbers: dict[str, int]) -> Any:
    if isinstance(given, list):
        return [_python_argument(g, values, numbers) for g in given]
    if not isinstance(given, dict):
        return given
    ((kind, value),) = given.items()
    if kind == "ref":
        return numbers[value] if value in numbers else values[value]
    if kind == "device":
        return torch.device(value)
    if kind == "dtype":
        return dtype_named(value)
    if kind == "memory_format" and value in _FORMATS:
        return getattr(torch, value)
    if given == {"layout": "strided"}:
        return torch.strided
    raise ValueError(f"a frozen program has no argument {given!r}")


def dtype_named(name: str) -> torch.dtype:
    """A dtype by its name without ``torch.``.

    Raises:
        ValueError: there is none, or frozen programs have none of it.
    """
    if name not in _DTYPES:
        raise ValueError(f"a frozen program has no dtype {name!r}")
    return getattr(torch, name)


# ---- Code


def _list(values: Sequence[int]) -> list[int]:
    return [len(values), *values]


class _Encoder:
    """One stretch of nodes as the code of :mod:`cnnlstm_fast.ops.program`."""

    def __init__(self, constants: dict[str, Tensor], inputs: Sequence[str], int8: bool = False):
        self.int8 = int8
        self.floats: list[float] = []
        self.names: list[str] = []
        self.constants = constants
        self.inputs = list(inputs)
        self.slots = {name: i for i, name in enumerate([*constants, *inputs])}
        self.ints: dict[str, int] = {}
        self.code: list[int] = []
        self.count = 0

    def program(self, nodes: Sequence[Node], outputs: Sequence[str]) -> tuple:
        for node in nodes:
            self.count += 1
            self.code.append(op.KINDS.index(self._kind(node)))
            self.code += getattr(self, "_" + node["op"])(node)
        code = [op.VERSION, len(self.slots), len(self.ints), len(self.inputs), self.count, *self.code]
        code += _list([self.slots[name] for name in outputs])
        return code, self.floats, self.names, list(self.constants.values())

    def _kind(self, node: Node) -> str:
        if node["op"] == "linear" and self._in_int8(node):
            return "int8 linear"
        return "recurrent" if node["op"] == "stack" else node["op"]

    def _in_int8(self, node: Node) -> bool:
        return self.int8 and why_not_int8(node, self.constants) is None

    def _float(self, value: float) -> int:
        self.floats.append(float(value))
        return len(self.floats) - 1

    def _act(self, node: Node) -> list[int]:
        """The numbers of an activation; a text names the weight that is one."""
        values = [self.constants[a].item() if isinstance(a, str) else a for a in node["act"]]
        return _list([self._float(value) for value in values])

    def _text(self, value: str) -> int:
        self.names.append(value)
        return len(self.names) - 1

    def _number(self, value: int | str) -> list[int]:
        return [1, self.ints[value]] if isinstance(value, str) else [0, min(value, _LARGEST)]

    def _numbers(self, values: Sequence[int | str]) -> list[int]:
        return [len(values), *(part for value in values for part in self._number(value))]

    def _read(self, name: str | None) -> int:
        return -1 if name is None else self.slots[name]

    def _written(self, name: str | None) -> int:
        return -1 if name is None else self.slots.setdefault(name, len(self.slots))

    def _arithmetic(self, node: Node) -> list[int]:
        kind = op.ARITHMETIC.index(node["kind"])
        to = self.ints.setdefault(node["out"], len(self.ints))
        if node["kind"] == "size":
            return [kind, self.slots[node["of"]], node["dim"], to]
        return [kind, *self._number(node["a"]), *self._number(node["b"]), to]

    def _view(self, node: Node) -> list[int]:
        kind, x = op.VIEWS.index(node["kind"]), self.slots[node["x"]]
        return [kind, x, *self._numbers(node["numbers"]), self._written(node["out"])]

    def _block(self, node: Node) -> list[int]:
        plans = [
            part
            for positions, plan in node["plans"]
            for part in (self._float(positions), op.BLOCK_PLANS[plan])
        ]
        return [
            self.slots[node["x"]], self.slots[node["weight"]], self._read(node["bias"]),
            self._read(node["added"]), int(node["signal"]),
            *_list(node["conv"]), ACTIVATIONS[node["activation"]],
            *self._act(node), *_list(node["pool"]), *_list(node["order"]),
            len(node["plans"]), *plans, self._written(node["out"]),
        ]  # fmt: skip

    def _recurrent(self, node: Node) -> list[int]:
        return self._stack({**node, "layers": [node], "keep": node["keep"]})

    def _stack(self, node: Node) -> list[int]:
        given = [self._read(node.get(key)) for key in ("x", "keep", "reset", "lengths")]
        code = [*given, node["mode"], int(node["batch_first"]), len(node["layers"])]
        for layer in node["layers"]:
            weights = layer["weights"]
            directions = 1 if weights[5] is None else 2
            code += [
                self._read(layer["h0"]), self._read(layer["c0"]), layer["layer"], directions,
                *(self._read(w) for w in weights[: 5 * directions]), int(self._in_int8(layer)),
            ]  # fmt: skip
        states = [name for layer in node["layers"] for name in layer["out"][1:]]
        return code + [self._written(name) for name in (node["layers"][-1]["out"][0], *states)]

    def _sum(self, node: Node) -> list[int]:
        a, b, times = self.slots[node["a"]], self.slots[node["b"]], self._float(node["times"])
        return [a, b, times, self._written(node["out"])]

    def _linear(self, node: Node) -> list[int]:
        return [
            self.slots[node["x"]], self.slots[node["weight"]], self._read(node["bias"]),
            ACTIVATIONS[node["activation"]], *self._act(node),
            self._written(node["out"]),
        ]  # fmt: skip

    def _call(self, node: Node) -> list[int]:
        schema = operator_named(node["name"])._schema
        name, _, overload = node["name"].partition(".")
        code = [self._text(name), self._text(overload), len(node["args"])]
        for parameter, given in zip(schema.arguments, node["args"], strict=True):
            code += self._argument(str(parameter.real_type), given)
        code.append(len(node["out"]))
        for out in node["out"]:
            if isinstance(out, list):
                code += [1, len(out), *map(self._written, out)]
            else:
                code += [0, self._written(out)]
        return code

    def _argument(self, kind: str, given: Any) -> list[int]:
        optional = int(kind.startswith("Optional["))
        if optional:
            kind = kind[9:-1]
        if given is None:
            return [op.ARGUMENTS.index("null"), 1]
        name, value = self._plain(kind, given)
        return [op.ARGUMENTS.index(name), optional, *value]

    def _plain(self, kind: str, given: Any) -> tuple[str, list[int]]:
        named = isinstance(given, dict)
        if kind == "Tensor":
            return "tensor", [self.slots[given["ref"]]]
        if kind == "List[Tensor]":
            return "tensors", _list([self.slots[g["ref"]] for g in given])
        if kind == "List[Optional[Tensor]]":
            return "maybe_tensors", _list([-1 if g is None else self.slots[g["ref"]] for g in given])
        if kind in ("int", "SymInt"):
            return "int", self._number(given["ref"] if named else int(given))
        if kind in ("List[int]", "List[SymInt]"):
            values = given if isinstance(given, list) else [given]
            return "ints", self._numbers([v["ref"] if isinstance(v, dict) else v for v in values])
        if kind == "float":
            return "float", [self._float(given)]
        if kind == "bool":
            return "bool", [int(given)]
        if kind == "str":
            return "string", [self._text(given)]
        if kind == "List[float]":
            return "floats", _list([self._float(g) for g in given])
        if kind == "List[bool]":
            return "bools", _list([int(g) for g in given])
        if kind == "ScalarType":
            return "dtype", [_DTYPES[given["dtype"]]]
        if kind == "Layout" and given == {"layout": "strided"}:
            return "layout", []
        if kind == "Device" and given == {"device": "cpu"}:
            return "device", []
        if kind == "MemoryFormat":
            return "memory_format", [_FORMATS[given["memory_format"]]]
        raise ValueError(f"the interpreter of programs has no {kind}")


def can_encode(node: Node) -> bool:
    """Whether the op can run this node."""
    if node["op"] != "call":
        return node["op"] != "python"
    probe = _Encoder({}, [])
    probe.slots = collections.defaultdict(int)
    probe.ints = collections.defaultdict(int)
    try:
        probe._call(node)
    except ValueError:
        return False
    return True


# ---- Stretches of nodes


class Compiled(NamedTuple):
    """A stretch of nodes as a program of the op."""

    number: int
    inputs: list[str]
    outputs: list[str]


class InPython(NamedTuple):
    """One node that runs in Python, and the nodes of sizes that it reads."""

    node: Node
    sizes: list[Node]


class Program:
    """A program that can be run.

    Args:
        program: as :mod:`cnnlstm_fast.freeze.lower` says; blocks have ``plans``.
        values: of the names in ``state`` and ``tensors``.
        int8: whether weights of linear and recurrent layers are packed in int8.
    """

    def __init__(self, program: dict, values: dict[str, Tensor], int8: bool = False):
        self.program, self.int8 = program, int8
        constants = compute_constants(program, values)
        read = set(names_in([program["nodes"], program["outputs"]]))
        constants = {name: t for name, t in constants.items() if name in read}
        self.constants = constants
        self.stretches: list[Compiled | InPython] = list(self._cut(program["nodes"], constants))
        first = self.stretches[0] if len(self.stretches) == 1 else None
        #: The number of the op's program, where that is all.
        self.whole: int | None = None
        if isinstance(first, Compiled) and first.inputs == program["inputs"]:
            self.whole = first.number
        numbers = [s.number for s in self.stretches if isinstance(s, Compiled)]
        weakref.finalize(self, _free, numbers)

    def in_float32(self) -> Program:
        """The same program with nothing in int8: what can be compared with the model."""
        return Program({**self.program, "prelude": []}, self.constants) if self.int8 else self

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """The results, in the order of ``outputs``."""
        if self.whole is not None:
            return op.run_op(self.whole, inputs)
        values: dict[str, Tensor] = {
            **self.constants,
            **dict(zip(self.program["inputs"], inputs, strict=True)),
        }
        for stretch in self.stretches:
            if isinstance(stretch, Compiled):
                found = op.run_op(stretch.number, [values[name] for name in stretch.inputs])
                values.update(zip(stretch.outputs, found, strict=True))
            else:
                numbers: dict[str, int] = {}
                for size in stretch.sizes:
                    numbers[size["out"]] = _number_of(size, values, numbers)
                run_in_python(stretch.node, values, numbers)
        return [values[name] for name in self.program["outputs"]]

    def _cut(self, nodes: Sequence[Node], constants: dict[str, Tensor]) -> Iterator[Compiled | InPython]:
        sizes = {node["out"]: node for node in nodes if node["op"] == "arithmetic"}
        others = [node for node in nodes if node["op"] != "arithmetic"]
        known = list(self.program["inputs"])
        runs: list[list[Node]] = [[]]
        for node in others:
            if can_encode(node):
                runs[-1].append(node)
            else:
                runs += [[node], []]
        for i, run in enumerate(runs):
            if i % 2:
                yield InPython(run[0], _sizes_for(run, sizes))
            elif run or len(runs) == 1:
                later = {name for other in runs[i + 1 :] for name in _read_by(other, sizes)}
                later.update(self.program["outputs"])
                yield self._compile(run, sizes, constants, known, later, len(runs) == 1)
            known += [name for node in run for name in results_of(node)]

    def _compile(self, run, sizes, constants, known, later, alone) -> Compiled:
        """One run of nodes; ``later`` are names that others read."""
        if alone:
            inputs, outputs = self.program["inputs"], self.program["outputs"]
        else:
            read = _read_by(run, sizes)
            inputs = [name for name in known if name in read]
            outputs = [name for node in run for name in results_of(node) if name in later]
        read = {*_read_by(run, sizes), *outputs}
        used = {name: t for name, t in constants.items() if name in read}
        encoder = _Encoder(used, inputs, self.int8)
        encoded = encoder.program(list(_with_sizes(join_layers(run, later), sizes)), outputs)
        return Compiled(op.new_op(*encoded), list(inputs), list(outputs))


def _sizes_for(nodes: Sequence[Node], sizes: dict[str, Node]) -> list[Node]:
    """The nodes of sizes that some nodes need, in order."""
    needed: set[str] = set()
    waiting = [name for node in nodes for name in names_in(node) if name in sizes]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += [other for other in names_in(sizes[name]) if other in sizes]
    return [node for name, node in sizes.items() if name in needed]


def _read_by(nodes: Sequence[Node], sizes: dict[str, Node]) -> set[str]:
    """Names that occur in some nodes and in the sizes that they need."""
    return {name for node in [*nodes, *_sizes_for(nodes, sizes)] for name in names_in(node)}


def _with_sizes(nodes: Sequence[Node], sizes: dict[str, Node]) -> Iterator[Node]:
    """Some nodes, each size before its first reader."""
    done: set[str] = set()
    for node in nodes:
        for size in _sizes_for([node], sizes):
            if size["out"] not in done:
                done.add(size["out"])
                yield size
        yield node


_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "max": max, "min": min,
}  # fmt: skip


def _number_of(node: Node, values: dict[str, Tensor], numbers: dict[str, int]) -> int:
    if node["kind"] == "size":
        return values[node["of"]].shape[node["dim"]]
    a, b = (numbers[v] if isinstance(v, str) else v for v in (node["a"], node["b"]))
    return _OPERATIONS[node["kind"]](a, b)


def _free(numbers: list[int]) -> None:
    for number in numbers:
        op.free_op(number)
