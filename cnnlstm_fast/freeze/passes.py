"""What is done once to a captured graph: norms folded, blocks and recurrent layers made one node each.

Works on graphs of :mod:`cnnlstm_fast.freeze.capture`: every operator is without side effects. A fused node
calls one of the functions :func:`block`, :func:`linear`, :func:`recurrent` and :func:`folded`, which stand
for nodes of :mod:`cnnlstm_fast.freeze.program` and are never run.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cnnlstm_fast.freeze.nodes import Graph, GraphNode
from cnnlstm_fast.spec import BYTE_WINDOW, MOST_SIZE

aten = torch.ops.aten


def block(x, weight, bias, added, *, signal, conv, activation, act, pool):
    """A convolution, a sum with ``added`` (of its map's size, or None), an activation and a max pool.

    The other arguments are those of :mod:`cnnlstm_fast.ops.conv_block`.
    """
    raise NotImplementedError


def linear(x, weight, bias, *, activation, act):
    """A linear layer of constant weights and an activation."""
    raise NotImplementedError


def recurrent(x, h0, c0, reset, lengths, weights, mode, batch_first, keep):
    """A recurrent layer of constant weights; the state is multiplied by ``keep`` (T, B) before each step."""
    raise NotImplementedError


def folded(part, weight, bias, gamma, beta, mean, var, eps):
    """The weight or the bias (``part``) of a convolution with the norm behind it."""
    raise NotImplementedError


#: Operators whose result is their first argument's memory, seen otherwise.
VIEWS = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default,
    aten.transpose.int, aten.t.default, aten.select.int, aten.slice.Tensor, aten.squeeze.dim,
    aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default, aten.expand.default, aten.alias.default,
    aten.detach.default, aten.unflatten.int, aten.flatten.using_ints, aten.lift_fresh_copy.default,
}  # fmt: skip

#: Activations by operator: the name in the table of the kernels, and which arguments are its numbers, with
#: defaults.
_ACTIVATIONS: dict[Callable, tuple[str, tuple[tuple[int, float], ...]]] = {
    aten.relu.default: ("relu", ()),
    aten.hardtanh.default: ("hardtanh", ((1, -1.0), (2, 1.0))),
    aten.relu6.default: ("hardtanh", ((9, 0.0), (9, 6.0))),
    aten.leaky_relu.default: ("leaky_relu", ((1, 0.01),)),
    aten.elu.default: ("elu", ((1, 1.0),)),
    aten.tanh.default: ("tanh", ()),
    aten.sigmoid.default: ("sigmoid", ()),
    aten.silu.default: ("silu", ()),
    aten.softplus.default: ("softplus", ((1, 1.0), (2, 20.0))),
    aten.mish.default: ("mish", ()),
    aten.hardswish.default: ("hardswish", ()),
    aten.hardsigmoid.default: ("hardsigmoid", ()),
}

_CONVS = {
    aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv1d.padding: 1, aten.conv2d.padding: 2,
}  # fmt: skip
_POOLS = {aten.max_pool1d.default: 1, aten.max_pool2d.default: 2}
_NORMS = {aten._native_batch_norm_legit_no_training.default}


def optimise(graph: Graph, constants: set[str]) -> None:
    """Fuse and fold what can be, in place.

    Args:
        graph: of :class:`cnnlstm_fast.freeze.capture.Capture`.
        constants: names of the placeholders that are constants.
    """
    _drop_copies(graph)
    _find_signal_pools(graph)
    constant = constant_nodes(graph, constants)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _CONVS:
            _fuse_block(graph, node, constant)
        elif node.target is torch.ops.cnnlstm_fast.recurrent_layer.default:
            _fuse_recurrent(graph, node, constant)
        elif node.target is aten.linear.default:
            _fuse_linear(graph, node, constant)
    graph.eliminate_dead_code()


def constant_nodes(graph: Graph, constants: set[str]) -> set[GraphNode]:
    """All nodes that depend on constants only."""
    found: set[GraphNode] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name in constants:
                found.add(node)
        elif (
            node.op == "call_function"
            and found.issuperset(node.all_input_nodes)
            and (node.all_input_nodes or isinstance(node.meta.get("val"), Tensor))
        ):
            found.add(node)
    return found


def value_of(node: GraphNode) -> Any:
    """An example of a node's result, with open sizes; of several results the first."""
    value = node.meta.get("val")
    return value[0] if isinstance(value, (tuple, list)) else value


def argument(node: GraphNode, at: int, name: str, default: Any = None) -> Any:
    """An argument of a node by its place or name."""
    if len(node.args) > at:
        return node.args[at]
    return node.kwargs.get(name, default)


def base_of(node: GraphNode) -> GraphNode:
    """The node in whose memory the result of ``node`` lies."""
    while (source := _seen_by(node)) is not None:
        node = source
    return node


def _seen_by(node: GraphNode) -> GraphNode | None:
    """The node whose memory a view sees; None of any other node."""
    if node.target is operator.getitem:
        node = node.args[0]  # a part of several views
    target = node.target
    if target not in VIEWS:
        arguments = target._schema.arguments if isinstance(target, torch._ops.OpOverload) else ()
        if not arguments or arguments[0].alias_info is None:
            return None
    return node.args[0] if isinstance(node.args[0], fx.Node) else None


def _drop_copies(graph: Graph) -> None:
    """Remove copies that only a program which writes can tell from their source.

    Those stay that change the order of memory (``contiguous``), and those that a caller gets where the source
    is not the program's own.
    """
    returned = _returned(graph)
    for node in list(graph.nodes):
        if node.target is not aten.clone.default:
            continue
        source = node.args[0]
        if node.kwargs.get("memory_format") not in (None, torch.preserve_format):
            continue
        base = base_of(source)
        if node in returned:
            if base.op == "placeholder" or base in returned:
                continue
            returned.add(base)
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def _find_signal_pools(graph: Graph) -> None:
    """Let a pool of images of one row be the pool of signals that it was before it was captured."""
    for node in list(graph.nodes):
        if node.target is not aten.max_pool2d.default:
            continue
        before, after = node.args[0], _only_user(node)
        if (
            before.target is not aten.unsqueeze.default
            or before.args[1] not in (-2, 2)
            or value_of(before).dim() != 4
            or after is None
            or after.target is not aten.squeeze.dim
            or after.args[1] not in (-2, 2)
        ):
            continue
        given = [a if isinstance(a, (bool, int)) else list(a)[1:] for a in node.args[1:]]
        with graph.inserting_before(node):
            pool = graph.call_function(aten.max_pool1d.default, (before.args[0], *given), dict(node.kwargs))
        pool.meta = dict(after.meta)
        after.replace_all_uses_with(pool)
    graph.eliminate_dead_code()


def _returned(graph: Graph) -> set[GraphNode]:
    """Nodes whose memory a caller gets."""
    (output,) = [node for node in graph.nodes if node.op == "output"]
    found: set[GraphNode] = set()
    for node in output.all_input_nodes:
        found.add(node)
        while (source := _seen_by(node)) is not None:
            node = source
            found.add(node)
    return found


def _only_user(node: GraphNode) -> GraphNode | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _numbers(values: Any, rank: int, default: int) -> list[int] | None:
    """A parameter of a convolution or pool as (h, w); None where a size is open."""
    if values is None or values == []:
        values = [default] * rank
    if isinstance(values, int):
        values = [values] * rank
    values = list(values)
    if len(values) == 1:
        values *= rank
    if len(values) != rank or not all(type(v) is int and 0 <= v <= MOST_SIZE for v in values):
        return None
    return values if rank == 2 else [0 if default == 0 else 1, *values]


def _conv_parameters(node: GraphNode, weight: Tensor) -> list[int] | None:
    """``conv`` of the block op: stride, padding, dilation, groups, more padding after."""
    rank = _CONVS[node.target]
    stride = _numbers(argument(node, 3, "stride"), rank, 1)
    dilation = _numbers(argument(node, 5, "dilation"), rank, 1)
    groups = argument(node, 6, "groups", 1)
    padding, after = argument(node, 4, "padding"), [0, 0]
    if stride is None or dilation is None or type(groups) is not int:
        return None
    if isinstance(padding, str):
        kernel = list(weight.shape[2:]) if rank == 2 else [1, weight.shape[2]]
        whole = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        before, after = [w // 2 for w in whole], [w % 2 for w in whole]
    else:
        given = _numbers(padding, rank, 0)
        if given is None:
            return None
        before = given
    return [*stride, *before, *dilation, groups, *(after if any(after) else ())]


def _fuse_block(graph: Graph, node: GraphNode, constant: set[GraphNode]) -> None:
    """Make one node of a convolution of constant weights and what follows it."""
    x, weight, bias = argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")
    value, rank = value_of(x), _CONVS[node.target]
    if (
        weight not in constant
        or (bias is not None and bias not in constant)
        or value.dim() != rank + 2
        or value.dtype not in (torch.float32, torch.bfloat16)
        or value.device.type != "cpu"
    ):
        return
    conv = _conv_parameters(node, value_of(weight))
    if conv is None:
        return
    end, activation = node, None
    act: list[Any] = []
    pool: list[int] = []
    new_weight, new_bias = weight, bias
    following = _only_user(end)
    if following is not None and following.target in _NORMS and following.args[0] is end:
        statistics = following.args[1:5]
        only = _only_user(following)
        if (
            all(s is None or s in constant for s in statistics)
            and only is not None
            and only.target is operator.getitem
            and only.args[1] == 0
        ):
            new_weight, new_bias = _folded(
                graph, node, (weight, bias, *statistics, following.args[6]), constant
            )
            end = only
            following = _only_user(end)
    added = None if following is None else _addend(following, end)
    if added is not None:
        end, following = following, _only_user(following)
    for _ in range(2):  # the pool may come first where the activation never falls
        if following is None or following.args[0] is not end:
            break
        found = None if activation else _activation(following, constant)
        if found and (not pool or found[0] == "relu"):
            activation, act = found
        elif not pool and (window := _pool(following)):
            pool = window
        else:
            break
        end = following
        following = _only_user(end)
    with graph.inserting_before(end):  # behind what is added
        fused = graph.call_function(
            block,
            (x, new_weight, new_bias, added),
            {"signal": rank == 1, "conv": conv, "activation": activation, "act": act, "pool": pool},
        )
    fused.meta = dict(end.meta)
    end.replace_all_uses_with(fused)
    graph.eliminate_dead_code()


def _folded(graph: Graph, node: GraphNode, given: tuple, constant: set[GraphNode]) -> list[GraphNode]:
    """Weight and bias with the norm folded into them: one of each for all convolutions of the same."""
    found = []
    for part in ("weight", "bias"):
        args = (part, *given)
        same = (n for n in constant if n.target is folded and n.args == args)
        new = next(same, None)
        if new is None:
            with graph.inserting_before(node):
                new = graph.call_function(folded, args)
            new.meta["val"] = value_of(given[0])
            constant.add(new)
        found.append(new)
    return found


def _addend(node: GraphNode, end: GraphNode) -> GraphNode | None:
    """What a node adds to a convolution's map, a tensor of the same size: a residual sum's other part."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    (other,) = [a for a in node.args if a is not end] or [None]
    if not isinstance(other, fx.Node) or not isinstance(other.meta.get("val"), Tensor):
        return None
    value, whole = value_of(other), value_of(end)
    same = value.dim() == whole.dim() and all(map(same_size, value.shape, whole.shape))
    adds = value.dtype is torch.float32 or torch.backends.mkldnn.is_available()  # ours, or the library
    return other if same and adds and value.dtype is whole.dtype and value.device.type == "cpu" else None


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes, open or not, are the same by what they are made of."""
    a, b = (size.node.expr if isinstance(size, torch.SymInt) else size for size in (a, b))
    return bool(a == b)


def _activation(node: GraphNode, constant: set[GraphNode]) -> tuple[str, list[Any]] | None:
    """Name and numbers of an activation; a number that is a weight is the weight's node."""
    if node.target is aten.prelu.default:
        slope = node.args[1]
        return ("leaky_relu", [slope]) if slope in constant and value_of(slope).numel() == 1 else None
    if node.target is aten.gelu.default:
        tanh = node.kwargs.get("approximate", argument(node, 1, "approximate", "none")) == "tanh"
        return ("gelu_tanh" if tanh else "gelu"), []
    found = _ACTIVATIONS.get(node.target)
    if found is None:
        return None
    name, numbers = found
    if node.kwargs or len(node.args) > 1 + len(numbers):
        return None
    values = [argument(node, at, "", default) for at, default in numbers]
    if not all(isinstance(v, (int, float)) for v in values):
        return None
    return name, [float(v) for v in values]


def _pool(node: GraphNode) -> list[int] | None:
    """``pool`` of the block op."""
    rank = _POOLS.get(node.target)
    if rank is None:
        return None
    kernel = _numbers(argument(node, 1, "kernel_size"), rank, 1)
    stride = argument(node, 2, "stride")
    given = kernel if stride is None or stride == [] else _numbers(stride, rank, 1)
    padding = _numbers(argument(node, 3, "padding"), rank, 0)
    dilation = _numbers(argument(node, 4, "dilation"), rank, 1)
    if kernel is None or given is None or padding is None or dilation is None:
        return None
    if kernel[0] * kernel[1] > BYTE_WINDOW or max(dilation) > 1:
        return None
    return [*kernel, *given, *padding, *dilation, int(bool(argument(node, 5, "ceil_mode", False)))]


def _fuse_linear(graph: Graph, node: GraphNode, constant: set[GraphNode]) -> None:
    """Make one node of a linear layer of constant weights and the activation behind it."""
    x, weight, bias = argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")
    if (
        x in constant
        or weight not in constant
        or (bias is not None and bias not in constant)
        or value_of(x).device.type != "cpu"
        or value_of(x).dtype not in (torch.float32, torch.bfloat16)
        or value_of(weight).dtype is not value_of(x).dtype
        or value_of(weight).dim() != 2
        or 0 in value_of(weight).shape
    ):
        return
    end, activation = node, None
    act: list[Any] = []
    following = _only_user(node)
    if following is not None and following.args[0] is node and (found := _activation(following, constant)):
        end, (activation, act) = following, found
    with graph.inserting_before(end):
        fused = graph.call_function(linear, (x, weight, bias), {"activation": activation, "act": act})
    fused.meta = dict(end.meta)
    end.replace_all_uses_with(fused)
    graph.eliminate_dead_code()


def _fuse_recurrent(graph: Graph, node: GraphNode, constant: set[GraphNode]) -> None:
    """Let a recurrent layer of constant weights be one that is packed once."""
    x, h0, c0, *weights = node.args[:13]
    reset, lengths, mode, batch_first, keep = node.args[13:18]
    value = value_of(x)
    if (
        keep
        or value.dtype not in (torch.float32, torch.bfloat16)
        or value.device.type != "cpu"
        or not all(w is None or w in constant for w in weights)
    ):
        return
    with graph.inserting_before(node):
        packed = graph.call_function(
            recurrent, (x, h0, c0, reset, lengths, tuple(weights), mode, batch_first, None)
        )
    packed.meta = dict(node.meta)
    node.replace_all_uses_with(packed)
    graph.erase_node(node)


def fold(part: str, tensors: Sequence[Tensor | None], eps: float) -> Tensor:
    """The value of :func:`folded`: computed in float64."""
    weight, bias, gamma, beta, mean, var = (None if t is None else t.detach().double() for t in tensors)
    assert weight is not None and mean is not None and var is not None
    scale = (1.0 if gamma is None else gamma) / (var + eps).sqrt()
    if part == "weight":
        result = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    else:
        shift = -mean if bias is None else bias - mean
        result = shift * scale if beta is None else beta + shift * scale
    dtype = tensors[0].dtype if tensors[0] is not None else torch.float32
    return result.to(dtype).contiguous()
