"""One file per op: schema, fake kernel, autograd, CPU and CUDA registration."""

from cnnlstm_fast.ops import (
    conv_block,
    conv_fft,
    conv_norm,
    epilogue,
    frozen_conv,
    outputs,
    recurrent,
    recurrent_stream,
)

__all__ = [
    "conv_block",
    "conv_fft",
    "conv_norm",
    "epilogue",
    "frozen_conv",
    "outputs",
    "recurrent",
    "recurrent_stream",
]
