"""The three systems, fast: the constructors of :mod:`cnnlstm_fast.reference`, other stages.

Attribute names and ``state_dict`` keys are those of the reference twins, so weights load both ways.
A child that was replaced by another type or carries a hook is called as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cnnlstm_fast import reference
from cnnlstm_fast.fusion.match import Block, as_block
from cnnlstm_fast.nn import LSTM
from cnnlstm_fast.nn.chain import run_modules
from cnnlstm_fast.planning.support import unhooked

__all__ = ["CNN_LSTM_1DConv", "CNN_LSTM_Simple", "CNN_LSTM_TimeDistributed"]


def _block(modules: list[nn.Module], conv: type[nn.Module]) -> Block | None:
    """The modules as one block around a ``conv`` that ends in a map, or None."""
    block = as_block(modules)
    return block if block is not None and type(block.conv) is conv and block.flatten is None else None


def _is_batch(x) -> bool:
    """Whether it is a batch of images; PyTorch's own layers say what is wrong with anything else."""
    return isinstance(x, Tensor) and x.dim() == 4


class _Fast(nn.Module):
    """The stages behind the features."""

    lstm_type: type[Any] = LSTM

    if TYPE_CHECKING:  # TorchScript reads the annotations of a class
        lstm: nn.RNNBase
        fc: nn.Linear

        def features(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        lstm, features = self.lstm, self.features(x)
        if type(lstm) is LSTM and not lstm.bidirectional and unhooked(lstm):
            _, (h_n, _) = lstm(features)
            last = h_n[-1]  # no gradient map over all steps comes back
        else:
            last = lstm(features)[0][:, -1]
        return self.fc(last)


class CNN_LSTM_Simple(_Fast, reference.CNN_LSTM_Simple):
    __doc__ = reference.CNN_LSTM_Simple.__doc__

    def features(self, x: Tensor) -> Tensor:
        """What the LSTM gets, contiguous: ``(B, C, H, W) -> (B, H'*W', 64)``."""
        block = _block([self.cnn, self.relu, self.pool], nn.Conv2d)
        if block is None or not _is_batch(x):
            return super().features(x)
        return run_modules(block, x, "locations")


class CNN_LSTM_1DConv(_Fast, reference.CNN_LSTM_1DConv):
    __doc__ = reference.CNN_LSTM_1DConv.__doc__

    def features(self, x: Tensor) -> Tensor:
        """What the LSTM gets, contiguous: ``(B, C, H, W) -> (B, H'*W', 64)``."""
        block, block_1d = _block([self.cnn], nn.Conv2d), _block([self.cnn_1d], nn.Conv1d)
        if block is None or block_1d is None or not _is_batch(x):
            return super().features(x)
        y = run_modules(block, x, "locations")  # the Conv1d reads it through its strides
        return run_modules(block_1d, y.transpose(1, 2), "locations")


class CNN_LSTM_TimeDistributed(_Fast, reference.CNN_LSTM_TimeDistributed):
    __doc__ = reference.CNN_LSTM_TimeDistributed.__doc__

    def features(self, x: Tensor) -> Tensor:
        """What the LSTM gets, contiguous: ``(B, T, C, H, W) -> (B, T, 64*H'*W')``."""
        self.check_frames(x)
        block = _block([self.cnn], nn.Conv2d)
        if block is None:
            return super().features(x)
        return run_modules(block, x.flatten(0, 1), "features").unflatten(0, x.shape[:2])
