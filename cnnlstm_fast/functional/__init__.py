"""The package's public functions: ``conv_block``, ``lstm`` and ``gru``."""

from cnnlstm_fast.functional.conv_block import conv_block
from cnnlstm_fast.functional.recurrent import gru, lstm

__all__ = ["conv_block", "gru", "lstm"]
