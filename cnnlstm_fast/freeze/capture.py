"""A model's program as a graph: ``torch.export`` on a copy whose recurrent layers are this package's.

Recurrent layers are one node for all steps, so that the number of steps stays open, as all sizes do that the
model does not fix. What was decided by a size while the model was captured is a guard.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cnnlstm_fast.freeze.nodes import Graph, GraphNode
from cnnlstm_fast.freeze.sizes import Sizes
from cnnlstm_fast.planning import capturing

#: Guards that sizes of 0 and 1 break, which export takes for special: whether the program holds for them is
#: tried.
_ABOUT_ONE = re.compile(r"(!=|(>|>=) [012]$|^[01] < |^[012] <= )")


class NotCaptured(Exception):
    """Why a model has no graph, in words."""


class Capture(NamedTuple):
    """A model's graph for inputs of some ranks and dtypes.

    Attributes:
        graph: operators without side effects; placeholders are the constants and the inputs.
        constants: placeholders of parameters, buffers and other tensors, by name: a key of the state or a
        tensor. inputs: names of the placeholders of the tensors among the arguments, in order.
        sizes: what must hold for the sizes of the inputs, and what they are called.
        results: nodes, numbers and other values, in the order of ``out_spec``.
        out_spec: how the results lie in tuples, lists and dicts.
    """

    graph: Graph
    constants: dict[str, str | Tensor]
    inputs: list[str]
    sizes: Sizes
    results: list[Any]
    out_spec: pytree.TreeSpec


def tensors_of(args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors among the arguments of a call, in order."""
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def capture(model: nn.Module, args: tuple, kwargs: dict) -> Capture:
    """The graph of a call.

    Args:
        model: in eval mode, on the CPU.
        args, kwargs: of the call.

    Raises:
        NotCaptured: the model has side effects, or its program depends on values.
    """
    _check_hooks(model)
    fixed: set[tuple[int, int]] = set()
    while True:
        opened, kwargs_opened, larger = _with_open_sizes(model, args, kwargs, fixed)
        program = _exported(model, opened, kwargs_opened)
        again = {at for at in larger if _is_fixed(program, *at)}
        if not again and not _takes(program, args, kwargs):
            again = set(larger)
        if not again:
            break
        # Sizes that the model fixes, as a loop over steps does, or decides by, are those of the call.
        fixed |= again
    signature = program.graph_signature
    if signature.buffers_to_mutate or getattr(signature, "user_inputs_to_mutate", None):
        raise NotCaptured("it writes to its buffers or inputs")
    if getattr(signature, "parameters_to_mutate", None):
        raise NotCaptured("it writes to its parameters")
    constants: dict[str, str | Tensor] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for name, key in signature.inputs_to_lifted_tensor_constants.items():
        constants[name] = program.constants[key]
    inputs = _inputs_of(program)
    if len(inputs) != len(tensors_of(args, kwargs)):
        raise NotCaptured("a number among its arguments is part of the graph")
    _check_nodes(program.graph)
    (output,) = [n for n in program.graph.nodes if n.op == "output"]
    sizes = _sizes([node.meta["val"] for node in inputs])
    out_spec = program.call_spec.out_spec
    if out_spec is None:
        raise NotCaptured("its results have no structure")
    return Capture(
        program.graph, constants, [node.name for node in inputs], sizes, list(output.args[0]), out_spec
    )


def _exported(model: nn.Module, args: tuple, kwargs: dict) -> torch.export.ExportedProgram:
    try:
        with _quiet(), torch.no_grad(), capturing.on(), _OpenPools():
            shapes = _all_open(model, args, kwargs)
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            return exported.run_decompositions({})
    except Exception as error:  # whatever export and the model raise
        raise NotCaptured(f"torch.export: {_first_line(error)}") from error


class _OpenPools(TorchFunctionMode):
    """Max pools of signals as pools of images of one row: export fixes the sizes of the former."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = dict(zip(_POOL_ARGUMENTS, args, strict=False)) | (kwargs or {})
        if function in (torch.max_pool1d, F.max_pool1d) and not given.pop("return_indices", False):
            x = given.pop("input")
            rest = {name: _of_row(name, value) for name, value in given.items() if value is not None}
            return torch.max_pool2d(x.unsqueeze(-2), **rest).squeeze(-2)
        return function(*args, **(kwargs or {}))


_POOL_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")


def _of_row(name: str, value: Any) -> Any:
    if name == "ceil_mode" or value in ([], ()):
        return value
    (value,) = value if isinstance(value, (tuple, list)) else (value,)
    return [0 if name == "padding" else 1, value]


def _inputs_of(program: torch.export.ExportedProgram) -> list[GraphNode]:
    """The placeholders of the tensors among the arguments, in order."""
    by_name = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    names = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    return [by_name[name] for name in names if isinstance(by_name[name].meta.get("val"), Tensor)]


def _is_fixed(program: torch.export.ExportedProgram, tensor: int, dim: int) -> bool:
    """Whether the graph is of one size of a dimension."""
    size = _inputs_of(program)[tensor].meta["val"].shape[dim]
    if not isinstance(size, torch.SymInt):
        return True
    return bool(size.node.shape_env.replace(size.node.expr).is_number)


def _takes(program: torch.export.ExportedProgram, args: tuple, kwargs: dict) -> bool:
    """Whether a graph, which may be of larger sizes, is one for this call, too."""
    sizes = _sizes([node.meta["val"] for node in _inputs_of(program)])
    return sizes.checker().values([t.shape for t in tensors_of(args, kwargs)]) is not None


def _check_hooks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise NotCaptured(f"{name or 'the model'} has a forward hook")
    if torch.nn.modules.module._has_any_global_hook():
        raise NotCaptured("there are hooks on all modules")


def _check_nodes(graph: Graph) -> None:
    """Raise where a node's result is not the same at each call."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise NotCaptured(f"its graph has a {node.target.name()}")
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags and not _draws_nothing(node):
            raise NotCaptured(f"{node.target} draws random numbers")


