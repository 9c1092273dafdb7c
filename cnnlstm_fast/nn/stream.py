"""A recurrent layer fed one step at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnnlstm_fast.errors import WrongDtype, WrongShape
from cnnlstm_fast.functional import recurrent as functional
from cnnlstm_fast.ops import recurrent_stream as op
from cnnlstm_fast.ops.recurrent import UNIT_GROUP
from cnnlstm_fast.planning.support import why_not_fused_recurrent

__all__ = ["Stream"]


class Stream:
    """What ``stream()`` of a recurrent layer returns: the layer's weights as they were then, and a state.

    On the CPU in float32 the weights are packed once, here. Later changes of the layer show in a new stream
    only. There are no gradients and no dropout.

    Args:
        cell, stack, params: of the layer.
        batch: how many sequences go side by side.
        hx: initial state as the layer takes it, or None for zeros.

    Shapes:
        One step: ``(batch, input_size) -> (batch, H_out)``; ``H_out`` is ``proj_size`` or, where that is 0,
        ``hidden_size``.

    Raises:
        ValueError: a bidirectional layer, which needs a sequence's end before its beginning, or a state
            of the wrong shape.

    Example:
        >>> layer = cf.LSTM(64, 128).eval()
        >>> steps = torch.randn(10, 2, 64)
        >>> stream = layer.stream(batch=2)
        >>> outs = torch.stack([stream(x) for x in steps])
        >>> torch.allclose(outs, layer(steps)[0], atol=1e-5)
        True
        >>> stream.start()  # zeros again
    """

    def __init__(
        self,
        cell: functional.Cell,
        stack: functional.Stack,
        params: Sequence[Tensor],
        batch: int = 1,
        hx: Sequence[Tensor] | None = None,
    ):
        if stack.bidirectional:
            raise ValueError(
                f"a bidirectional {cell.name} cannot stream: its reverse direction begins with the last step"
            )
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"got batch={batch!r}, expected how many sequences go side by side")
        self._cell, self._stack = cell, stack._replace(training=False, batch_first=True)
        self._params = [p.detach() for p in params]
        self._inputs = self._params[0].shape[1]
        self._hidden = self._params[0].shape[0] // cell.gates
        self._widths = functional.state_sizes(cell, self._hidden, stack)
        self.batch = batch
        why_not = why_not_fused_recurrent(self._params[0], self._params)
        self._packed: Tensor | None = None
        if (
            why_not is None
            and self._params[0].device.type == "cpu"
            and self._params[0].dtype == torch.float32
        ):
            weights = [self._layer(layer) for layer in range(stack.num_layers)]
            self._packed = torch.cat([op.pack_op(*w, cell.mode) for w in weights])
        else:
            self._params = [p.clone() for p in self._params]
        self.start(hx)

    def _layer(self, layer: int) -> list[Tensor | None]:
        count = self._stack.per_direction
        params = [p.contiguous() for p in self._params[layer * count : (layer + 1) * count]]
        return functional.layer_weights(params, self._stack)[:5]

    def start(self, hx: Sequence[Tensor] | Tensor | None = None) -> None:
        """Begin anew.

        Args:
            hx: initial state as the layer takes it; zeros if None.

        Raises:
            ValueError: a state of the wrong shape.
            TypeError: no state of this kind of layer.
        """
        layers = self._stack.num_layers
        like = self._params[0]
        if self._cell.states == 2:
            functional.check_pair(hx)
        given = (hx,) if self._cell.states == 1 and hx is not None else hx
        functional.check_states(given, self._widths, self._stack, self.batch)
        states = [like.new_zeros(layers, self.batch, width) for width in self._widths]
        if given is not None:
            for state, value in zip(states, given, strict=True):
                state.copy_(value.detach())
        self._steps = 0
        if self._packed is None:
            self._states = states
            return
        padded = [-(-width // UNIT_GROUP) * UNIT_GROUP for width in self._widths]
        self._h = like.new_zeros(layers, 2, self.batch, padded[0])
        self._h[:, 0, :, : self._widths[0]] = states[0]
        self._c = like.new_zeros(layers, self.batch, padded[-1]) if len(states) == 2 else like.new_empty(0)
        if len(states) == 2:
            self._c[..., : self._widths[1]] = states[1]

    @property
    def state(self) -> tuple[Tensor, Tensor] | Tensor:
        """A copy of the state after the last step, as the layer returns it.

        ``(h, c)`` of an LSTM, ``h`` of a GRU. ``h`` is ``(num_layers, batch, H_out)``, ``c`` is
        ``(num_layers, batch, hidden_size)``.
        """
        if self._packed is None:
            states = [s.clone() for s in self._states]
        else:
            states = [self._h[:, self._steps % 2, :, : self._widths[0]].clone()]
            if len(self._widths) == 2:
                states.append(self._c[..., : self._widths[1]].clone())
        return (states[0], states[1]) if len(states) == 2 else states[0]

    def __call__(self, x: Tensor, *, reset: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            x: this step's inputs, ``(batch, input_size)``.
            reset: bool ``(batch,)``: where True the state is zero before this step.

        Returns:
            The step's output, ``(batch, H_out)``.

        Raises:
            TypeError, ValueError: as :func:`cnnlstm_fast.functional.lstm`.
        """
        if x.shape != (self.batch, self._inputs):
            raise WrongShape(
                f"got a step of shape {tuple(x.shape)}, expected {(self.batch, self._inputs)}: one step's "
                f"features for each of {self.batch} sequences"
            )
        if x.dtype != self._params[0].dtype:
            raise WrongDtype(
                f"the stream computes {str(self._params[0].dtype)[6:]} but gets {str(x.dtype)[6:]}: convert "
                "with .to(dtype)"
            )
        if reset is not None:
            functional.check_reset(reset, x, self._stack)
        with torch.no_grad():
            if self._packed is None:
                reset = None if reset is None else reset.unsqueeze(1)
                out, states = functional.run(
                    self._cell, x.unsqueeze(1), self._states, self._params, self._stack, reset
                )
                self._states = list(states)
                return out.squeeze(1)
            out = op.step_op(
                x.contiguous(), self._h, self._c, self._packed, reset, self._cell.mode, self._hidden,
                self._widths[0], self._steps,
            )  # fmt: skip
        self._steps += 1
        return out
