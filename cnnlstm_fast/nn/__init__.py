"""Drop-in modules."""

from cnnlstm_fast.nn.recurrent import GRU, LSTM
from cnnlstm_fast.nn.sequential import Sequential
from cnnlstm_fast.nn.time_distributed import TimeDistributed
from cnnlstm_fast.nn.to_sequence import ToSequence

__all__ = ["GRU", "LSTM", "Sequential", "TimeDistributed", "ToSequence"]
