"""Fast CNN-to-RNN models in PyTorch: drop-in modules over fused kernels."""

__version__ = "0.1.0"  # above the imports, some of which read it

from cnnlstm_fast import backends, doctor, functional, reference
from cnnlstm_fast.accelerate import accelerate
from cnnlstm_fast.explain import explain
from cnnlstm_fast.freeze import freeze, load_frozen
from cnnlstm_fast.models import CNN_LSTM_1DConv, CNN_LSTM_Simple, CNN_LSTM_TimeDistributed
from cnnlstm_fast.nn import GRU, LSTM, Sequential, TimeDistributed, ToSequence
from cnnlstm_fast.planning.tuner import tune

__all__ = [
    "GRU",
    "LSTM",
    "CNN_LSTM_1DConv",
    "CNN_LSTM_Simple",
    "CNN_LSTM_TimeDistributed",
    "Sequential",
    "TimeDistributed",
    "ToSequence",
    "accelerate",
    "backends",
    "doctor",
    "explain",
    "freeze",
    "functional",
    "load_frozen",
    "reference",
    "tune",
]
