"""The observer: it is told of each block, recurrent layer and unfused module as it runs."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from cnnlstm_fast.spec import BlockSpec


class Observer(Protocol):
    """Is told of each block, recurrent layer and unfused module as it runs.

    Attributes:
        alone: there are no hooks on all modules but the observer's own; only then blocks stay fused.
    """

    alone: bool

    def block_begins(
        self,
        spec: BlockSpec | None,
        x: Tensor,
        weight: Tensor,
        norm: nn.Module | None,
        activation: Any,
        pool: nn.Module | None,
        layout: str,
        plan: str,
        reason: str,
    ) -> None: ...

    def epilogue_begins(self, x: Tensor, weight: Tensor, what: str) -> None: ...

    def block_ends(self, out: Tensor) -> None: ...

    def layer_runs(self, plan: str, reason: str) -> None: ...

    def as_is(self, module: nn.Module, reason: str) -> None: ...


#: Set by `explain` while it watches a model run (:class:`cnnlstm_fast.explain.Recorder`).
current: Observer | None = None