def _draws_nothing(node: GraphNode) -> bool:
    return "dropout" in str(node.target) and node.args[-1] is False


def _all_open(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """For each argument of the model's forward that every size of its tensors is open."""

    def of(leaf):
        return {i: torch.export.Dim.AUTO for i in range(leaf.dim())} if isinstance(leaf, Tensor) else None

    signature = inspect.signature(model.forward)
    given = signature.bind(*args, **kwargs).arguments
    found = {}
    for name, value in given.items():
        shapes = pytree.tree_map(of, value)
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            found.update(shapes)
        else:
            found[name] = shapes
    return found


def _with_open_sizes(
    model: nn.Module, args: tuple, kwargs: dict, fixed: set[tuple[int, int]]
) -> tuple[tuple, dict, list[tuple[int, int]]]:
    """The arguments with sizes of 1 made larger where the model takes that: export fixes sizes of 1.

    First one dimension of all tensors that have it of size 1, then that of single tensors.

    Args:
        fixed: pairs of a tensor's place and a dimension that stay as they are.

    Returns:
        The arguments, and the pairs that became larger.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    larger: list[tuple[int, int]] = []
    for dim in range(max((leaves[i].dim() for i in places), default=0)):
        ones = [
            n for n, i in enumerate(places)
            if leaves[i].dim() > dim and leaves[i].shape[dim] == 1 and (n, dim) not in fixed
        ]  # fmt: skip
        for group in dict.fromkeys([tuple(ones), *((n,) for n in ones)]):
            if not group or any((n, dim) in larger for n in group):
                continue
            tried = list(leaves)
            for n in group:
                tried[places[n]] = torch.cat([leaves[places[n]]] * 2, dim)
            args, kwargs = pytree.tree_unflatten(tried, spec)
            try:
                with torch.no_grad():
                    model(*args, **kwargs)
            except Exception:  # the model does not take it
                continue
            leaves = tried
            larger += [(n, dim) for n in group]
    return (*pytree.tree_unflatten(leaves, spec), larger)


def _sizes(values: Sequence[Tensor]) -> Sizes:
    """What the graph says of the sizes of its inputs."""
    from torch.utils._sympy.printers import PythonPrinter

    printer = PythonPrinter()
    shapes: list[list[int | str]] = []
    guards: list[str] = []
    about_one: list[str] = []
    environment = None
    for value in values:
        shape: list[int | str] = []
        for size in value.shape:
            if isinstance(size, torch.SymInt):
                environment = size.node.shape_env
                expression = environment.replace(size.node.expr)
                shape.append(int(expression) if expression.is_number else printer.doprint(expression))
            else:
                shape.append(int(size))
        shapes.append(shape)
    if environment is not None:
        open_names = Sizes(shapes, [], []).names()
        texts, bounds_of = [], []
        for guard in environment.guards:
            expression = environment.replace(guard.expr)  # sizes that turned out to be fixed, or the same
            if expression.free_symbols and {str(s) for s in expression.free_symbols} <= set(open_names):
                texts.append(printer.doprint(expression))
        for symbol, bounds in environment.var_to_range.items():
            if str(symbol) not in open_names:
                continue
            if bounds.lower >= 2:
                bounds_of.append(f"{symbol} >= {bounds.lower}")
            if bounds.upper.is_finite and bounds.upper < 2**31:
                bounds_of.append(f"{symbol} <= {bounds.upper}")
        for text in dict.fromkeys(texts):
            (about_one if _ABOUT_ONE.search(text) else guards).append(text)
        about_one += bounds_of  # those that are more than this follow from a guard
    return Sizes(shapes, guards, about_one)


def size_text(value: Any) -> str:
    """A size of the graph as an expression of the sizes of its inputs."""
    from torch.utils._sympy.printers import PythonPrinter

    return PythonPrinter().doprint(value.node.expr)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what export says about sizes of 1, and the graph that it prints where it fails."""
    loggers = [logging.getLogger(name) for name in ("torch._export", "torch.export", "torch.fx")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stderr(_OthersOnly(sys.stderr)):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


class _OthersOnly(io.TextIOBase):
    """A stream that takes what other threads write."""

    def __init__(self, stream: Any):
        self._stream, self._mine = stream, threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() != self._mine and self._stream is not None:
            self._stream.write(text)
        return len(text)
