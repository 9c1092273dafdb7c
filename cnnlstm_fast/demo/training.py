"""How the demo trains a CNN-LSTM in a few hundred small steps."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnlstm_fast import reference

#: What is trained; the fast models are subclasses.
Model = reference.CNN_LSTM_Simple | reference.CNN_LSTM_1DConv | reference.CNN_LSTM_TimeDistributed

LEARNING_RATE = 8e-3
WARM_UP = 20
MAX_GRAD_NORM = 1.0


def initialise(model: Model, lstm_steps: int) -> None:
    """Weights from which a stacked LSTM over ``lstm_steps`` steps learns quickly.

    Only the last step is read, so what the first ones saw must survive. The biases of the forget gates
    are spread such that the cells remember for anything from 1 to ``lstm_steps`` steps, those of the
    input gates are their opposite (Tallec and Ollivier, "Can recurrent neural networks warp time?"),
    and the recurrent weights start at zero: at first, a cell only sums up what it sees.
    """
    hidden = model.lstm.hidden_size
    with torch.no_grad():
        for name, parameter in model.lstm.named_parameters():
            if name.startswith("weight_ih"):
                nn.init.xavier_uniform_(parameter, gain=2.0)
            else:
                nn.init.zeros_(parameter)
            if name.startswith("bias_ih"):
                input_gate, forget_gate, _, _ = parameter.split(hidden)
                forget_gate.uniform_(1, lstm_steps - 1).log_()
                input_gate.copy_(-forget_gate)


class Learner:
    """A model with its optimizer: Adam, warmed up, then down a cosine, gradients clipped.

    An LSTM that reads thousands of features per step (frames of a clip) moves further per change of
    a weight than one that reads 64, so the rate of its first input weights falls with the root of
    their number.
    """

    def __init__(self, model: Model, steps: int):
        self.model = model
        wide = model.lstm.get_parameter("weight_ih_l0")
        narrower = min(1.0, math.sqrt(64 / wide.shape[1]))
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p is not wide]},
            {"params": [wide], "lr": LEARNING_RATE * narrower},
        ]
        self._optimizer = torch.optim.Adam(groups, lr=LEARNING_RATE, fused=True)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda at: _rate(at, steps))

    def step(self, x: Tensor, y: Tensor) -> float:
        """One training step on a batch; returns its loss. Past the last step, weights stay."""
        loss = F.cross_entropy(self.model(x), y)
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self._optimizer.step()
        self._schedule.step()
        return loss.item()


def _rate(at: int, steps: int) -> float:
    """The learning rate of step ``at`` of ``steps``, as a fraction of the highest."""
    return min(1.0, (at + 1) / WARM_UP) * (1 + math.cos(math.pi * min(1.0, at / steps))) / 2


@torch.inference_mode()
def scores(model: nn.Module, x: Tensor) -> Tensor:
    """``model(x)`` in small batches."""
    return torch.cat([model(part) for part in x.split(32)])


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """The share of rows of ``scores`` whose highest is that of the label."""
    return (scores.argmax(1) == labels).float().mean().item()


@torch.no_grad()
def nudge(model: nn.Module) -> None:
    """Move every weight of the first layer by its last bit."""
    weight = next(model.parameters())
    weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
