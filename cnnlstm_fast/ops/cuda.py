"""Registration of Triton kernels as an op's CUDA side. The first call imports the kernels and Triton."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

_lib = torch.library.Library("cnnlstm_fast", "IMPL")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def register_cuda(op: str, module: str, function: str, x_at: int) -> None:
    """Let ``cnnlstm_fast::op`` on CUDA call ``function`` of ``cnnlstm_fast.kernels.module``.

    ``x_at`` is the index of the input among the op's arguments; its device and dtype are the call's.
    """

    def host_function(x: Tensor):
        if x.dtype not in DTYPES:
            raise TypeError(
                f"got an input of {x.dtype}, the CUDA kernels compute float32, bfloat16 and float16: "
                'use plan="reference"'
            )
        return getattr(importlib.import_module(f"cnnlstm_fast.kernels.{module}"), function)

    def run(*args):
        x = args[x_at]
        # Launched through the traceable wrapper, a kernel would cost a millisecond of dispatch.
        with torch.cuda.device(x.device), set_wrap_triton_enabled(False):
            return host_function(x)(*args)

    def trace(mode, target, types, args, kwargs):
        x = args[x_at]
        if not _becomes_kernels(types, x):
            return mode.__torch_dispatch__(target, types, args, kwargs)
        with mode:
            return host_function(x)(*args)

    _lib.impl(op, run, "CUDA")
    torch.library.register_torch_dispatch(f"cnnlstm_fast::{op}", FunctionalTensorMode, trace, lib=_lib)


def _becomes_kernels(types, x: Tensor) -> bool:
    """Whether AOTAutograd should see the kernels instead of the op, as `torch.library.triton_op` does it.

    An exported program keeps the op: Triton kernels cannot be saved with it.
    """
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    plain = (Tensor, FakeTensor, FunctionalTensor)
    return x.is_cuda and all(t in plain for t in types) and not custom_triton_ops_decomposition_disabled()
