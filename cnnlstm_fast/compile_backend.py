"""``torch.compile(model, backend="cnnlstm_fast")``: blocks in the graphs that dynamo captures.

The backend is found through an entry point, so nothing has to be imported. It looks for blocks (a convolution
with its norm, activation, pool and bridge) among the graph's calls and puts one call of the block function in
the place of each. The rest goes to eager PyTorch or, with ``options={"rest": "inductor"}``, to inductor.
Whether a fused plan is the fastest is decided at run time, as everywhere.

``model.compile(backend="cnnlstm_fast")`` compiles in place and keeps the model's type and keys;
``torch.compile(model)`` returns a wrapper whose keys begin with ``_orig_mod.``.

Dynamo itself stops at every ``nn.LSTM`` and ``nn.GRU`` and leaves most of the function around them to
eager. Use :class:`cnnlstm_fast.LSTM` and :class:`cnnlstm_fast.GRU` there, or
:func:`cnnlstm_fast.accelerate`, which needs no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from torch import Tensor, fx, nn

from cnnlstm_fast.fusion import calls, match, run
from cnnlstm_fast.fusion.calls import ANYTHING, CONVS, NOTHING, Conv, Norm

__all__ = ["cnnlstm_fast", "fuse"]

#: The key of a block's side effect in its node's ``meta``.
_EFFECT = "cnnlstm_fast_effect"


class Block(nn.Module):
    """A block's node in a graph: activation and pool are fixed, tensors and numbers are arguments."""

    def __init__(self, activation: nn.Module | None, pool: nn.Module | None):
        super().__init__()
        self.activation, self.pool = activation, pool

    def forward(self, x: Tensor, conv: tuple, norm: tuple | None) -> Tensor:
        conv = Conv(*conv)
        module = Norm(*norm).module(conv.weight.shape[0], x.dim()) if norm is not None else None
        return run.run_block(x, conv, module, self.activation, self.pool)


def cnnlstm_fast(graph: fx.GraphModule, inputs: Sequence[Any], *, options: dict | None = None) -> Callable:
    """The backend: what ``torch.compile(model, backend="cnnlstm_fast")`` calls with each graph.

    Args:
        graph: what dynamo captured; parameters are among its inputs.
        inputs: examples.
        options: ``{"rest": "eager"}`` (the default) or ``{"rest": "inductor"}``: what runs all that is
            in no block.

    Returns:
        A function of the graph's inputs, with the graph's results.

    Shapes:
        Inputs and results are those of the graph.

    Raises:
        ValueError: unknown options.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
        >>> fast = torch.compile(model, backend="cnnlstm_fast", options={"rest": "eager"})
        >>> fast(torch.randn(2, 3, 12, 12)).shape
        torch.Size([2, 8, 5, 5])
    """
    options = {"rest": "eager", **(options or {})}
    rest = options.pop("rest")
    if options or rest not in ("eager", "inductor"):
        raise ValueError(
            f"got options with rest={rest!r} and {sorted(options)}, expected 'rest': 'eager' or 'inductor'"
        )
    fuse(graph)
    if rest == "eager":
        return graph.forward
    from torch._inductor.compile_fx import compile_fx  # an import of seconds

    return cast(Callable, compile_fx(graph, inputs))


def fuse(module: fx.GraphModule) -> int:
    """Put one call in the place of every block, in place; returns how many there were.

    The call stands where the norm stood, or the convolution if there is no norm
    (:func:`cnnlstm_fast.fusion.calls.may_stand_between` says why and when).
    """
    _results_of_in_place_calls(module.graph)
    counters = _counters(module.graph)
    count = 0
    for node in list(module.graph.nodes):
        block = _block_at(node, counters)
        if block is None:
            continue
        members, anchor, x, conv, found = block
        name = f"cnnlstm_fast_block_{count}"
        module.add_submodule(name, Block(found.get("activation"), found.get("pool")))
        end, norm = members[-1], found.get("norm")
        with module.graph.inserting_after(anchor):
            fused = module.graph.call_module(name, (x, tuple(conv), norm and tuple(norm)))
        fused.meta = {**end.meta, _EFFECT: NOTHING if norm is None else norm.effect}
        end.replace_all_uses_with(fused)
        for member in reversed(members):
            module.graph.erase_node(member)
        count += 1
    if count:
        module.graph.lint()
        module.recompile()
    return count


