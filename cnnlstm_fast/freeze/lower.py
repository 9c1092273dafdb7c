"""From a captured graph to a frozen program's nodes, which are plain data: a file keeps them as they are.

A program is a dict:

- ``inputs``: names of its inputs. Every value has a name.
- ``state``: by name, keys of the model's state. ``tensors``: names of other constants, whose values stand
  beside the program. ``prelude``: nodes that compute constants from constants, once.
- ``nodes``: in order. ``outputs``: names of the results. ``time``: what a stream carries
  (:mod:`cnnlstm_fast.freeze.time_axis`).

A node is a dict with ``op``, a kind of :data:`cnnlstm_fast.ops.program.KINDS`, ``python`` (a call that the
interpreter of programs cannot make) or ``folded`` (in the prelude). In its numbers a name stands for a number
that an earlier node computes, in ``act`` for a constant of one element. Of a call, ``args`` are those of its
schema, in order: ``{"ref": name}`` is a value, ``{"dtype": ...}`` and the like are what they say.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from cnnlstm_fast.freeze.capture import Capture
from cnnlstm_fast.freeze.layouts import result_order
from cnnlstm_fast.freeze.loops import roll_loops
from cnnlstm_fast.freeze.nodes import GraphNode, names_in
from cnnlstm_fast.freeze.passes import (
    VIEWS,
    argument,
    base_of,
    block,
    constant_nodes,
    folded,
    linear,
    optimise,
    recurrent,
    value_of,
)
from cnnlstm_fast.freeze.time_axis import describe_time

aten = torch.ops.aten

_ARITHMETIC = {
    operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.floordiv: "floordiv",
    operator.mod: "mod", torch.sym_max: "max", torch.sym_min: "min",
}  # fmt: skip
#: Operators with a number that are another operator with a tensor of no dimensions.
_BY_TENSOR = {
    aten.mul.Scalar: aten.mul.Tensor, aten.div.Scalar: aten.div.Tensor, aten.eq.Scalar: aten.eq.Tensor,
    aten.ne.Scalar: aten.ne.Tensor, aten.lt.Scalar: aten.lt.Tensor, aten.le.Scalar: aten.le.Tensor,
    aten.gt.Scalar: aten.gt.Tensor, aten.ge.Scalar: aten.ge.Tensor,
    aten.masked_fill.Scalar: aten.masked_fill.Tensor, aten.clamp.default: aten.clamp.Tensor,
    aten.hardtanh.default: aten.clamp.Tensor, aten.clamp_min.default: aten.clamp_min.Tensor,
    aten.clamp_max.default: aten.clamp_max.Tensor,
}  # fmt: skip
_SUMS = {
    aten.add.Tensor: 1.0, aten.add.Scalar: 1.0, aten.sub.Tensor: -1.0, aten.sub.Scalar: -1.0,
}  # fmt: skip
#: Asserts of sizes: guards check them.
_IGNORED = {
    "_assert_scalar",
    "_assert_tensor_metadata",
    "sym_constrain_range_for_size",
    "sym_constrain_range",
}
_LARGEST = 2**63 - 1


class NotLowered(Exception):
    """Why a graph is no program, in words."""


def lower(captured: Capture) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The program of a graph, and the values of its other constants.

    Raises:
        NotLowered: a node has no counterpart.
    """
    graph = captured.graph
    optimise(graph, set(captured.constants))
    roll_loops(graph)
    return _Lowering(captured).run()


