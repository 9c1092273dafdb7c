"""Recurrent layers as a model uses them: PyTorch's way to reset states or to stop at an end, and ours."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import cnnlstm_fast as cf


class PlainLayer(nn.Module):
    """A batch-first ``nn.LSTM`` or ``nn.GRU``: ``(B, T, I) -> (B, T, D * H)``.

    With ``reset`` (B, T) a loop over time whose state is masked before each step, with ``lengths`` (B,)
    packed and unpacked; rows beyond the batch are left out.
    """

    def __init__(self, layer: nn.RNNBase, reset: Tensor | None = None, lengths: Tensor | None = None):
        super().__init__()
        self.layer, self.reset, self.lengths = layer, reset, lengths

    def forward(self, x: Tensor) -> Tensor:
        batch, time = x.shape[:2]
        if self.reset is not None:
            keep = (~self.reset[:batch]).to(x.dtype)
            state = None
            outs = []
            for t in range(time):
                if state is not None:
                    masked = [s * keep[:, t, None] for s in (state if type(state) is tuple else (state,))]
                    state = tuple(masked) if len(masked) == 2 else masked[0]
                out, state = self.layer(x[:, t, None], state)
                outs.append(out)
            return torch.cat(outs, 1)
        if self.lengths is not None:
            packed = pack_padded_sequence(x, self.lengths[:batch], batch_first=True, enforce_sorted=False)
            out, _ = self.layer(packed)
            return pad_packed_sequence(out, batch_first=True, total_length=time)[0]
        return self.layer(x)[0]


class FastLayer(PlainLayer):
    """The same in one call."""

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        reset = None if self.reset is None else self.reset[:batch]
        lengths = None if self.lengths is None else self.lengths[:batch]
        return self.layer(x, reset=reset, lengths=lengths)[0]


def build_layers(
    kind: str, inputs: int, hidden: int, shape: tuple[int, int], given: str, **options
) -> tuple[PlainLayer, FastLayer]:
    """The plain and the fast layer with the same weights, for inputs of ``shape`` (B, T).

    ``given`` is ``"plain"``, ``"resets"`` (the state begins anew about every 30 steps) or ``"lengths"``
    (from half to all steps).
    """
    batch, time = shape
    generator = torch.Generator().manual_seed(7)
    more = {}
    if given == "resets":
        more["reset"] = torch.rand(batch, time, generator=generator) < 1 / 30
    elif given == "lengths":
        more["lengths"] = torch.randint(time // 2, time + 1, (batch,), generator=generator)
    plain = getattr(nn, kind)(inputs, hidden, batch_first=True, **options)
    fast = getattr(cf, kind)(inputs, hidden, batch_first=True, **options)
    fast.load_state_dict(plain.state_dict())
    return PlainLayer(plain, **more), FastLayer(fast, **more)


def recurrent_flops(
    kind: str, shape: tuple[int, int], inputs: int, hidden: int, layers: int = 1, directions: int = 1
) -> int:
    """Floating-point operations of the matrix products of a forward over (B, T)."""
    gates = 4 if kind == "LSTM" else 3
    total = 0
    for layer in range(layers):
        width = inputs if layer == 0 else hidden * directions
        total += directions * 2 * shape[0] * shape[1] * gates * hidden * (width + hidden)
    return total
