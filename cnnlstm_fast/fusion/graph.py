"""A speculated call in the autograd graph: from its operands through its placeholders to its result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cnnlstm_fast.fusion.context import Context
from cnnlstm_fast.fusion.plan import FusionPlan


class SpeculatedCall(Protocol):
    """What the graph asks of a speculation."""

    context: Context
    plan: FusionPlan

    def make_placeholders(self, slots: list[int], policy: str) -> Sequence[Any]: ...

    def run_steps_from(self, at: int, value: Tensor) -> Tensor: ...


class SpeculatedGraph:
    """A speculated call in the autograd graph, with placeholders between its operands and its result.

    :class:`OperandsToPlaceholders` leads from the operands to the placeholders,
    :class:`PlaceholdersToResult` from these and the block to the result. Gradients flow from the latter
    through the block itself; those of a placeholder are computed only where somebody holds it.

    Attributes:
        speculation: until its result has been returned.
        needs: which operands need a gradient.
        operands: aliases of them, from which ``true`` was computed.
        true: by slot of a placeholder that got a value: its speculation, its number, and that value.
        given: by slot, the gradient that :class:`PlaceholdersToResult` gave in the backward that runs now.
    """

    def __init__(self, speculation: SpeculatedCall, operands: tuple):
        self.speculation: SpeculatedCall | None = speculation
        self.needs = [t is not None and t.requires_grad for t in operands]
        self.operands: tuple = ()
        self.true: dict[int, tuple[SpeculatedCall, int, Tensor]] = {}
        self.given: dict[int, Tensor] = {}


class OperandsToPlaceholders(torch.autograd.Function):
    """From a block's operands to the placeholders of its values."""

    @staticmethod
    def forward(ctx, graph, slots, *tensors):
        ctx.graph, ctx.slots = graph, slots
        ctx.set_materialize_grads(False)
        values = graph.speculation.make_placeholders(slots, "strides")
        if not any(graph.needs[:3]):  # only the norm's parameters need gradients
            ctx.mark_non_differentiable(*(value for value in values if value._at == 0))
        return tuple(values)

    @staticmethod
    def backward(ctx, *grads):
        graph: SpeculatedGraph = ctx.graph
        nothing = (None,) * len(ctx.needs_input_grad)
        extra = {}  # gradients from other readers than the block
        for slot, grad in zip(ctx.slots, grads, strict=True):
            given = graph.given.pop(slot, None)
            if grad is not None and grad is not given:
                extra[slot] = grad if given is None else grad - given
        if not extra:
            return nothing
        values = [graph.true[slot][2] for slot in extra]
        count = len(ctx.needs_input_grad) - 2  # the placeholders before a sum don't depend on what it adds
        needed = [i for i, need in enumerate(graph.needs[:count]) if need]
        operands = [graph.operands[i] for i in needed]
        found = torch.autograd.grad(
            values, operands, list(extra.values()), retain_graph=True, create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )  # fmt: skip
        by_operand = dict(zip(needed, found, strict=True))
        return None, None, *(by_operand.get(i) for i in range(count))


class PlaceholdersToResult(torch.autograd.Function):
    """From the block's own result and its placeholders to the result that the program gets."""

    @staticmethod
    def forward(ctx, graph, result, *values):
        ctx.graph, ctx.slots = graph, [value._slot for value in values]
        ctx.set_materialize_grads(False)
        return result.data

    @staticmethod
    def backward(ctx, grad):
        true: dict = ctx.graph.true
        given: dict[int, Tensor] = {}
        if grad is not None:
            for slot in ctx.slots:
                if slot in true:
                    speculation, at, value = true[slot]
                    given[slot] = _gradient_at(speculation, at, value, grad)
            ctx.graph.given = given
        return None, grad, *(given.get(slot) for slot in ctx.slots)


def _gradient_at(speculation: SpeculatedCall, at: int, value: Tensor, grad: Tensor) -> Tensor:
    again = torch.is_grad_enabled()
    with speculation.context.entered(value.device.type):
        if not again:
            value = value.detach().requires_grad_()
        (found,) = torch.autograd.grad(
            speculation.run_steps_from(at, value), value, grad.to(speculation.plan.dtypes[-1]),
            create_graph=again,
        )  # fmt: skip
    return found