class _Lowering:
    def __init__(self, captured: Capture):
        self.captured = captured
        self.constant = constant_nodes(captured.graph, set(captured.constants))
        self.nodes: list[dict] = []
        self.prelude: list[dict] = []
        self.state: dict[str, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.layers: dict[tuple, int] = {}
        self.fresh = 0

    def run(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        for name, value in self.captured.constants.items():
            if isinstance(value, str):
                self.state[name] = value
            else:
                self.tensors[name] = value.detach().clone()
        for node in self.captured.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op != "call_function":
                raise NotLowered(f"its graph has a {node.op}")
            if node.target is operator.getitem or getattr(node.target, "_opname", "") in _IGNORED:
                continue
            if node in self.constant:
                self._constant(node)
            else:
                self._node(node)
        (output,) = (node for node in self.captured.graph.nodes if node.op == "output")
        results = [
            r for r in output.args[0] if isinstance(r, fx.Node) and isinstance(r.meta.get("val"), Tensor)
        ]
        names = {result: self._output(result) for result in dict.fromkeys(results)}
        outputs = [names[result] for result in results]
        program = {
            "inputs": list(self.captured.inputs),
            "state": self.state,
            "prelude": self.prelude,
            "nodes": self.nodes,
            "outputs": outputs,
            "time": describe_time(self.captured.graph, self.captured.inputs, results),
        }
        used = set(names_in([self.prelude, self.nodes, outputs]))
        program["state"] = {name: key for name, key in self.state.items() if name in used}
        self.tensors = {name: t for name, t in self.tensors.items() if name in used}
        return program, self.tensors

    # ---- parts of nodes

    def _name(self, hint: str) -> str:
        self.fresh += 1
        return f"{hint}.{self.fresh}"

    def _number(self, value: Any) -> int | str:
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, bool) or not isinstance(value, int):
            raise NotLowered(f"got {value!r} for a size")
        return value

    def _results(self, node: GraphNode) -> list:
        """Names of a node's results, None for those that nobody reads; a list in it is a list of tensors."""
        returns = node.target._schema.returns
        lists = len(returns) == 1 and str(returns[0].type) == "List[Tensor]"
        if len(returns) == 1 and not lists:
            return [node.name]
        value = node.meta.get("val")
        if not isinstance(value, (tuple, list)):
            raise NotLowered(f"{node.target} gives a {type(value).__name__}")
        names: list[str | None] = [None] * len(value)
        for user in node.users:
            if user.target is not operator.getitem or type(user.args[1]) is not int:
                raise NotLowered(f"a list of {node.target} is passed on")
            first = names[user.args[1]]
            if first is not None:  # the same element twice
                user.replace_all_uses_with(next(u for u in node.users if u.name == first))
            else:
                names[user.args[1]] = user.name
        return [names] if lists else names

    def _argument(self, value: Any, kind: str, like: Tensor | None) -> Any:
        """An argument as data; where the schema wants a tensor and a number is given, a constant."""
        if isinstance(value, fx.Node):
            return {"ref": value.name}
        if value is None:
            return None
        if kind in ("Tensor", "Optional[Tensor]") and isinstance(value, (bool, int, float)):
            return {"ref": self._scalar(value, like)}
        if isinstance(value, (list, tuple)):
            return [self._argument(v, "Tensor" if "Tensor" in kind else "", like) for v in value]
        if isinstance(value, torch.dtype):
            return {"dtype": str(value)[6:]}
        if isinstance(value, torch.layout):
            return {"layout": str(value)[6:]}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, torch.memory_format):
            return {"memory_format": str(value)[6:]}
        if isinstance(value, (bool, int, float, str)):
            return value
        raise NotLowered(f"got {value!r} as an argument")

    def _scalar(self, value: float, like: Tensor | None) -> str:
        """The name of a constant of no dimensions that acts as a number does beside ``like``."""
        dtype: torch.dtype | None = None
        if isinstance(value, float) or (like is not None and like.dtype.is_floating_point):
            dtype = (
                like.dtype if like is not None and like.dtype.is_floating_point else torch.get_default_dtype()
            )
        name = self._name("number")
        self.tensors[name] = torch.tensor(value, dtype=dtype)
        return name

    # ---- nodes

    def _constant(self, node: GraphNode) -> None:
        if node.target is folded:
            part, *tensors, eps = node.args
            names = [None if t is None else t.name for t in tensors]
            self.prelude.append({"op": "folded", "part": part, "of": names, "eps": eps, "out": node.name})
        elif not isinstance(node.target, torch._ops.OpOverload):
            raise NotLowered(f"{node.target} computes a constant")
        else:
            self.prelude.append(self._call(node, node.target, node.args, node.kwargs))

    def _node(self, node: GraphNode) -> None:
        target = node.target
        if target in _ARITHMETIC:
            a, b = map(self._number, node.args)
            self._append("arithmetic", node.name, kind=_ARITHMETIC[target], a=a, b=b)
        elif target is aten.sym_size.int:
            self._append("arithmetic", node.name, kind="size", of=node.args[0].name, dim=node.args[1])
        elif target is block:
            self._block(node)
        elif target is linear:
            self._linear(node)
        elif target is recurrent:
            self._recurrent(node)
        elif not isinstance(target, torch._ops.OpOverload):
            raise NotLowered(f"{target} computes a size")
        elif not self._view(node) and not self._sum(node):
            self._other(node)

    def _append(self, op: str, out: str | list[str], **fields: Any) -> None:
        self.nodes.append({"op": op, **fields, "out": out})

    def _block(self, node: GraphNode) -> None:
        x, weight, bias, added = node.args
        self._append(
            "block", node.name, x=x.name, weight=weight.name, bias=None if bias is None else bias.name,
            added=None if added is None else added.name, order=result_order(node), **_options(node),
        )  # fmt: skip

    def _linear(self, node: GraphNode) -> None:
        x, weight, bias = node.args
        bias = None if bias is None else bias.name
        self._append("linear", node.name, x=x.name, weight=weight.name, bias=bias, **_options(node))

    def _recurrent(self, node: GraphNode) -> None:
        x, h0, c0, reset, lengths, weights, mode, batch_first, keep = node.args
        names = [None if w is None else w.name for w in weights]
        number = self.layers.setdefault(tuple(names), len(self.layers))
        outs: list[str | None] = [None] * 4
        for user in node.users:
            outs[user.args[1]] = user.name
        given = {
            key: None if t is None else t.name
            for key, t in (("h0", h0), ("c0", c0), ("reset", reset), ("lengths", lengths), ("keep", keep))
        }
        self.nodes.append(
            {"op": "recurrent", "from": node.name, "x": x.name, **given, "weights": names, "layer": number,
             "mode": mode, "batch_first": batch_first, "out": outs[:3]}
        )  # fmt: skip

    def _view(self, node: GraphNode) -> bool:
        """Whether the node is a view, or a copy that only orders memory."""
        target, args = node.target, node.args
        if target is aten.clone.default or target is aten.contiguous.default:
            format = torch.contiguous_format if target is aten.contiguous.default else None
            ordered = node.kwargs.get("memory_format", format) is torch.contiguous_format
            base = base_of(node.args[0])
            if not ordered or base.op == "placeholder" or base in self.constant:
                return False
            self._append("view", node.name, kind="contiguous", x=args[0].name, numbers=[])
            return True
        if target not in VIEWS:
            return False
        x, rank = args[0], value_of(args[0]).dim()
        shape = list(value_of(node).shape)
        kind, numbers = "reshape", []
        if target in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
            numbers = list(args[1])
        elif target in (aten.permute.default, aten.transpose.int, aten.t.default):
            kind, numbers = "permute", _permutation(node, rank)
        elif target is aten.select.int:
            kind, numbers = "select", [args[1], args[2]]
        elif target is aten.slice.Tensor:
            start, end = argument(node, 2, "start"), argument(node, 3, "end")
            kind = "slice"
            numbers = [
                argument(node, 1, "dim", 0), 0 if start is None else start, _LARGEST if end is None else end,
                argument(node, 4, "step", 1),
            ]  # fmt: skip
        elif target in (aten.squeeze.dim, aten.squeeze.dims):
            kind, numbers = "squeeze", [args[1]] if type(args[1]) is int else list(args[1])
        elif target is aten.squeeze.default:
            kind, numbers = "squeeze", list(range(rank))
        elif target is aten.unsqueeze.default:
            kind, numbers = "unsqueeze", [args[1]]
        elif target is aten.expand.default:
            kind, numbers = "expand", list(args[1])
        elif target in (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default):
            kind, numbers = "permute", list(range(rank))
        elif all(type(s) is int for s in shape):
            numbers = shape
        else:
            return False
        numbers = [self._number(n) for n in numbers]
        self._append("view", node.name, kind=kind, x=x.name, numbers=numbers)
        return True

    def _sum(self, node: GraphNode) -> bool:
        """Whether the node is a sum of tensors that are not of bools."""
        if node.target is aten.rsub.Scalar and len(node.args) == 2 and isinstance(node.args[1], (int, float)):
            x = value_of(node.args[0])
            if x.dtype is torch.bool:
                return False
            name = self._scalar(node.args[1], x)
            self._append("sum", node.name, a=name, b=node.args[0].name, times=-1.0)
            return True
        sign = _SUMS.get(node.target)
        if sign is None:
            return False
        a, b = node.args[:2]
        times = argument(node, 2, "alpha", 1)
        if not isinstance(times, (int, float)) or not isinstance(a, fx.Node):
            return False
        value = value_of(a)
        if torch.bool in (value.dtype, value_of(b).dtype if isinstance(b, fx.Node) else None):
            return False
        if not isinstance(b, fx.Node) and not isinstance(b, (int, float)):
            return False
        name = b.name if isinstance(b, fx.Node) else self._scalar(b, value)
        if isinstance(b, fx.Node) and not isinstance(b.meta.get("val"), Tensor):
            return False
        self._append("sum", node.name, a=a.name, b=name, times=float(sign * times))
        return True

    def _other(self, node: GraphNode) -> None:
        target, args, kwargs = node.target, node.args, dict(node.kwargs)
        if target is aten.leaky_relu.default:
            self._leaky_relu(node)
            return
        if target is aten.constant_pad_nd.default:
            target, args = aten.pad.default, (*args[:2], "constant", float(argument(node, 2, "value", 0)))
        if target is aten.pow.Tensor_Scalar and args[1] == 2:
            target, args = aten.mul.Tensor, (args[0], args[0])
        elif target is aten.hardtanh.default:
            target, args = (
                aten.clamp.Tensor,
                (args[0], argument(node, 1, "min_val", -1), argument(node, 2, "max_val", 1)),
            )
            kwargs = {}
        elif target in _BY_TENSOR and all(
            not isinstance(a, fx.Node) for a in args[1:] if target is not aten.masked_fill.Scalar
        ):
            target = _BY_TENSOR[target]
        self.nodes.append(self._call(node, target, args, kwargs))

    def _leaky_relu(self, node: GraphNode) -> None:
        """``where(x > 0, x, slope * x)``."""
        x = node.args[0]
        like = value_of(x)
        zero, slope = (
            self._scalar(0.0, like),
            self._scalar(float(argument(node, 1, "negative_slope", 0.01)), like),
        )
        above, below = self._name(node.name), self._name(node.name)
        for name, inputs, out in (
            ("aten::gt.Tensor", [x.name, zero], above),
            ("aten::mul.Tensor", [x.name, slope], below),
            ("aten::where.self", [above, x.name, below], node.name),
        ):
            self.nodes.append(
                {"op": "call", "name": name, "args": [{"ref": i} for i in inputs], "out": [out]}
            )

    def _call(self, node: GraphNode, target: Any, args: tuple, kwargs: dict) -> dict:
        schema = target._schema
        like = next(
            (value_of(a) for a in args if isinstance(a, fx.Node) and isinstance(value_of(a), Tensor)), None
        )
        if schema.is_mutable:
            raise NotLowered(f"{target} writes to its arguments")
        given, python = [], False
        for i, parameter in enumerate(schema.arguments):
            if i < len(args) and not parameter.kwarg_only:
                value = args[i]
            elif parameter.name in kwargs:
                value = kwargs[parameter.name]
            else:
                value = parameter.default_value
                if value is not None and "ScalarType" in str(parameter.real_type):
                    raise NotLowered(f"{target} has a default dtype")
            kind = str(parameter.real_type)
            python |= "number" in kind and value is not None and value != []
            given.append(self._argument(value, kind, like))
        return {
            "op": "python" if python else "call",
            "name": schema.name + ("." + schema.overload_name if schema.overload_name else ""),
            "args": given,
            "out": self._results(node),
        }

    def _output(self, node: GraphNode) -> str:
        """A result, ordered in memory as PyTorch would have it."""
        value, base = node.meta["val"], base_of(node)
        if base in self.constant:  # a caller may write to what it gets
            name = self._name(node.name)
            self._append("call", [name], name="aten::clone", args=[{"ref": node.name}, None])
            return name
        if value.dim() < 3 or base.op == "placeholder" or base.target is recurrent:
            return node.name
        strides = list(value.stride())
        hints = [int(s.node.hint) if isinstance(s, torch.SymInt) else int(s) for s in strides]
        if 0 in hints:
            return node.name
        order = sorted(range(value.dim()), key=lambda i: -hints[i])
        inverse = [order.index(i) for i in range(value.dim())]
        name = node.name
        for kind, numbers in (("permute", order), ("contiguous", []), ("permute", inverse)):
            out = self._name(node.name)
            self._append("view", out, kind=kind, x=name, numbers=numbers)
            name = out
        return name


def _options(node: GraphNode) -> dict[str, Any]:
    """What a block or a linear layer is beside its tensors, as data."""
    act = [a.name if isinstance(a, fx.Node) else a for a in node.kwargs["act"]]
    return {**node.kwargs, "act": act}


def _permutation(node: GraphNode, rank: int) -> list[int]:
    if node.target is aten.permute.default:
        return list(node.args[1])
    order = list(range(rank))
    if node.target is aten.t.default:
        return order[::-1]
    i, j = (d % rank for d in node.args[1:3])
    order[i], order[j] = j, i
    return order