def _results_of_in_place_calls(graph: fx.Graph) -> None:
    """Let all nodes behind a call in place read its result instead of its input; both are the same tensor."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        seen.add(node)
        found = _read(node)
        if found is not None and found.inplace:
            node.args[0].replace_all_uses_with(node, lambda user, seen=frozenset(seen): user not in seen)


def _block_at(
    node: fx.Node, counters: set[fx.Node]
) -> tuple[list[fx.Node], fx.Node, fx.Node, Conv, dict[str, Any]] | None:
    """The block that begins with ``node``: its nodes, the one behind which its call goes, input and parts."""
    if node.op != "call_function" or node.target not in CONVS:
        return None
    arguments: dict[str, Any] = {
        **dict(zip(("input", *Conv._fields), node.args, strict=False)),
        **node.kwargs,
    }
    x, rank = arguments.pop("input", None), CONVS[node.target]
    value = x.meta.get("example_value") if isinstance(x, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() != rank:
        return None
    members, anchor, state, slots = [node], node, "conv", {}
    between: list[int] = []
    while len(members[-1].users) == 1:
        (following,) = members[-1].users
        found = _read(following)
        if found is None or following.args[0] is not members[-1]:
            break
        if [*following.args, *following.kwargs.values()].count(members[-1]) != 1:
            break
        next_state = match.follow(state, found.part, rank)
        if next_state is None:
            break
        between += [_effect(n, counters) for n in _nodes_between(members[-1], following)]
        if not calls.may_stand_between(between, found.part.kind == "norm"):
            break
        state = next_state
        members.append(following)
        anchor = following if found.part.kind == "norm" else anchor
        slot = match.SLOTS.get(found.part.kind)
        if slot is not None:
            slots[slot] = found.value
    return (members, anchor, x, Conv(**arguments), slots) if slots else None


def _nodes_between(node: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    while (node := node.next) is not end:
        yield node


def _effect(node: fx.Node, counters: set[fx.Node]) -> int:
    """The side effect of a node (:data:`cnnlstm_fast.fusion.calls.NOTHING` and so on)."""
    if node.op in ("placeholder", "get_attr") or node in counters:
        return NOTHING
    if _EFFECT in node.meta:
        return node.meta[_EFFECT]
    function = _function(node)
    return ANYTHING if function is None else calls.effect(function, node.args, node.kwargs)


def _counters(graph: fx.Graph) -> set[fx.Node]:
    """The calls ``num_batches_tracked.add_(1)``, which stand between a convolution and its norm.

    Nothing else in the graph sees what they write: the input is an integer tensor, nothing else uses it, and
    no other input has the same memory.
    """
    inputs = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    memories = [_memory(node) for node in inputs]
    found: set[fx.Node] = set()
    for node, memory in zip(inputs, memories, strict=True):
        value = node.meta.get("example_value")
        if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
            continue
        counted = all(
            (user.op, user.target, user.args, user.kwargs) == ("call_method", "add_", (node, 1), {})
            and not user.users
            for user in node.users
        )
        if counted and memory is not None and memories.count(memory) == 1:
            found.update(node.users)
    return found


def _memory(node: fx.Node) -> int | None:
    """An id of an input's memory, or None where it has no storage."""
    try:
        return node.meta["example_value"].untyped_storage()._cdata
    except (
        AttributeError,
        KeyError,
        NotImplementedError,
        RuntimeError,
    ):  # not a tensor, or one without a storage
        return None


def _read(node: fx.Node) -> calls.Found | None:
    """The part of a block that a node could be, or None."""
    function = _function(node)
    if function is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    return calls.read_call(function, node.args, node.kwargs)


def _function(node: fx.Node) -> Any:
    """The function that a node calls, for a method that of ``Tensor``; None if it calls none."""
    if node.op == "call_method":
        return getattr(Tensor, cast(str, node.target), None)
    return node.target if node.op == "call_function" else None
